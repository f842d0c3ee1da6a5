"""A teacher that somebody serves: how its address is written. ``http://host:8000/v1#model``, light imports only."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

API_KEY = "CAMOPD_TEACHER_API_KEY"  # environment variable of the key, which is never part of a recipe


def is_served(location: str) -> bool:
    """Whether a model's location is the address of a server."""
    return location.lower().startswith(("http://", "https://"))


def check_served(text: str) -> str:
    """The address of an OpenAI-compatible server as it is kept, or ValueError with the reason and the right spelling.

    After ``#`` stands which of the served models is meant; without it, the only one. Messages show neither user nor query.
    """
    shown = repr(re.sub(r"\?[^#]*", "?...", re.sub(r"//[^/]*@", "//...@", text), flags=re.DOTALL))
    if text != text.strip() or not text.isprintable() or " " in text.partition("#")[0]:
        raise ValueError(f"{shown} holds blanks or control characters; remove them")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{shown} is no web address; the form is http://host:8000/v1") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{shown} carries a user or password; leave it out and set {API_KEY} in the environment")
    if parts.query:
        raise ValueError(f"{shown} carries a query, which may be a key; leave it out and set {API_KEY} in the environment")
    path = parts.path.rstrip("/")
    if not host or not path.endswith("/v1"):
        raise ValueError(f"{shown} is not the base address of an OpenAI-compatible server, which ends in /v1")
    address = f"{host}:{port}" if port else host
    address = f"[{host}]" + address.removeprefix(host) if ":" in host else address
    model = f"#{parts.fragment}" if parts.fragment else ""
    return f"{parts.scheme.lower()}://{address}{path}{model}"


def split_served(location: str) -> tuple[str, str]:
    """Base address and name of the model, which is empty where the only one is meant."""
    base, _, model = location.partition("#")
    return base, model
