"""What a person and a program are told."""

import json

from camopd.progress import Progress


def test_a_log_gets_lines_with_speed_and_what_is_left(capsys, monkeypatch) -> None:
    monkeypatch.delenv("CAMOPD_PROGRESS", raising=False)
    progress = Progress("recover", total=4, unit="steps", done=2, every=0.0)
    progress.advance(1, tokens=50, note="gap general 0.832")
    progress.advance(1, tokens=50, note="gap domain 0.002")
    first, middle, last = capsys.readouterr().err.splitlines()
    assert first == "recover: 2/4 steps"
    assert middle.startswith("recover: 3/4 steps, ")
    assert middle.endswith(" s left, gap general 0.832")  # one of the two that this attempt has to do
    assert last.startswith("recover: 4/4 steps, ")
    assert "left" not in last


def test_in_between_nothing_is_said(capsys, monkeypatch) -> None:
    monkeypatch.delenv("CAMOPD_PROGRESS", raising=False)
    progress = Progress("train", total=3, unit="steps", round_number=2, num_rounds=5, every=1e9)
    for _ in range(3):
        progress.advance(1, branch="general")
    assert capsys.readouterr().err.splitlines() == ["train round 2/5: 0/3 steps", "train round 2/5 general: 3/3 steps"]


def test_a_terminal_gets_one_line_that_is_written_over(capsys, monkeypatch) -> None:
    monkeypatch.delenv("CAMOPD_PROGRESS", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress("rollout", total=2, unit="samples", every=0.0)
    progress.advance(2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.count("\r\x1b[K") == 2


def test_waiting_for_the_store_is_said_where_it_is_worth_a_word(capsys, monkeypatch) -> None:
    monkeypatch.delenv("CAMOPD_PROGRESS", raising=False)
    now, waited = 100.0, 5.0
    monkeypatch.setattr("camopd.progress.time.monotonic", lambda: now)
    progress = Progress("score", total=2, unit="samples", waited=lambda: waited, every=0.0)
    now, waited = 104.0, 6.0
    progress.advance(1, tokens=40)
    now = 1100.0
    progress.advance(1, tokens=40)
    _, middle, last = capsys.readouterr().err.splitlines()
    assert middle == "score: 1/2 samples, 10 tokens/s, 25% of the time waiting for the store, 4 s left"
    assert "waiting" not in last


def test_a_program_gets_json(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CAMOPD_PROGRESS", str(tmp_path / "p.jsonl"))
    Progress("score", total=1, unit="samples", round_number=1, num_rounds=2, branch="domain").advance(1, tokens=7)
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["round"], r["rounds"], r["branch"], r["done"], r["total"]) for r in records] == [
        ("score", 1, 2, "domain", 0, 1),
        ("score", 1, 2, "domain", 1, 1),
    ]
    assert capsys.readouterr().err == ""
