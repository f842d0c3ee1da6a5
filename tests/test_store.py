"""Finished prefixes on this machine: identity, resume after a kill at any point, writers at the same moment."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import camopd
from camopd.errors import MissingError, StoreError
from camopd.store import MANIFEST, FileInfo, Manifest, Store, canonical, content_id_of, digest, join
from camopd.store.local import scratch

FILES = {"weights.bin": b"\x00\x01" * 5000, "text/a b+ü.json": b"{}", "steps.json": b"[1, 2]"}


def writer(files: Mapping[str, bytes] = FILES) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return {"num_files": len(files)}

    return write


def produce(store: Store, uri: str, write: Callable[[Path], Mapping[str, Any]] | None = None, **config: Any) -> Manifest:
    return store.produce(uri, stage="select", config=config, inputs={"student": "sha256:1"}, write=write or writer())


def never(folder: Path) -> dict[str, Any]:
    raise AssertionError("the stage was done a second time")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(cache=tmp_path / "cache")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "select")


# --- Identity -------------------------------------------------------------------------------------------------------------

file_infos = st.builds(FileInfo, st.text(min_size=1, max_size=8), st.integers(0, 2**40), st.sampled_from(["", "aa", "bb"]))


@given(st.lists(file_infos, unique_by=lambda file: file.name), st.randoms(use_true_random=False))
def test_content_id_knows_no_order(files: list[FileInfo], rng: random.Random) -> None:
    shuffled = rng.sample(files, len(files))
    assert content_id_of(files) == content_id_of(shuffled)


def test_content_id_tells_names_sizes_and_bytes_apart() -> None:
    one = FileInfo("a", 1, "aa")
    others = [
        [FileInfo("b", 1, "aa")],
        [FileInfo("a", 2, "aa")],
        [FileInfo("a", 1, "bb")],
        [FileInfo("a", 1, etag="aa")],
        [one, one],
        [],
    ]
    assert len({content_id_of(files) for files in [[], [one], [one, one], *others]}) == 7


def test_digest_is_the_sha256_of_canonical_json() -> None:
    assert digest({"b": 1, "a": "é"}) == "sha256:" + hashlib.sha256('{"a":"é","b":1}'.encode()).hexdigest()


def test_digest_and_canonical_refuse_what_json_has_not() -> None:
    for function in (digest, canonical):
        with pytest.raises(ValueError, match="Out of range"):
            function({"loss": float("nan")})


def test_a_finished_prefix_and_a_plain_copy_of_its_files_have_one_identity(store: Store, uri: str, tmp_path: Path) -> None:
    manifest = produce(store, uri)
    copy = tmp_path / "copy"
    writer()(copy)
    assert store.content_id(uri) == manifest.content_id == store.content_id(str(copy))


def test_identity_of_a_model_folder_of_links_is_that_of_the_files(store: Store, tmp_path: Path) -> None:
    """As in a Hugging Face cache: snapshots/<revision>/ holds links into blobs/."""
    plain, blobs, snapshot = tmp_path / "plain", tmp_path / "blobs", tmp_path / "snapshots" / "1"
    for folder in (plain / "sub", blobs, snapshot):
        folder.mkdir(parents=True)
    for number, name in enumerate(["config.json", "sub/model.safetensors"]):
        (plain / name).write_bytes(name.encode())
        (blobs / str(number)).write_bytes(name.encode())
    (snapshot / "config.json").symlink_to("../../blobs/0")
    (snapshot / "sub").symlink_to(plain / "sub")
    (tmp_path / "model").symlink_to(snapshot)
    (snapshot / "loop").symlink_to(snapshot)
    (plain / ".gitattributes").write_text("hidden")
    (plain / ".cache").mkdir()
    (plain / ".cache" / "lock").write_text("hidden")
    assert [file.name for file in store.list(str(plain))] == ["config.json", "sub/model.safetensors"]
    ids = {store.content_id(str(place)) for place in (plain, snapshot, tmp_path / "model")}
    assert len(ids) == 1


def test_a_link_that_leads_nowhere_is_missing(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(MissingError, match=r"model\.safetensors"):
        store.content_id(str(tmp_path / "model"))


def test_a_file_has_an_identity_too(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("{}")
    before = store.content_id(str(path))
    path.write_text("[]")
    assert before != store.content_id(str(path))
    assert store.fetch(str(path)) == path


@pytest.mark.parametrize("method", ["fetch", "content_id", "read"])
def test_what_is_not_there_is_said_to_be_missing(store: Store, tmp_path: Path, method: str) -> None:
    (tmp_path / "file").touch()
    for name in ("nothing", "file/below"):
        with pytest.raises(MissingError, match=name):
            getattr(store, method)(str(tmp_path / name))


# --- produce --------------------------------------------------------------------------------------------------------------


def test_produce_writes_the_files_and_then_what_they_are(store: Store, uri: str) -> None:
    manifest = produce(store, uri, top_k=8)
    assert {name: store.read(join(uri, name)) for name in FILES} == FILES
    assert manifest == store.require(uri)
    assert manifest.files == tuple(FileInfo(n, len(FILES[n]), hashlib.sha256(FILES[n]).hexdigest()) for n in sorted(FILES))
    assert (manifest.config, manifest.inputs, manifest.metrics) == ({"top_k": 8}, {"student": "sha256:1"}, {"num_files": 3})
    assert store.verify(uri, deep=True) == []
    assert [path.name for path in Path(uri).parent.iterdir()] == ["select"]


def test_files_of_a_prefix_may_be_read_by_other_users(store: Store, uri: str) -> None:
    produce(store, uri)
    store.write(join(uri, "../recipe.json"), b"{}")
    umask = os.umask(0)
    os.umask(umask)
    for path in [Path(uri), *Path(uri).rglob("*"), Path(uri).parent / "recipe.json"]:
        wanted = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == wanted & ~umask, path


def test_a_finished_stage_is_never_done_twice(store: Store, uri: str) -> None:
    first = produce(store, uri, rate=1e-6, shape=(1, 2))
    assert produce(store, uri, never, rate=1e-6, shape=(1, 2)) == first


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"stage": "score"}, "another stage"),
        ({"config": {"top_k": 9, "beta": 1}}, r"another config\.beta, config\.top_k"),
        ({"config": {"student": "sha256:1"}, "inputs": {}}, r"another config\.student, config\.top_k, inputs\.student"),
        ({"inputs": {"student": "sha256:2"}}, r"another inputs\.student"),
    ],
)
def test_another_wish_for_the_same_prefix_is_refused(store: Store, uri: str, changed: dict[str, Any], words: str) -> None:
    made: dict[str, Any] = {"stage": "select", "config": {"top_k": 8}, "inputs": {"student": "sha256:1"}}
    store.produce(uri, **made, write=writer())
    with pytest.raises(StoreError, match=words):
        store.produce(uri, **{**made, **changed}, write=never)
    assert store.verify(uri, deep=True) == []


def test_a_stage_that_fails_leaves_nothing(store: Store, uri: str) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_bytes(b"1")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        produce(store, uri, fail)
    assert list(Path(uri).parent.iterdir()) == []


def test_what_a_killed_attempt_left_of_a_prefix_is_gone_when_the_next_finishes(store: Store, uri: str) -> None:
    """transformers loads model.safetensors where it lies, whatever the index beside it says."""
    for name in ("weights.bin", "model.safetensors", "text/stray.txt", "steps.json.d/x"):
        store.write(join(uri, name), b"from an attempt that was killed")
    with pytest.raises(StoreError, match="is not finished"):
        store.require(uri)
    produce(store, uri)
    assert store.verify(uri, deep=True) == []
    assert [file.name for file in store.list(uri)] == sorted(FILES)
    assert store.content_id(uri) == content_id_of(store.require(uri).files)


def test_a_leftover_file_stands_in_no_folder_s_way(store: Store, uri: str) -> None:
    store.write(join(uri, "text"), b"from an attempt that was killed")
    produce(store, uri)
    assert [file.name for file in store.list(uri)] == sorted(FILES)


def test_what_an_unfinished_prefix_holds_of_others_is_left_alone(store: Store, uri: str, tmp_path: Path) -> None:
    """Hidden names, a finished prefix below it, and what a link leads to."""
    store.write(join(uri, ".cache/blob"), b"1")
    store.write(join(uri, ".stray"), b"2")
    inner = produce(store, join(uri, "text", "inner"))
    store.write(str(tmp_path / "elsewhere" / "model.safetensors"), b"3")
    (Path(uri) / "link").symlink_to(tmp_path / "elsewhere")
    (Path(uri) / "stray").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    produce(store, uri)
    assert store.read(join(uri, ".cache/blob")) + store.read(join(uri, ".stray")) == b"12"
    assert store.require(join(uri, "text", "inner")) == inner
    assert store.verify(join(uri, "text", "inner"), deep=True) == []
    assert store.read(str(tmp_path / "elsewhere" / "model.safetensors")) == b"3"
    assert not (Path(uri) / "stray").is_symlink()


def test_nothing_of_a_finished_prefix_is_removed(store: Store, uri: str) -> None:
    """Two attempts with other file names: who comes second finds it finished and removes nothing."""
    barrier = Barrier(2)

    def attempt(number: int) -> Manifest:
        def write(folder: Path) -> dict[str, Any]:
            result = writer({f"{number}-{i}.bin": b"1" for i in range(20)})(folder)
            barrier.wait()
            return result

        return produce(store, uri, write)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(attempt, [1, 2])
    assert first == second == store.require(uri)
    assert store.verify(uri, deep=True) == []
    store.write(join(uri, "note.txt"), b"put here later")
    produce(store, uri, never)
    assert store.read(join(uri, "note.txt")) == b"put here later"


def test_links_that_a_stage_makes_become_files(store: Store, uri: str, tmp_path: Path) -> None:
    outside = tmp_path / "tokenizer.json"
    outside.write_bytes(b"{}")

    def link(folder: Path) -> dict[str, Any]:
        (folder / "tokenizer.json").symlink_to(outside)
        return {}

    produce(store, uri, link)
    outside.write_bytes(b"[]")
    assert store.verify(uri, deep=True) == []


def test_another_file_system_is_no_obstacle(store: Store, tmp_path: Path) -> None:
    """The prefix is a link to a folder elsewhere, so the scratch folder beside it cannot be renamed into it."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        (tmp_path / "select").symlink_to(folder)
        produce(store, str(tmp_path / "select"))
        assert store.verify(str(tmp_path / "select"), deep=True) == []
        assert sorted(os.listdir(folder)) == sorted([MANIFEST, "steps.json", "text", "weights.bin"])


def test_foreign_manifests_are_content_of_nobody_and_never_overwritten(store: Store, tmp_path: Path) -> None:
    writer()(tmp_path / "model")
    before = store.content_id(str(tmp_path / "model"))
    (tmp_path / "model" / MANIFEST).write_text('{"name": "a web app"}')
    assert store.manifest(str(tmp_path / "model")) is None
    assert store.content_id(str(tmp_path / "model")) == before
    with pytest.raises(StoreError, match="not written by a stage of ours"):
        produce(store, str(tmp_path / "model"), never)


@pytest.mark.parametrize("text", ['{"stage": "tra', '{"stage": 1, "content_id": 2, "files": [{"path": "x"}]}', "\udcff"])
def test_a_broken_manifest_is_an_error_and_not_an_unfinished_prefix(store: Store, uri: str, text: str) -> None:
    store.write(join(uri, MANIFEST), text.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match="is broken"):
        produce(store, uri, never)


def test_damage_to_a_finished_prefix_is_noticed(store: Store, uri: str) -> None:
    produce(store, uri)
    weights = Path(uri) / "weights.bin"
    weights.write_bytes(b"\x01" * weights.stat().st_size)
    assert store.verify(uri) == []
    assert store.verify(uri, deep=True) == [f"{uri}/weights.bin has another sha256 than its manifest says"]
    weights.write_bytes(b"short")
    (Path(uri) / "steps.json").unlink()
    with pytest.raises(StoreError, match=r"steps\.json is missing.*has 5 bytes, its manifest says 10000"):
        store.fetch(uri)


def test_write_if_absent_keeps_the_first(store: Store, tmp_path: Path) -> None:
    place = str(tmp_path / "stop.json")
    assert store.write(place, b"1", if_absent=True)
    assert not store.write(place, b"2", if_absent=True)
    assert store.read(place) == b"1"
    assert store.write(place, b"3")
    assert store.read(place, 0, 1) == b"3"
    assert store.read(place, 1) == b""
    assert [path.name for path in tmp_path.iterdir()] == ["stop.json"]


def test_a_place_that_cannot_be_written_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file"):
        produce(store, str(tmp_path / "file" / "select"), never)


# --- Kills and races ------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
from camopd.store import Store

uri, cache, fatal, files, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4]), 0

def count(event, args):
    # Each event that touches the disk is a moment at which the process may die.
    global steps
    if event in ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.copyfile"):
        steps += 1
        if steps == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

def write(folder):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {}

store = Store(cache=cache)
sys.addaudithook(count)
store.produce(uri, stage="select", config={}, inputs={"student": "sha256:1"}, write=write)
"""


def run_child(uri: str, cache: Path, fatal: int) -> int:
    command = [sys.executable, "-c", CHILD, uri, str(cache), str(fatal), repr(FILES)]
    return subprocess.run(command, check=False).returncode


@pytest.mark.slow
def test_killed_at_any_point_and_started_again_gives_the_same_content(store: Store, tmp_path: Path) -> None:
    parts = {"part-1.bin": b"\x00", "part-2.bin": b"\x01"}  # what the next attempt writes where it has more processes
    fatal, kills = 1, 0
    while True:
        uri = str(tmp_path / f"killed-{fatal}" / "select")
        code = run_child(uri, tmp_path / "cache", fatal)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        was_finished = store.manifest(uri) is not None
        assert not was_finished or store.verify(uri, deep=True) == []
        files = FILES if was_finished or kills % 2 else parts
        assert [file.name for file in produce(store, uri, writer(files)).files] == sorted(files)
        assert [file.name for file in store.list(uri)] == sorted(files)
        assert store.verify(uri, deep=True) == []
        if not was_finished:  # then the scratch folder of the dead is gone, too
            assert os.listdir(Path(uri).parent) == ["select"]
        fatal += 2
    assert kills > 10


def test_the_scratch_folder_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    with scratch(tmp_path) as first, scratch(tmp_path) as second:
        assert first.is_dir()
        assert second.is_dir()
        assert first != second
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_give_one_result_even_when_their_content_differs(store: Store, uri: str) -> None:
    barrier = Barrier(2)

    def attempt(number: int) -> Manifest:
        def write(folder: Path) -> dict[str, Any]:
            result = writer({f"{i}.bin": bytes([number]) * 1000 for i in range(20)})(folder)
            barrier.wait()
            return result

        return produce(store, uri, write)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(attempt, [1, 2])
    assert first == second == store.require(uri)
    assert store.verify(uri, deep=True) == []
    assert len({store.read(join(uri, f"{i}.bin")) for i in range(20)}) == 1


def test_a_manifest_reads_back_as_it_was_written(uri: str, store: Store) -> None:
    manifest = produce(store, uri)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json())["files"][0].keys() == {"name", "size", "sha256"}


def test_only_one_file_makes_s3_clients_and_local_work_does_not_load_it() -> None:
    package = Path(camopd.__file__).parent
    pattern = re.compile(r"import boto3$|boto3\.(client|resource|session|Session)", re.MULTILINE)
    assert [path.name for path in package.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))] == ["s3.py"]
    check = "import sys, camopd.store; camopd.store.Store().manifest('/nowhere'); sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
