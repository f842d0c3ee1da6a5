"""Everything below a place, hidden names and manifests included, and its removal: for `camopd gc` alone.

A stage never asks for this. What goes is named file by file; nothing here follows a link.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from camopd.errors import StoreError
from camopd.store.uris import join

BATCH = 1000  # keys of one DeleteObjects, by S3's rule
NO_BATCHES = (400, 404, 405, 411, 501)  # no such request there, or one that wants a checksum which this client does not send
_MAY_NOT = "these credentials may not delete there; they need s3:DeleteObject"


@dataclass(frozen=True)
class Found:
    """A file: its name relative to the place that was looked at, bytes, and when it was written, seconds since 1970."""

    name: str
    size: int
    modified: float


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun and not ended; its parts take up space. ``name`` as in ``Found``."""

    name: str
    id: str
    begun: float


class Sweeper(Protocol):
    """Methods raise StoreError."""

    def survey(self, uri: str) -> list[Found]:
        """Every file below a place, by name."""

    def remove(self, uri: str, names: Sequence[str]) -> None:
        """Delete these files below a place, and folders below it that held nothing else; absent ones do no harm."""

    def uploads(self, uri: str) -> list[Upload]:
        """Uploads below a place that are not ended; none where that may not be asked."""

    def abort(self, uri: str, upload: Upload) -> None:
        """Free the parts of an upload."""


class LocalSweeper:
    """Folders of this machine. Links are files here: what they lead to is somebody else's."""

    def survey(self, uri: str) -> list[Found]:
        root, found = Path(uri).expanduser(), []
        with _told(uri):
            for folder, folders, files in os.walk(root, onerror=_raise):
                links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
                for name in (*files, *links):
                    path = Path(folder, name)
                    try:
                        about = path.lstat()
                    except FileNotFoundError:  # a temporary name that was here a moment ago
                        continue
                    found.append(Found(path.relative_to(root).as_posix(), about.st_size, about.st_mtime))
        return sorted(found, key=lambda file: file.name)

    def remove(self, uri: str, names: Sequence[str]) -> None:
        root = Path(uri).expanduser()
        with _told(uri):
            for name in names:
                (root / name).unlink(missing_ok=True)
            emptied = {folder for name in names for folder in (root / name).parents if root in folder.parents}
            for folder in sorted(emptied, reverse=True):  # the deepest first
                with contextlib.suppress(OSError):  # something is in it
                    folder.rmdir()

    def uploads(self, uri: str) -> list[Upload]:
        return []

    def abort(self, uri: str, upload: Upload) -> None:
        raise AssertionError("a folder has no uploads")


class S3Sweeper:
    """Prefixes of a bucket. Needs s3:DeleteObject, and s3:ListBucketMultipartUploads and s3:AbortMultipartUpload for uploads.

    Args:
        client: a boto3 client.
        explained: turns its errors into sentences about a location.
    """

    def __init__(self, client: Any, explained: Any) -> None:
        self._client, self._explained = client, explained
        self._batches = True

    def survey(self, uri: str) -> list[Found]:
        bucket, start = _split(uri)
        with self._explained(uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start)
            entries = [entry for page in pages for entry in page.get("Contents", ())]
        found = [Found(e["Key"][len(start) :], e["Size"], e["LastModified"].timestamp()) for e in entries]
        return sorted((file for file in found if file.name), key=lambda file: file.name)

    def remove(self, uri: str, names: Sequence[str]) -> None:
        bucket, start = _split(uri)
        for first in range(0, len(names), BATCH):
            keys = [start + name for name in names[first : first + BATCH]]
            with self._refused(uri), self._explained(uri):
                if len(keys) == 1 or not self._batched(bucket, keys):
                    for key in keys:
                        self._client.delete_object(Bucket=bucket, Key=key)

    def _batched(self, bucket: str, keys: Sequence[str]) -> bool:
        """Delete many at once; False where the server does not take that. Raises StoreError for what stays."""
        from botocore.exceptions import ClientError

        if not self._batches:
            return False
        try:
            answer = self._client.delete_objects(
                Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in NO_BATCHES:
                raise
            self._batches = False
            return False
        for one in answer.get("Errors", ()):
            if one.get("Code") == "AccessDenied":
                raise StoreError(f"s3://{bucket}/{one.get('Key')}: {_MAY_NOT}")
            raise StoreError(f"s3://{bucket}/{one.get('Key')} was not removed: {one.get('Code')} {one.get('Message', '')}")
        return True

    @contextlib.contextmanager
    def _refused(self, uri: str) -> Iterator[None]:
        from botocore.exceptions import ClientError

        try:
            yield
        except StoreError as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and cause.response["ResponseMetadata"]["HTTPStatusCode"] == 403:
                raise StoreError(f"{uri}: {_MAY_NOT}") from error
            raise

    def uploads(self, uri: str) -> list[Upload]:
        from botocore.exceptions import ClientError

        bucket, start = _split(uri)
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=start)
            entries = [entry for page in pages for entry in page.get("Uploads", ())]
        except ClientError:  # not allowed, or not known there: a lifecycle rule can do it
            return []
        return [Upload(e["Key"][len(start) :], e["UploadId"], e["Initiated"].timestamp()) for e in entries]

    def abort(self, uri: str, upload: Upload) -> None:
        bucket, start = _split(uri)
        with self._refused(uri), self._explained(join(uri, upload.name)):
            self._client.abort_multipart_upload(Bucket=bucket, Key=start + upload.name, UploadId=upload.id)


def _split(uri: str) -> tuple[str, str]:
    """Bucket, and what the keys below begin with."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, f"{key}/"


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextlib.contextmanager
def _told(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{uri}: {error.strerror} ({error.filename}); check the permissions") from error
