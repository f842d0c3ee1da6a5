"""Copies of a finished prefix's files: by links, by the S3 server itself, and through this machine where that cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from camopd.errors import DamagedError, MissingError
from camopd.store import Copies, Manifest, Store, content_id_of, join
from camopd.store import s3 as s3_module
from tests.fixtures.s3 import S3Server
from tests.fixtures.s3_gateway import Answer, Gateway, Request, gateway_to

LARGE = os.urandom(1 << 20) * 12  # bytes: in parts of 5 MiB, the least that S3 takes, three of them
FILES = {"model.safetensors": LARGE, "tokenizer.json": b"{}", "trainer/optimizer.safetensors": b"moments"}
NAMES = {"model.safetensors": "model.safetensors", "components/tokenizer/tokenizer.json": "tokenizer.json"}


def trained(store: Store, uri: str) -> Manifest:
    def write(folder: Path) -> dict[str, float]:
        for name, data in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        return {}

    return store.produce(uri, stage="train", config={}, inputs={}, write=write, keep=False)


def released(store: Store, source: str, uri: str) -> Manifest:
    def write(folder: Path) -> dict[str, float]:
        (folder / "README.md").write_text("# Card\n")
        return {}

    return store.produce(uri, stage="promote", config={}, inputs={}, write=write, copies=Copies(source, NAMES))


def check(store: Store, source: str, uri: str, made: Manifest) -> None:
    assert [file.name for file in made.files] == ["README.md", "components/tokenizer/tokenizer.json", "model.safetensors"]
    known = {file.name: file.sha256 for file in store.require(source).files}
    assert {file.name: file.sha256 for file in made.files if file.name in NAMES} == {n: known[s] for n, s in NAMES.items()}
    assert made.content_id == content_id_of(made.files)
    assert store.verify(uri, deep=True) == []
    assert {file.name for file in store.list(uri)} == {file.name for file in made.files}
    assert released(store, source, uri) == made  # once


def test_on_a_disk_a_copy_takes_no_room(tmp_path: Path) -> None:
    store, source, uri = Store(), str(tmp_path / "train"), str(tmp_path / "release" / "model")
    trained(store, source)
    check(store, source, uri, released(store, source, uri))
    both = [Path(place, "model.safetensors") for place in (source, uri)]
    assert both[0].samefile(both[1])
    store.remove(source)
    assert both[1].read_bytes() == LARGE
    assert store.verify(uri, deep=True) == []


def test_where_nothing_can_be_linked_bytes_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError("the file system has no links")

    store, source, uri = Store(), str(tmp_path / "train"), str(tmp_path / "model")
    trained(store, source)
    link = os.link
    monkeypatch.setattr(os, "link", lambda a, b, **k: no_links() if "train" in str(a) else link(a, b, **k))
    check(store, source, uri, released(store, source, uri))
    assert not Path(source, "model.safetensors").samefile(Path(uri, "model.safetensors"))


@pytest.mark.parametrize("harm", ["changed", "short", "missing"])
def test_a_damaged_source_makes_no_prefix(harm: str, tmp_path: Path) -> None:
    store, source, uri = Store(), str(tmp_path / "train"), str(tmp_path / "model")
    trained(store, source)
    weights = Path(source, "model.safetensors")
    weights.unlink()
    if harm != "missing":
        weights.write_bytes(LARGE[::-1] if harm == "changed" else LARGE[:-1])
    with pytest.raises(MissingError if harm == "missing" else DamagedError, match=r"model\.safetensors"):
        released(store, source, uri)
    assert store.manifest(uri) is None
    weights.write_bytes(LARGE)
    check(store, source, uri, released(store, source, uri))


# --- S3 -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gateway(s3_server: S3Server, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with gateway_to(s3_server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.endpoint)
        yield running


def copied(gateway: Gateway) -> list[Request]:
    return [request for request in gateway.requests if "x-amz-copy-source" in request.headers]


def sent(gateway: Gateway, name: str) -> list[Request]:
    """Requests that carry a file's bytes to the server."""
    is_put = [request for request in gateway.requests if request.method == "PUT" and f"/release/{name}" in request.path]
    return [request for request in is_put if "x-amz-copy-source" not in request.headers]


@pytest.mark.slow
def test_the_server_copies_by_itself(gateway: Gateway, s3_prefix: str) -> None:
    store, source, uri = Store(), join(s3_prefix, "train"), join(s3_prefix, "release")
    trained(store, source)
    made = released(store, source, uri)
    assert len(copied(gateway)) == 2
    assert not sent(gateway, "model.safetensors")
    check(store, source, uri, made)


@pytest.mark.slow
def test_a_large_file_is_copied_in_parts(gateway: Gateway, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = s3_module.TransferConfig(multipart_threshold=6 << 20, multipart_chunksize=5 << 20)
    monkeypatch.setattr(s3_module, "_COPY", parts)
    store, source, uri = Store(), join(s3_prefix, "train"), join(s3_prefix, "release")
    trained(store, source)
    made = released(store, source, uri)
    assert sorted(r.query["partNumber"] for r in copied(gateway) if r.is_part) == [["1"], ["2"], ["3"]]
    check(store, source, uri, made)


def refuse(request: Request) -> Answer | None:
    return Answer.error(501, "NotImplemented") if "x-amz-copy-source" in request.headers else None


def ignore(request: Request) -> Answer | None:
    """A server that does not know the header takes the request for an empty object."""
    request.headers.pop("x-amz-copy-source", None)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("habit", [refuse, ignore])
def test_a_server_that_copies_nothing(habit, gateway: Gateway, s3_prefix: str) -> None:
    gateway.before = habit
    store, source, uri = Store(), join(s3_prefix, "train"), join(s3_prefix, "release")
    trained(store, source)
    made = released(store, source, uri)
    assert sent(gateway, "model.safetensors")
    check(store, source, uri, made)


@pytest.mark.slow
def test_a_source_that_has_changed_makes_no_prefix_on_s3(s3_prefix: str) -> None:
    store, source, uri = Store(), join(s3_prefix, "train"), join(s3_prefix, "release")
    trained(store, source)
    store.write(join(source, "tokenizer.json"), b"[]")
    with pytest.raises(DamagedError, match=r"train/tokenizer\.json"):
        released(store, source, uri)
    assert store.manifest(uri) is None
