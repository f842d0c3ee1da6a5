"""Transfers beside the work: what comes before it is asked for, what goes while more is written, and how they fail and stop."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from camopd.errors import StoreError
from camopd.store import Manifest, Store, join
from camopd.store.prefetch import Prefetcher
from tests.fixtures.s3 import BUCKET, S3Server
from tests.fixtures.s3_gateway import Answer, Gateway, Request, gateway_to

pytestmark = pytest.mark.slow

LARGE = os.urandom(20 << 20)  # bytes: goes in several parts
PATIENCE = 20.0  # seconds


@pytest.fixture
def gateway(s3_server: S3Server, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with gateway_to(s3_server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.endpoint)
        yield running


def produce(uri: str, files: dict[str, bytes], tmp_path: Path) -> Manifest:
    """On another machine, so that nothing of it is in this one's cache."""

    def write(folder: Path) -> dict[str, Any]:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return {}

    return Store(cache=tmp_path / "elsewhere").produce(uri, stage="train", config={}, inputs={}, write=write)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def is_body(request: Request, name: str) -> bool:
    return request.method in ("GET", "PUT") and request.path.partition("?")[0].endswith(name)


def seen(gateway: Gateway, method: str, name: str) -> int:
    return sum(request.method == method and is_body(request, name) for request in gateway.requests)


def open_uploads(server: S3Server, uri: str) -> list[str]:
    uploads = server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return [upload["Key"] for upload in uploads if f"s3://{BUCKET}/{upload['Key']}".startswith(uri)]


# --- What comes -----------------------------------------------------------------------------------------------------------


def test_what_was_named_is_there_when_it_is_asked_for(gateway: Gateway, s3_prefix: str, tmp_path: Path) -> None:
    for name in ("student", "teacher"):
        produce(join(s3_prefix, name), {f"{name}.bin": LARGE}, tmp_path)
    store = Store()
    for name in ("student", "teacher", "student"):
        store.prefetch(join(s3_prefix, name))
    student = store.fetch(join(s3_prefix, "student"))
    assert (student / "student.bin").read_bytes() == LARGE
    until(lambda: len(list((tmp_path / "cache").glob("*/manifest.json"))) == 2)
    asked, waited = seen(gateway, "GET", ".bin"), store.waited()
    assert (store.fetch(join(s3_prefix, "teacher")) / "teacher.bin").read_bytes() == LARGE
    assert seen(gateway, "GET", ".bin") == asked
    assert store.waited() - waited < 0.5


def test_what_fails_ahead_of_time_is_raised_where_it_is_asked_for(s3_prefix: str) -> None:
    store = Store()
    store.prefetch(join(s3_prefix, "nowhere"))
    with pytest.raises(StoreError, match="nowhere: nothing is there"):
        store.fetch(join(s3_prefix, "nowhere"))


def test_what_is_wanted_at_once_does_not_wait_for_what_was_named_before() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def get(uri: str, stop: threading.Event) -> Path:
        begun.set()
        assert go_on.wait(PATIENCE)
        return Path(uri)

    prefetcher = Prefetcher(get)
    for uri in ("a", "b"):
        prefetcher.begin(uri)
    assert begun.wait(PATIENCE)
    assert prefetcher.take("b") is None
    assert prefetcher.take("c") is None
    coming = prefetcher.take("a")
    go_on.set()
    assert coming is not None
    assert coming.result(PATIENCE) == Path("a")
    begun.clear()
    prefetcher.begin("d")
    assert begun.wait(PATIENCE), "it starts again when it had nothing to do"
    coming = prefetcher.take("d")
    assert coming is not None
    assert coming.result(PATIENCE) == Path("d")


def test_a_stage_that_fails_waits_for_no_download(gateway: Gateway, s3_prefix: str, tmp_path: Path) -> None:
    """Nor does one that is interrupted; nothing of the download is left."""
    produce(join(s3_prefix, "teacher"), {"teacher.bin": LARGE * 4}, tmp_path)
    gateway.before = lambda request: time.sleep(0.5 if is_body(request, "teacher.bin") and request.method == "GET" else 0)
    store = Store()

    def write(folder: Path) -> dict[str, Any]:
        store.prefetch(join(s3_prefix, "teacher"))
        until(lambda: seen(gateway, "GET", "teacher.bin") > 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.produce(join(s3_prefix, "rollout"), stage="rollout", config={}, inputs={}, write=write)
    until(lambda: os.listdir(tmp_path / "cache") == [])
    assert [thread for thread in threading.enumerate() if thread.name == "prefetch"] == []
    gateway.before = lambda request: None
    assert (store.fetch(join(s3_prefix, "teacher")) / "teacher.bin").stat().st_size == 4 * len(LARGE)


def test_what_was_made_here_is_not_fetched_here(gateway: Gateway, s3_prefix: str) -> None:
    store = Store()

    def write(folder: Path) -> dict[str, Any]:
        (folder / "x.bin").write_bytes(LARGE)
        return {}

    manifest = store.produce(s3_prefix, stage="train", config={}, inputs={}, write=write)
    place = store.fetch(s3_prefix)
    assert (place / "x.bin").read_bytes() == LARGE
    assert store.require(str(place)) == manifest
    assert store.fetch(join(s3_prefix, "x.bin")).read_bytes() == LARGE, "by itself it is another content"
    assert store.verify(s3_prefix, deep=True) == []


# --- What goes ------------------------------------------------------------------------------------------------------------


def test_a_finished_file_goes_up_while_the_next_one_is_written(gateway: Gateway, s3_prefix: str) -> None:
    store = Store()

    def write(folder: Path) -> dict[str, Any]:
        (folder / "first.bin").write_bytes(LARGE)
        store.send(folder / "first.bin")
        until(lambda: seen(gateway, "PUT", "first.bin") >= 2)
        (folder / "second.bin").write_bytes(b"2")
        return {}

    manifest = store.produce(s3_prefix, stage="train", config={}, inputs={}, write=write)
    assert [file.name for file in manifest.files] == ["first.bin", "second.bin"]
    assert store.verify(s3_prefix, deep=True) == []
    assert seen(gateway, "PUT", "first.bin") == 3, "20 MiB in parts of 8, once"


def test_an_upload_that_fails_fails_the_stage(
    gateway: Gateway, s3_server: S3Server, s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    refused = Answer.error(500, "InternalError")
    gateway.before = lambda request: refused if request.is_part and is_body(request, "first.bin") else None
    store = Store()

    def write(folder: Path) -> dict[str, Any]:
        (folder / "first.bin").write_bytes(LARGE)
        store.send(folder / "first.bin")
        (folder / "second.bin").write_bytes(LARGE)
        return {}

    with pytest.raises(StoreError, match=r"first\.bin: .* is overloaded or failing"):
        store.produce(s3_prefix, stage="train", config={}, inputs={}, write=write)
    assert store.manifest(s3_prefix) is None
    until(lambda: open_uploads(s3_server, s3_prefix) == [])
    assert os.listdir(tmp_path / "cache") == []


def test_an_interruption_leaves_no_upload(gateway: Gateway, s3_server: S3Server, s3_prefix: str, tmp_path: Path) -> None:
    gateway.before = lambda request: time.sleep(0.2 if request.is_part else 0)
    store = Store()

    def write(folder: Path) -> dict[str, Any]:
        (folder / "first.bin").write_bytes(LARGE)
        store.send(folder / "first.bin")
        until(lambda: open_uploads(s3_server, s3_prefix) != [])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.produce(s3_prefix, stage="train", config={}, inputs={}, write=write)
    assert open_uploads(s3_server, s3_prefix) == []
    assert store.list(s3_prefix) == []
    assert os.listdir(tmp_path / "cache") == []


def test_waiting_is_counted_and_is_no_part_of_the_content(gateway: Gateway, s3_prefix: str, tmp_path: Path) -> None:
    """0.4 s for a download and 0.4 s for an upload, in a stage that itself takes less."""
    produce(join(s3_prefix, "student"), {"student.bin": b"weights"}, tmp_path)
    delayed = {("GET", "student.bin"), ("PUT", "out.bin")}
    gateway.before = lambda request: time.sleep(
        0.4 if any(request.method == method and is_body(request, name) for method, name in delayed) else 0
    )
    store = Store()

    def write(folder: Path) -> dict[str, Any]:
        (folder / "out.bin").write_bytes(store.fetch(join(s3_prefix, "student", "student.bin")).read_bytes())
        return {"tokens": 7}

    slow = store.produce(join(s3_prefix, "slow"), stage="rollout", config={}, inputs={}, write=write)
    assert 0.8 <= slow.seconds_waited <= slow.seconds
    assert slow.metrics == {"tokens": 7}
    fast = store.produce(join(s3_prefix, "fast"), stage="rollout", config={}, inputs={}, write=write)
    assert fast.seconds_waited < slow.seconds_waited - 0.3, "the student is here by now"
    assert fast.content_id == slow.content_id
