"""Locations: how they are spelled, checked and put together. No files, no network, no heavy imports.

"Nothing is decoded" is the rule behind all of it: what is written is the key, character by character.
"""

from __future__ import annotations

import re
import unicodedata

_BUCKET = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def check_uri(text: str) -> str:
    """Normalise a location, or raise ValueError with the reason and the right spelling.

    Accepted: ``s3://bucket/key`` (also spelled ``S3://`` or ``s3a://``), ``file:///path``, absolute paths, and relative ones
    that say so (``./``, ``../``, ``~/``). A trailing slash is dropped. ``%20`` is three characters of a key. The messages show
    neither a password nor a query: both may be secrets.
    """
    shown = repr(re.sub(r"\?.*", "?...", re.sub(r"//[^/]*@", "//...@", text), flags=re.DOTALL))
    if not text.strip():
        raise ValueError("a location is empty; give a local folder (./models/a) or an s3:// prefix")
    if text != text.strip():
        raise ValueError(f"{shown} has blanks around it; remove them")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ValueError(f"{shown} holds a control character, such as a line break; remove it")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _check_path(text, shown)
    if scheme.lower() == "file":
        if not rest.startswith("/"):
            raise ValueError(f"{shown} must have three slashes: file:///path")
        return rest.rstrip("/") or "/"
    if scheme.lower() in ("http", "https"):
        raise ValueError(
            f"{shown} is a web address; give s3://bucket/key, and the server by AWS_ENDPOINT_URL_S3={scheme}://host"
        )
    if scheme.lower() not in ("s3", "s3a"):
        raise ValueError(f"{shown} is not understood; use s3://bucket/key or a local path")
    return _check_s3(rest, shown)


def _check_path(text: str, shown: str) -> str:
    if text.startswith(("/", "./", "../", "~/")) or text in (".", "..", "~"):
        return text.rstrip("/") or "/"
    if short := re.match(r"(?i)(?:s3[an]?:/?|arn:aws[a-z-]*:s3:::)(?=[^/])", text):
        raise ValueError(f"{shown} is not the form of an object store's prefix; write s3://{text[short.end() :]}")
    if text.lower().startswith("file:"):
        raise ValueError(f"{shown} must have three slashes: file:///path")
    raise ValueError(f"{shown} has no scheme; write s3://{text} for an object store or ./{text} for a local path")


def _check_s3(rest: str, shown: str) -> str:
    if "?" in rest or "#" in rest:
        raise ValueError(
            f"{shown} carries a query or a fragment (? or #); give s3://bucket/key alone, and the server by AWS_ENDPOINT_URL_S3"
        )
    bucket, _, key = rest.partition("/")
    key = key.removesuffix("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(
            f"{shown} has no valid bucket name; the form is s3://bucket/key, the bucket 3 to 63 lower-case letters, digits,"
            " dots and hyphens (a server's address belongs into AWS_ENDPOINT_URL_S3, keys into AWS_ACCESS_KEY_ID and its like)"
        )
    if not key:
        raise ValueError(f"{shown} needs a key prefix: s3://{bucket}/some/folder")
    if "\\" in key:
        raise ValueError(f"{shown} has a backslash; the separator is /")
    parts = key.split("/")
    if "" in parts:
        raise ValueError(f"{shown} has an empty path part (two slashes); in S3 that is another key. Remove one slash")
    if "." in parts or ".." in parts:
        raise ValueError(f"{shown} has a part . or .., which an object store does not resolve; write the key in full")
    if len(key.encode()) > 1024:
        raise ValueError(f"{shown} has a key of {len(key.encode())} bytes; S3 allows 1024")
    return f"s3://{bucket}/{key}"


def join(uri: str, *parts: str) -> str:
    """``join("s3://b/run", "plan", "manifest.json") -> "s3://b/run/plan/manifest.json"``."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def parent(uri: str) -> str:
    """The prefix above: ``parent("s3://b/run/rounds/0001") -> "s3://b/run/rounds"``. Raises ValueError where none is."""
    above, slash, name = uri.rstrip("/").rpartition("/")
    if not name or above == "s3:/":
        raise ValueError(f"{uri!r} has nothing above it")
    if name in (".", "..") or uri == "~":
        return join(uri, "..")
    return above or ("/" if slash else ".")


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")
