"""The books: by hand, and that a run's parts are counted once, whoever did them."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from camopd import plan as layout
from camopd import runtime
from camopd.attempts import attempt
from camopd.ledger import Line, Part, as_numbers, in_words, ledger, parts_of
from camopd.runtime import accelerators, together
from camopd.shards import Shard, joined_rates, shard_uri
from camopd.store import FileInfo, Manifest, Store, join
from camopd.tracking import logbook
from tests.finished import make_evaluation, make_plan, make_round, make_run, produce

H100 = {"count": 8, "name": "NVIDIA H100"}


def made(stage: str, seconds: float, *, waited: float = 0.0, size: int = 0, gpus: Mapping[str, Any] = {}, **metrics: Any):
    files = (FileInfo("a", size),) if size else ()
    return Manifest(stage, "sha256:x", files, metrics=metrics, seconds=seconds, seconds_waited=waited, resources=gpus)


def test_the_books_by_hand() -> None:
    """Two rounds: 100 s and 60 s of sampling on 8 GPUs, 20 s of which failed once; 40 s of training on 4; selection on none."""
    four = {"count": 4, "name": "NVIDIA H100"}
    parts = [
        Part("train", made("train", 40.0, size=9000, gpus=four, tokens=600, tokens_per_second=20.0)),
        Part("rollout", made("rollout", 100.0, waited=10.0, size=500, gpus=H100, tokens=1000, engine_seconds=80.0), 20.0),
        Part("rollout", made("rollout", 60.0, waited=6.0, size=300, gpus=H100, tokens=800, engine_seconds=40.0)),
        Part("select", made("select", 2.0, size=40)),
    ]
    assert ledger(parts) == [
        Line("rollout", 160.0, 1280.0, 20.0, 160.0, 0.1, 1800, 15.0, 800),
        Line("select", 2.0, 0.0, 0.0, 0.0, 0.0, None, None, 40),
        Line("train", 40.0, 160.0, 0.0, 0.0, 0.0, 600, 20.0, 9000),
        Line("total", 202.0, 1440.0, 20.0, 160.0, round(16 / 202, 4), None, None, 9840),
    ]
    assert ledger([]) == []
    assert as_numbers(ledger(parts))["select"] == {
        "seconds": 2.0,
        "gpu_seconds": 0.0,
        "failed_seconds": 0.0,
        "failed_gpu_seconds": 0.0,
        "waiting": 0.0,
        "bytes": 40,
    }
    assert in_words(ledger(parts)[-1]) == "0.40 GPU-hours, 3 min at work, and 20 s in attempts that failed, 0.0 MB written"


def test_shards_count_with_their_own_pods_and_are_not_needed_any_more() -> None:
    """Three shards of 30, 50 and 40 s on 8 GPUs each, joined in 4 s on a pod without any; a shard failed for 6 s."""
    shards = [
        made("rollout", s, waited=w, size=b, gpus=H100, engine_seconds=s / 2)
        for s, w, b in ((30, 3, 7), (50, 0, 8), (40, 9, 9))
    ]
    joined = Manifest("rollout", "", (FileInfo("a", 20),), metrics={"tokens": 600, **joined_rates(600, shards)}, seconds=4.0)
    line, total = ledger([Part("rollout", joined, failed=6.2)])
    assert line.seconds == total.seconds == 124.0
    assert line.gpu_seconds == 960.0
    assert line.failed_gpu_seconds == pytest.approx(6.2 * 960 / 124)
    assert line.waiting == round(12 / 124, 4)
    assert line.tokens_per_second == 10.0
    assert line.bytes == 44


def test_processes_of_a_machine_share_its_gpus_and_machines_add_up() -> None:
    held = [("a", H100), ("a", H100), ("b", H100), ("c", {}), ("b", {"count": 2, "name": "NVIDIA A100"})]
    assert together(held) == {"count": 16, "name": "NVIDIA H100"}
    assert together([("a", H100), ("b", {"count": 2, "name": "NVIDIA A100"})]) == {
        "count": 10,
        "name": "NVIDIA A100, NVIDIA H100",
    }
    assert together([("a", {}), ("b", {})]) == {}


def test_accelerators_of_this_machine_are_those_that_torch_sees(monkeypatch) -> None:
    import torch

    seen = torch.cuda.device_count()
    assert accelerators("train").get("count", 0) == seen
    assert not torch.cuda.is_initialized()  # nobody could fork any more
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(runtime, "_device_name", lambda: "NVIDIA H100")
    assert accelerators("rollout") == {"count": 2, "name": "NVIDIA H100"}
    assert accelerators("select") == {}


# --- Manifests ------------------------------------------------------------------------------------------------------------


def test_without_gpus_a_manifest_is_what_it_was(tmp_path) -> None:
    store = Store()
    produce(store, str(tmp_path / "a"), "train", {"x": "1"})
    written = json.loads((tmp_path / "a" / "manifest.json").read_text())
    if not accelerators("train"):
        assert "resources" not in written
    assert Manifest.from_json(json.dumps(written | {"resources": H100})).resources == H100  # type: ignore[union-attr]


def test_resources_are_written_and_no_part_of_the_content(tmp_path, monkeypatch) -> None:
    store = Store()
    before = produce(store, str(tmp_path / "a"), "train", {"x": "1"})
    monkeypatch.setattr("camopd.store.accelerators", lambda stage: H100)
    after = produce(store, str(tmp_path / "b"), "train", {"x": "1"})
    assert after.resources == H100
    assert after.content_id == before.content_id
    assert store.require(str(tmp_path / "b")) == after


class Pair:
    """Two writers in threads of one process, on machines of different names."""

    def __init__(self, rank: int, meeting: threading.Barrier, board: dict[int, Any]) -> None:
        self.rank, self._meeting, self._board = rank, meeting, board

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._meeting.wait()
        said = [self._board[0], self._board[1]]
        self._meeting.wait()
        return said


def test_two_nodes_write_what_both_held(tmp_path, monkeypatch) -> None:
    meeting, board = threading.Barrier(2), {}
    monkeypatch.setattr("camopd.store.accelerators", lambda stage: H100)
    monkeypatch.setattr("camopd.store.platform.node", lambda: threading.current_thread().name)

    def work(rank: int) -> None:
        def write(folder: Path) -> Mapping[str, Any]:
            (folder / f"part-{rank}").write_text(str(rank))
            return {}

        uri = str(tmp_path / "train")
        Store().produce(uri, stage="train", config={}, inputs={}, write=write, writers=Pair(rank, meeting, board))

    threads = [threading.Thread(target=work, args=(rank,), name=f"node-{rank}") for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert Store().require(str(tmp_path / "train")).resources == {"count": 16, "name": "NVIDIA H100"}


# --- A run ----------------------------------------------------------------------------------------------------------------


def test_every_prefix_of_a_run_is_counted_once(tmp_path) -> None:
    store = Store()
    plan = make_run(str(tmp_path), store)
    parts = parts_of(plan, store)
    assert parts is not None
    assert [part.stage for part in parts] == ["prepare", *(2 * ["rollout", "score", "score", "select", "train"])]
    below = [path for path in Path(plan.run_uri).rglob("*") if path.is_file() and path.name != "manifest.json"]
    own = [path for path in below if path.parent != Path(plan.run_uri) and "evaluation" not in path.parts]
    assert ledger(parts)[-1].bytes == sum(path.stat().st_size for path in own)


def test_after_a_removal_there_are_no_books_rather_than_wrong_ones(tmp_path) -> None:
    store = Store()
    plan = make_run(str(tmp_path), store)
    assert "ledger" in [entry.key for entry in logbook.entries(plan, store)]
    shutil.rmtree(layout.rollout_uri(plan.rounds[0]))
    assert parts_of(plan, store) is None
    assert "ledger" not in [entry.key for entry in logbook.entries(plan, store)]


def test_what_is_told_of_the_books(tmp_path) -> None:
    store = Store()
    plan = make_plan(str(tmp_path), store)
    make_round(plan, store, 1)
    make_round(plan, store, 2)
    assert "ledger" not in [entry.key for entry in logbook.entries(plan, store)]  # not before the end
    make_evaluation(plan, store)
    (entry,) = (entry for entry in logbook.entries(plan, store) if entry.key == "ledger")
    facts = entry.facts()
    points = {point.name: (point.value, point.step) for point in facts.points}
    assert points["ledger/total/gpu_seconds"] == (0.0, 2)
    assert {name.split("/")[1] for name in points} == {"prepare", "rollout", "score", "select", "train", "evaluate", "total"}
    assert json.loads(facts.files["ledger.json"])["train"]["bytes"] == points["ledger/train/bytes"][0]


def test_attempts_that_failed_are_told_apart_from_those_that_did_it(tmp_path) -> None:
    store = Store()
    plan = make_plan(str(tmp_path), store)
    round_uri = plan.rounds[0]
    for uri in (layout.rollout_uri(round_uri), shard_uri(layout.rollout_uri(round_uri), Shard(2, 3))):
        with attempt(plan.run_uri, "rollout", uri, store):
            time.sleep(0.1)  # and leaves no manifest
    with attempt(plan.run_uri, "rollout", layout.rollout_uri(round_uri), store):
        make_round(plan, store, 1)
    parts = parts_of(plan, store)
    assert parts is not None
    (line,) = (line for line in ledger(parts) if line.stage == "rollout")
    assert 0.2 <= line.failed_seconds < 2
    assert len(store.list(join(plan.run_uri, "failed"))) == 2
