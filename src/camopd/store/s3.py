"""S3 and what speaks like it: the one place where a client is made."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from s3transfer.exceptions import RetriesExceededError
from s3transfer.manager import TransferManager
from s3transfer.subscribers import BaseSubscriber

from camopd.errors import MissingError, StoreError
from camopd.store.local import content_of, explained
from camopd.store.manifest import MANIFEST, FileInfo, Manifest
from camopd.store.sweeper import S3Sweeper
from camopd.store.uris import join

_log = logging.getLogger(__name__)

_ATTEMPTS = 8  # of one request, the first included
_STREAM_ATTEMPTS = 4  # of reading a response that breaks off, which botocore does not repeat
# Without "classic" boto3 may hand transfers to the CRT on some machines, which ignores the settings made here.
_TRANSFER = TransferConfig(preferred_transfer_client="classic")
# CopyObject takes 5 GB at most and answers when all is done; above this size parts are copied side by side (UploadPartCopy).
_COPY = TransferConfig(multipart_threshold=1 << 30, multipart_chunksize=256 << 20, preferred_transfer_client="classic")

_SENTENCES = {
    ("NoSuchBucket",): "there is no bucket {bucket} at {endpoint}; create it, or correct its name or AWS_ENDPOINT_URL_S3",
    ("NoSuchKey", "404"): "there is no such object at {endpoint}",
    ("AccessDenied", "403"): "missing or no permission at {endpoint}; check its spelling, and that these credentials may read,"
    " write and list there (s3:GetObject, s3:PutObject, s3:ListBucket)",
    ("InvalidAccessKeyId",): "the access key is not known at {endpoint}; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL_S3",
    ("SignatureDoesNotMatch",): "the secret does not belong to the access key at {endpoint}; check AWS_SECRET_ACCESS_KEY",
    ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidToken", "TokenRefreshRequired"): "the credentials have"
    " expired; get new ones (a fixed AWS_SESSION_TOKEN is never renewed, a role or web identity is by itself)",
    ("RequestTimeTooSkewed",): "this machine's clock is wrong; set it",
    ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"): "the bucket {bucket}"
    " lies in another region than {region}; set AWS_DEFAULT_REGION",
    ("SlowDown", "InternalError", "ServiceUnavailable", "500", "502", "503", "504"): "{endpoint} is overloaded or failing, also"
    " after several attempts; try again later",
    ("MissingContentLength", "411"): "{endpoint} takes no checksums; set AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ("400",): "{endpoint} refused without a reason; most often the credentials have expired, or AWS_DEFAULT_REGION is wrong",
    ("PreconditionFailed", "ConditionalRequestConflict", "412"): "another run writes it at the same moment; start again",
}
_REASONS = {code: sentence for codes, sentence in _SENTENCES.items() for code in codes}


def s3_client() -> Any:
    """The product's one way to an S3 client. Settings come from boto3's own variables and files, and one more:

    - AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL: the server, where it is not Amazon's.
    - S3_ADDRESSING_STYLE: ``path``, ``virtual`` or ``auto``. Default: ``path`` for a server of one's own.
    - AWS_REQUEST_CHECKSUM_CALCULATION, AWS_RESPONSE_CHECKSUM_VALIDATION: ``when_required`` or ``when_supported``. Default:
      ``when_required`` for a server of one's own, since many refuse the trailers of ``when_supported`` (boto3#4398).
    - AWS_DEFAULT_REGION, AWS_REGION: default us-east-1.
    - AWS_MAX_ATTEMPTS: attempts of one request, default 8, with boto3's standard retry mode.

    Credentials are left to boto3's provider chain, so that those of a role or a web identity are renewed in long transfers.

    Raises:
        StoreError: a setting is wrong.
    """
    style = os.environ.get("S3_ADDRESSING_STYLE")
    if style not in (None, "path", "virtual", "auto"):
        raise StoreError(f"S3_ADDRESSING_STYLE is {style!r}; write path, virtual or auto")
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", str(_ATTEMPTS))
    if not attempts.isdigit() or int(attempts) < 1:
        raise StoreError(f"AWS_MAX_ATTEMPTS is {attempts!r}; write a whole number from 1 on")
    config = Config(
        retries={"mode": "standard", "total_max_attempts": int(attempts)},
        connect_timeout=5,  # seconds: with 8 attempts an address where nobody answers is known within two minutes
        s3={"addressing_style": style} if style else None,
    )
    try:
        session = boto3.Session()
        region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
        client = session.client("s3", region_name=region, config=config)
        if _is_amazon(client.meta.endpoint_url):
            return client
        careful = Config(
            request_checksum_calculation=os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
            response_checksum_validation=os.environ.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required"),
            s3={"addressing_style": style or "path"},
        )
        return session.client("s3", region_name=region, config=config.merge(careful))
    except (BotoCoreError, ValueError) as error:
        fix = "check AWS_ENDPOINT_URL_S3 (http://host:port) and the other AWS_ variables"
        raise StoreError(f"the S3 settings are wrong: {_failure(error, 'the store')}; {fix}") from error


def _is_amazon(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return re.search(r"(^|\.)amazonaws\.(com|com\.cn|eu)$", host) is not None


class S3Backend:
    """Prefixes of buckets. It needs s3:GetObject, s3:PutObject and s3:ListBucket, and no right to delete.

    With s3:DeleteObject training removes what it kept for its own restart; without it that stays and takes up space.
    With s3:AbortMultipartUpload and s3:ListBucketMultipartUploads it also frees the parts that failed and killed uploads left.

    Args:
        client: a boto3 client; none means ``s3_client()``.
    """

    def __init__(self, client: Any = None) -> None:
        self._client = client or s3_client()
        self._guard_is_weak = False

    def stat(self, uri: str) -> FileInfo | None:
        with self._explained(uri):
            try:
                head = self._client.head_object(**_address(uri))
            except ClientError as error:
                if _status(error) == 404:
                    return None
                raise
        return FileInfo(uri.rpartition("/")[2], head["ContentLength"], etag=head.get("ETag", "").strip('"'))

    def list(self, uri: str) -> Sequence[FileInfo]:
        address = _address(uri + "/")  # the slash keeps domain-ab/ out of domain-a
        start, found = len(address["Key"]), list[FileInfo]()
        with self._explained(uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=address["Bucket"], Prefix=address["Key"])
            for entry in (entry for page in pages for entry in page.get("Contents", ())):
                name = entry["Key"][start:]
                is_marker = name == "" or name.endswith("/")  # an empty object that consoles make to show a folder
                is_hidden = any(part.startswith(".") for part in name.split("/"))
                if not (is_marker or is_hidden or name == MANIFEST):
                    found.append(FileInfo(name, entry["Size"], etag=entry.get("ETag", "").strip('"')))
        return sorted(found, key=lambda file: file.name)

    def read(self, uri: str, start: int = 0, length: int | None = None) -> bytes:
        end = "" if length is None else str(start + length - 1)
        span = {"Range": f"bytes={start}-{end}"} if start or end else {}
        with self._explained(uri):
            for attempt in range(1, _STREAM_ATTEMPTS + 1):
                try:
                    return self._client.get_object(**_address(uri), **span)["Body"].read()
                except ClientError as error:
                    if _status(error) == 416:  # the file ends before ``start``
                        return b""
                    raise
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    if attempt == _STREAM_ATTEMPTS:
                        raise
        raise AssertionError("the loop returns or raises")

    def write(self, uri: str, data: bytes, *, if_absent: bool = False) -> bool:
        with self._explained(uri):
            if not if_absent:
                self._client.put_object(**_address(uri), Body=data)
                return True
            try:
                self._client.put_object(**_address(uri), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _status(error) == 501:
                    return self._write_after_look(uri, data)
                if _status(error) != 412:
                    raise
                # A repeated request finds there what the first one wrote when only its answer was lost.
                return error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0 and self.read(uri) == data
            return True

    def _write_after_look(self, uri: str, data: bytes) -> bool:
        """For servers without If-None-Match."""
        if not self._guard_is_weak:
            self._guard_is_weak = True
            _log.warning(
                "%s has no If-None-Match: two runs that write the same prefix at the same moment are not told apart there",
                self._client.meta.endpoint_url,
            )
        if self.stat(uri) is not None:
            return False
        return self.write(uri, data)

    def download(self, targets: Mapping[str, Path], stop: threading.Event | None = None) -> Generator[str]:
        subscribers = [] if stop is None else [_Stopper(stop)]
        with create_transfer_manager(self._client, _TRANSFER) as manager:
            coming = []
            for uri, path in targets.items():
                address = _address(uri)
                coming.append(manager.download(address["Bucket"], address["Key"], str(path), subscribers=subscribers))
            for (uri, path), future in zip(targets.items(), coming, strict=True):
                with explained(str(path)), self._explained(uri):
                    future.result()
                yield uri

    def take(self, source: str, target: str, path: Path) -> bool:
        there = self.stat(source)
        if there is None:
            raise MissingError(f"{source}: there is no such object at {self._client.meta.endpoint_url}")
        with self._explained(source):
            try:
                place = _address(target)
                self._client.copy(_address(source), place["Bucket"], place["Key"], Config=_COPY)
                copy = self.stat(target)
                if copy is not None and copy.size == there.size:
                    return True  # else a server that does not know the header has written an empty object
            except ClientError as error:
                if _status(error) != 501:
                    raise
        _log.info("%s copies nothing by itself: %s comes by way of this machine", self._client.meta.endpoint_url, source)
        for _ in self.download({source: path}):
            pass
        return False

    @contextlib.contextmanager
    def sending(self, folder: Path, uri: str) -> Iterator[Uploads]:
        with create_transfer_manager(self._client, _TRANSFER) as manager:  # cancels what is under way when an error passes
            yield Uploads(self, manager, folder, uri)

    def publish(self, folder: Path, uri: str, shared: Sequence[Path] = ()) -> bool:
        place, manifest, files = join(uri, MANIFEST), (folder / MANIFEST).read_bytes(), content_of(folder)
        if self.write(place, manifest, if_absent=True):
            for name, path in files:
                if path.stat().st_size >= _TRANSFER.multipart_threshold:
                    self._abort_uploads(join(uri, name))
            return True
        ours, theirs = Manifest.from_json(manifest), Manifest.from_json(self.read(place))
        if ours is None or theirs is None or ours.content_id != theirs.content_id:
            raise StoreError(f"{uri} was written by two runs at once, with different content; remove it and start one of them")
        return False

    def remove(self, uri: str) -> bool:
        address = _address(uri)
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=address["Bucket"], Prefix=address["Key"] + "/")
        with self._explained(uri):
            below = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
            below.sort(key=lambda key: key.rpartition("/")[2] != MANIFEST)
            try:
                for key in (address["Key"], *below):  # one by one: some servers want a checksum of a deletion of many
                    self._client.delete_object(Bucket=address["Bucket"], Key=key)
            except ClientError as error:
                if _status(error) == 403:
                    return False
                raise
        return True

    def sweeper(self) -> S3Sweeper:
        return S3Sweeper(self._client, self._explained)

    def finish_upload(self, future: Any, path: Path, uri: str) -> None:
        """Wait for an upload. A failed one was aborted by the transfer manager, so that no parts stay behind."""
        with self._explained(uri):
            future.result()
        size, there = path.stat().st_size, self.stat(uri)
        if there is None or there.size != size:
            raise StoreError(f"{uri} has {there.size if there else 'no'} bytes after the upload of {size}; start again")

    def _abort_uploads(self, uri: str) -> None:
        """Free the parts that killed attempts left: the object is finished, so nobody needs them."""
        address = _address(uri)
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=address["Bucket"], Prefix=address["Key"]
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", ())):
                if upload["Key"] == address["Key"]:
                    self._client.abort_multipart_upload(**address, UploadId=upload["UploadId"])
        except ClientError as error:
            _log.info("%s: parts of killed uploads were not looked for (%s); a lifecycle rule can", uri, _code(error))

    @contextlib.contextmanager
    def _explained(self, uri: str) -> Iterator[None]:
        """Turn the errors of boto3 into sentences about the location."""
        meta = self._client.meta
        known = {"bucket": _address(uri)["Bucket"], "endpoint": meta.endpoint_url, "region": meta.region_name}
        try:
            yield
        except ClientError as error:
            is_missing = _status(error) == 404 and _code(error) != "NoSuchBucket"
            raise (MissingError if is_missing else StoreError)(f"{uri}: {_refusal(error, known)}") from error
        except (BotoCoreError, RetriesExceededError) as error:
            raise StoreError(f"{uri}: {_failure(error, meta.endpoint_url)}") from error


class Uploads:
    """Files of a folder on their way to a prefix, in parts where they are large."""

    def __init__(self, backend: S3Backend, manager: TransferManager, folder: Path, uri: str) -> None:
        self._backend, self._manager, self._folder, self._uri = backend, manager, folder, uri
        self._under_way: dict[Path, Any] = {}
        self._is_finished: bool | None = None  # by another run, when our first file was there to be sent

    def add(self, path: Path) -> None:
        if self._is_finished is None:
            self._is_finished = self._backend.stat(join(self._uri, MANIFEST)) is not None
        if not self._is_finished and path not in self._under_way:
            address = _address(self._at(path))
            self._under_way[path] = self._manager.upload(str(path), address["Bucket"], address["Key"])

    def wait(self) -> bool:
        try:
            for path, future in self._under_way.items():
                self._backend.finish_upload(future, path, self._at(path))
        except StoreError:
            if self._backend.stat(join(self._uri, MANIFEST)) is None:
                raise
            # Another run has finished the prefix, and aborted what was under way: `publish` compares.
        return not self._is_finished

    def _at(self, path: Path) -> str:
        return join(self._uri, path.relative_to(self._folder).as_posix())


class _Stopper(BaseSubscriber):
    """Cancels a transfer between two of its pieces once the event is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def on_progress(self, future: Any, bytes_transferred: int, **kwargs: Any) -> None:
        if self._stop.is_set():
            future.cancel()


def _refusal(error: ClientError, known: Mapping[str, str]) -> str:
    """What the server's answer means."""
    if sentence := _REASONS.get(_code(error)):
        return sentence.format(**known)
    return f"{known['endpoint']} refused: {_code(error)} {error.response['Error'].get('Message', '')}"


def _failure(error: Exception, endpoint: str) -> str:
    """What it means that there was no answer."""
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
        return f"{error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the role of the pod"
    if isinstance(error, SSLError):
        advice = "set AWS_CA_BUNDLE to its authority's certificate, and S3_ADDRESSING_STYLE=path for a bucket with dots"
        return f"the certificate of {endpoint} is not trusted; {advice}"
    if isinstance(error, (NoConnectionError, HTTPClientError, RetriesExceededError)):
        return f"{endpoint} does not answer; check AWS_ENDPOINT_URL_S3 and the network ({error})"
    return str(error)


def _code(error: ClientError) -> str:
    return error.response["Error"]["Code"]


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _address(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}
