"""What the tags of versions tell: events in order, who held the alias, moves that nobody of ours made."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.history import EVENT, Event, events, held_before, lines, now, scores, stamp
from camopd.tracking import Version

MIDNIGHT = 1_800_000_000.0


def story(*told: tuple[str, int, int | None, int | None]) -> dict[int, dict[str, str]]:
    """Tags by version, of events given as kind, version, before, after: a second apart, about the alias champion."""
    tags: dict[int, dict[str, str]] = {}
    for second, (what, version, before, after) in enumerate(told):
        event = Event(MIDNIGHT + second, what, version, "champion", before, after, by="ana", why="good")
        tags.setdefault(version, {}).update(event.tag())
    return tags


def made(tags: dict[int, dict[str, str]], **status: str) -> list[Version]:
    known = {number: {**tags.get(number, {}), "camopd.status": "promoted"} for number in range(1, max(tags) + 1)}
    for name, word in status.items():
        known[int(name.removeprefix("v"))]["camopd.status"] = word
    return [Version(number, own, MIDNIGHT) for number, own in known.items()]


def test_an_event_comes_back_from_its_tag_and_people_can_read_it() -> None:
    event = Event(MIDNIGHT + 0.25, "approved", 5, "champion", 3, 5, by="Ana Lima", why='read 50 answers, "fine"', login="alima")
    ((name, text),) = event.tag().items()
    assert name.startswith(f"{EVENT}20270115T080000.250Z-")
    assert json.loads(text) == {
        "what": "approved",
        "at": "2027-01-15T08:00:00.250Z",
        "alias": "champion",
        "from": 3,
        "to": 5,
        "by": "Ana Lima",
        "why": 'read 50 answers, "fine"',
        "login": "alima",
    }
    assert events([Version(5, {name: text})]) == [event]


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"what": "approved"}', '{"at": "yesterday"}', "null"])
def test_a_tag_that_somebody_broke_tells_nothing(text: str) -> None:
    assert events([Version(1, {f"{EVENT}x": text})]) == []


def test_two_at_the_same_moment_both_stay() -> None:
    event = Event(MIDNIGHT, "approved", 5, "champion", 3, 5)
    assert len(event.tag() | event.tag()) == 2


def test_time_goes_on_whatever_the_clock_says() -> None:
    ahead = time.time() + 3600
    assert now([Version(1, Event(ahead, "promoted", 1, "champion", None, 1).tag())]) > ahead
    assert abs(now([]) - time.time()) < 5
    assert stamp(now([])).endswith("Z")


def test_the_alias_goes_back_the_way_it_came() -> None:
    tags = story(("promoted", 1, None, 1), ("promoted", 3, 1, 3), ("approved", 2, 3, 2))
    assert held_before(made(tags), "champion", 2) == [3, 1]  # not the number below
    assert held_before(made(tags, v3="rolled-back"), "champion", 2) == [1]
    assert held_before(made(tags), "other", 2) == []
    assert held_before([v for v in made(tags) if v.number != 3], "champion", 2) == [1]  # deleted


def test_a_version_that_was_promoted_before_there_were_events_counts() -> None:
    old = [Version(n, {"camopd.status": "promoted", "camopd.alias": "champion"}, MIDNIGHT + n) for n in (1, 2)]
    assert held_before(old, "champion", 2) == [1]
    assert [(e.what, e.version, e.at) for e in events(old)] == [("promoted", 1, MIDNIGHT + 1), ("promoted", 2, MIDNIGHT + 2)]


def test_whoever_held_it_before_the_first_of_ours_counts_too() -> None:
    foreign = Version(1, {})
    ours = made(story(("promoted", 2, 1, 2)))[1]
    assert held_before([foreign, ours], "champion", 2) == [1]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_rolling_back_never_comes_to_the_same_version_twice(path: list[int]) -> None:
    """Whatever the alias went through, going back again and again ends, at versions that held it."""
    moves = [("promoted", after, before, after) for before, after in zip([None, *path], path, strict=False)]
    tags, current, seen = story(*moves), path[-1], {path[-1]}
    tags.setdefault(5, {})
    left: dict[str, str] = {}
    while earlier := held_before(made(tags, **left), "champion", current):
        left[f"v{current}"] = "rolled-back"
        current = earlier[0]
        assert current in path
        assert current not in seen
        seen.add(current)
    assert seen == set(path)


def test_moves_that_nobody_told_of_are_seen_where_they_can_be() -> None:
    tags = story(("promoted", 1, None, 1), ("promoted", 2, 1, 2), ("promoted", 4, 3, 4))
    told = [
        (line.event.what, line.event.before, line.event.after) for line in lines(made(tags, v3="superseded"), {"champion": 2})
    ]
    assert told == [
        ("promoted", None, 1),
        ("promoted", 1, 2),
        ("moved outside", 2, 3),
        ("promoted", 3, 4),
        ("moved outside", 4, 2),
    ]
    assert [line.event.what for line in lines(made(tags, v3="superseded"), {"champion": 4})].count("moved outside") == 1
    assert lines(made(story(("promoted", 1, None, 1))), {"champion": None})[-1].event.after is None


def test_the_candidate_s_alias_goes_with_the_decision() -> None:
    waits = Event(MIDNIGHT, "candidate", 2, "candidate", None, 2)
    approved = Event(MIDNIGHT + 1, "approved", 2, "champion", 1, 2)
    versions = [Version(1, {}), Version(2, {**waits.tag(), **approved.tag()})]
    assert [line.event.what for line in lines(versions, {"candidate": None, "champion": 2})] == ["candidate", "approved"]


def test_the_evidence_is_what_has_an_interval() -> None:
    tags = {"camopd.score.recovered_general": "0.61", "camopd.score.passed": "1", "camopd.score.retained_domain": "0.9"}
    tags |= {"camopd.score.recovered_general_low": "0.55", "camopd.score.recovered_general_high": "0.7"}
    assert scores(tags) == {"recovered_general": (0.61, 0.55, 0.7)}
    event = Event(MIDNIGHT, "promoted", 1, "champion", None, 1, by="run")
    (line,) = lines([Version(1, {**event.tag(), **tags, "camopd.report": "s3://b/report.html"})], {})
    assert line.record()["scores"] == {"recovered_general": (0.61, 0.55, 0.7)}
    assert (line.record()["at"], line.report) == ("2027-01-15T08:00:00.000Z", "s3://b/report.html")
