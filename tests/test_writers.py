"""One prefix by several writers that share nothing but the store, in a folder and on a real S3 server; what is removed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from camopd import failures
from camopd.errors import InputError, Problem, StoreError, UnhealthyRunError, WorkerError
from camopd.group import Group
from camopd.store import MANIFEST, Manifest, Store, join
from tests.fixtures.s3 import S3Server


def in_threads(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """What each of several writers returns, or the error that it meets; they meet at a key-value store as processes do."""
    board, found = dist.HashStore(), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(Group(rank, size, timeout=10, _board=board))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def produce(uri: str, caches: Path, group: Group, inputs: dict[str, str] | None = None) -> Manifest:
    """A file of each writer's own, the last one first."""

    def write(folder: Path) -> dict[str, Any]:
        time.sleep(0.02 * (group.size - group.rank))
        (folder / "parts").mkdir()
        (folder / "parts" / f"{group.rank}.txt").write_text(f"by {group.rank}")
        return {"rank": group.rank}

    store = Store(cache=caches / str(group.rank))
    return store.produce(uri, stage="train", config={}, inputs=inputs or {}, write=write, writers=group)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_prefix")


def test_words_reach_all_in_order_and_a_thread_has_its_own(tmp_path) -> None:
    def talk(group: Group) -> list[Any]:
        apart, beside = group.apart(), []
        thread = threading.Thread(target=lambda: beside.extend(apart.gather({"beside": group.rank})))
        thread.start()
        first = group.gather(group.rank)
        thread.join()
        return [first, group.gather([group.rank]), beside]

    for said in in_threads(3, talk):
        assert said == [[0, 1, 2], [[0], [1], [2]], [{"beside": 0}, {"beside": 1}, {"beside": 2}]]
    assert Group().gather("alone") == ["alone"]


def test_who_waits_in_vain_says_for_whom() -> None:
    group = Group(0, 2, timeout=0.05, _board=dist.HashStore())
    with pytest.raises(WorkerError, match="process 1 of 2 waited 0 s for process 2"):
        group.gather(None)


def test_several_writers_make_one_prefix(place, tmp_path) -> None:
    uri = join(place, "checkpoint")
    made = in_threads(3, lambda group: produce(uri, tmp_path, group))
    assert made[0] == made[1] == made[2]
    assert [file.name for file in made[0].files] == ["parts/0.txt", "parts/1.txt", "parts/2.txt"]
    assert made[0].metrics == {"rank": 0}
    store = Store(cache=tmp_path / "reader")
    assert not store.verify(uri, deep=True)
    assert [(store.fetch(uri) / file.name).read_text() for file in made[0].files] == ["by 0", "by 1", "by 2"]
    assert in_threads(2, lambda group: produce(uri, tmp_path, group)) == [made[0]] * 2, "what is finished is not made again"
    refused = in_threads(2, lambda group: produce(uri, tmp_path, group, {"student": "another"}))
    assert all(isinstance(error, StoreError) and "inputs.student" in str(error) for error in refused)


def test_the_same_files_by_one_writer_are_the_same_content(place, tmp_path) -> None:
    def all_of_them(folder: Path) -> dict[str, Any]:
        (folder / "parts").mkdir()
        for rank in range(2):
            (folder / "parts" / f"{rank}.txt").write_text(f"by {rank}")
        return {}

    made = in_threads(2, lambda group: produce(join(place, "several"), tmp_path, group))[0]
    alone = Store().produce(join(place, "one"), stage="train", config={}, inputs={}, write=all_of_them)
    assert made.content_id == alone.content_id


def test_what_an_attempt_of_one_writer_left_is_not_fetched(place, tmp_path) -> None:
    """In a folder it is gone, since a folder is fetched as it lies; an object stays, and only what the manifest names comes."""
    uri, store = join(place, "checkpoint"), Store(cache=tmp_path / "reader")
    store.write(join(uri, "model.safetensors"), b"by a killed one")
    store.write(join(uri, "parts/2.txt"), b"by a killed third")
    made = in_threads(2, lambda group: produce(uri, tmp_path, group))[0]
    fetched = store.fetch(uri)
    names = {path.relative_to(fetched).as_posix() for path in fetched.rglob("*") if path.is_file()}
    assert names == {"parts/0.txt", "parts/1.txt", MANIFEST}
    assert {file.name for file in made.files} == names - {MANIFEST}


def test_a_part_that_another_machine_keeps_to_itself_is_said(tmp_path) -> None:
    store, folder = Store(), tmp_path / "own"
    folder.mkdir()
    with pytest.raises(
        StoreError, match="is not visible here; processes of several machines need a folder that all of them see"
    ):
        store._local.publish(folder, str(tmp_path / "x"), [tmp_path / "elsewhere"])
    assert not (tmp_path / "x").exists()


def test_a_prefix_is_removed_with_all_below_it_and_nothing_beside(place, tmp_path) -> None:
    store = Store(cache=tmp_path / "reader")
    for name in ("partial", "partial-b"):
        in_threads(2, lambda group, name=name: produce(join(place, name, "0001"), tmp_path, group))
    store.write(join(place, "note.json"), b"{}")
    assert store.remove(join(place, "partial"))
    assert store.remove(join(place, "note.json"))
    assert store.manifest(join(place, "partial", "0001")) is None
    assert store.stat(join(place, "note.json")) is None
    assert not store.list(join(place, "partial"))
    assert not store.verify(join(place, "partial-b", "0001"), deep=True)
    assert store.remove(join(place, "partial")), "twice does no harm"


@pytest.mark.slow
def test_without_the_right_to_delete_what_is_left_counts_for_nothing(s3_server: S3Server, s3_prefix, monkeypatch) -> None:
    """A failure's record is emptied; refused with 403 as by a policy without s3:DeleteObject."""
    from botocore.exceptions import ClientError

    store = Store()
    failures.leave_failure(s3_prefix, UnhealthyRunError("it drifts"), rank=1, size=2, store=store)
    client = store._backend(s3_prefix)._client

    def refuse(**_: Any) -> None:
        response = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(response, "DeleteObject")

    monkeypatch.setattr(client, "delete_object", refuse)
    assert not store.remove(failures.failure_uri(s3_prefix))
    assert isinstance(failures.failure_of(s3_prefix, store), UnhealthyRunError)
    failures.forget_failure(s3_prefix, store)
    assert failures.failure_of(s3_prefix, store) is None


# --- Why a training failed ------------------------------------------------------------------------------------------------


def test_the_first_sentence_of_ours_is_kept_in_its_class(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(failures, "PATIENCE", 0.05)
    uri, store = str(tmp_path / "rounds" / "0001"), Store()
    assert failures.failure_of(uri, store) is None
    problem = Problem("train.x", "is wrong", "mend it")
    fault = threading.Thread(target=lambda: failures.leave_failure(uri, KeyError("a secret"), rank=0, size=2, store=store))
    fault.start()
    failures.leave_failure(uri, InputError([problem]), rank=1, size=2, store=store)
    fault.join()
    found = failures.failure_of(uri, store)
    assert isinstance(found, InputError)
    assert found.problems == (problem,)
    record = json.loads(store.read(failures.failure_uri(uri)))
    assert (record["type"], record["rank"]) == ("InputError", 1)
    failures.forget_failure(uri, store)
    assert store.stat(failures.failure_uri(uri)) is None

    failures.leave_failure(uri, KeyError("a secret"), rank=0, size=2, store=store)
    found = failures.failure_of(uri, store)
    assert isinstance(found, WorkerError)
    assert str(found) == "process 1 of 2 failed: KeyError, see its trace in the log of this step"
    assert b"secret" not in store.read(failures.failure_uri(uri))
    assert not list(tmp_path.rglob(MANIFEST))
