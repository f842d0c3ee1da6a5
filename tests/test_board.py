"""The live display: from progress lines to a sentence and a time."""

import json
from typing import Any

import pytest
from rich.console import Console

from camopd.board import Board, Tail, clock
from camopd.progress import Progress


def line(stage: str, number: int, done: int, at: float, *, branch="", total=10, speed=0.0) -> dict[str, Any]:
    place = {"stage": stage, "round": number, "rounds": 4, "branch": branch}
    return {**place, "done": done, "total": total, "unit": "samples", "tokens_per_second": speed, "time": at}


def board_after(*lines: dict[str, Any]) -> Board:
    board = Board(num_rounds=4)
    for each in lines:
        board.update(each)
    return board


def test_branches_that_score_side_by_side_are_shown_together():
    board = board_after(
        line("rollout", 2, 10, 0.0),
        line("score", 2, 3, 1.0, branch="general", speed=100.0),
        line("score", 2, 0, 1.1, branch="domain"),
        line("score", 2, 6, 2.0, branch="general", speed=150.0),
        line("score", 2, 4, 2.1, branch="domain", speed=1000.0),
    )
    assert board.sentence() == "round 2/4  score  general 6/10 samples, domain 4/10 samples  1,150 tokens/s"


def test_shards_that_sample_side_by_side_are_shown_together():
    board = board_after(
        line("rollout", 2, 3, 1.0, branch="all branches, shard 1 of 2"),
        line("rollout", 2, 5, 1.1, branch="all branches, shard 2 of 2"),
        line("rollout", 2, 10, 2.0, branch="all branches, shard 1 of 2"),
    )
    assert "shard 1 of 2 10/10 samples, all branches, shard 2 of 2 5/10 samples" in board.sentence()
    assert not board.finished()


def test_another_stage_replaces_what_was_shown():
    board = board_after(line("score", 2, 3, 1.0, branch="general"), line("train", 2, 1, 2.0, branch="domain"))
    assert board.sentence() == "round 2/4  train  domain 1/10 samples"


def test_time_left_is_the_mean_of_finished_rounds():
    board = board_after(line("prepare", 0, 10, 1.0), line("rollout", 1, 0, 10.0))
    assert board.seconds_left(12.0) is None
    board.update(line("rollout", 2, 0, 30.0))  # round 1 took 20 s
    board.update(line("rollout", 3, 0, 40.0))  # round 2 took 10 s: 15 s each
    assert board.seconds_left(44.0) == pytest.approx((15 - 4) + 15)
    assert board.seconds_left(99.0) == pytest.approx(0 + 15), "a slow round is not counted below zero"
    assert board.rounds_done() == 2


def test_a_resumed_run_counts_only_rounds_that_it_saw():
    board = board_after(line("rollout", 3, 0, 100.0), line("rollout", 4, 0, 107.0))
    assert board.rounds_done() == 3
    assert board.seconds_left(109.0) == pytest.approx(5.0)


def test_time_left_in_the_evaluation_is_by_its_own_speed():
    board = board_after(line("train", 4, 10, 50.0), line("evaluate", 0, 0, 60.0, total=40))
    assert board.seconds_left(61.0) is None
    board.update(line("evaluate", 0, 10, 65.0, total=40))
    assert board.seconds_left(66.0) == pytest.approx(15 - 1)
    assert board.times(70.0, 66.0) == "elapsed 1:10, about 0:14 left in the evaluation"


def test_the_picture_fits_a_narrow_terminal():
    board = board_after(line("rollout", 2, 5, 1.0, branch="all branches", speed=1234.5))
    console = Console(width=80, record=True, force_terminal=True)
    console.print(board.picture(65.0, 2.0))
    text = console.export_text()
    assert "round 2/4  rollout  all branches 5/10 samples  1,234 tokens/s" in text
    assert "elapsed 1:05, time left not known yet" in text


def test_before_the_first_line_there_is_something_to_show():
    assert Board(num_rounds=4).sentence() == "starting"
    assert Board(num_rounds=4).seconds_left(1.0) is None


def test_the_tail_reads_what_the_stages_write(tmp_path, monkeypatch):
    path = tmp_path / "progress.jsonl"
    tail = Tail(path)
    assert list(tail.read()) == []
    monkeypatch.setenv("CAMOPD_PROGRESS", str(path))
    progress = Progress("score", total=2, unit="samples", round_number=1, num_rounds=4, branch="general")
    progress.advance(2, tokens=7)
    first, last = tail.read()
    assert (first["done"], last["done"], last["branch"]) == (0, 2, "general")
    assert board_after(first, last).sentence().startswith("round 1/4  score  general 2/2 samples")
    assert list(tail.read()) == []


def test_half_a_line_waits_for_its_end(tmp_path):
    path = tmp_path / "progress.jsonl"
    text = json.dumps(line("train", 1, 1, 0.0)) + "\n"
    path.write_text(text + text[:20])
    tail = Tail(path)
    assert len(list(tail.read())) == 1
    path.write_text(text + text)
    assert len(list(tail.read())) == 1


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (-3, "0:00"), (59.6, "1:00"), (125, "2:05"), (3601, "60:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text
