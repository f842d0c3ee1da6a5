"""Cron lines as KFP's API server and scheduler take them (robfig/cron 1.2): hand-worked times, and the server of the tests."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from itertools import islice
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.kubeflow.cron import parse
from tests.fixtures.kfp_rules import check_cron

THURSDAY = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)


def times(text: str, after: datetime = THURSDAY, zone: str = "UTC", count: int = 3) -> list[str]:
    return [f"{at:%m-%d %H:%M:%S}" for at in islice(parse(text).times(after, ZoneInfo(zone)), count)]


@pytest.mark.parametrize(
    ("text", "next_times"),
    [
        ("0 0 2 * * *", ["11-27 02:00:00", "11-28 02:00:00", "11-29 02:00:00"]),
        ("0 0 2 * * ?", ["11-27 02:00:00", "11-28 02:00:00", "11-29 02:00:00"]),
        ("30 0/20 12 * * *", ["11-26 12:00:30", "11-26 12:20:30", "11-26 12:40:30"]),
        ("0 0 12 * * *", ["11-27 12:00:00", "11-28 12:00:00", "11-29 12:00:00"]),
        ("0 0 6,18 * * mon-fri", ["11-26 18:00:00", "11-27 06:00:00", "11-27 18:00:00"]),
        ("0 30 4 * * SUN", ["11-29 04:30:00", "12-06 04:30:00", "12-13 04:30:00"]),
        ("0 0 0 31 * *", ["12-31 00:00:00", "01-31 00:00:00", "03-31 00:00:00"]),
        ("0 0 0 29 feb *", ["02-29 00:00:00"]),  # 2028; the next is beyond five years
        ("0 0 0 1 * 5", ["11-27 00:00:00", "12-01 00:00:00", "12-04 00:00:00"]),  # neither is a star: one is enough
        ("0 0 0 */10 * 5", ["12-11 00:00:00", "01-01 00:00:00", "05-21 00:00:00"]),  # a star in one: both must fit
        ("@daily", ["11-27 00:00:00", "11-28 00:00:00", "11-29 00:00:00"]),
        ("@weekly", ["11-29 00:00:00", "12-06 00:00:00", "12-13 00:00:00"]),
        ("@every 1h30m", ["11-26 13:30:00", "11-26 15:00:00", "11-26 16:30:00"]),
        ("@every 1.5s", ["11-26 12:00:01", "11-26 12:00:02", "11-26 12:00:03"]),
    ],
)
def test_the_next_times(text: str, next_times: list[str]) -> None:
    assert times(text) == next_times
    check_cron(text)


def test_an_hour_that_clocks_skip_has_no_time_and_one_that_they_repeat_has_two() -> None:
    """In Berlin at 2027-03-28 two o'clock is followed by three, at 2027-10-31 two o'clock comes again."""
    before = datetime(2027, 3, 27, 12, tzinfo=UTC)
    assert times("0 30 2 * * *", before, "Europe/Berlin", 2) == ["03-29 02:30:00", "03-30 02:30:00"]
    found = list(islice(parse("0 30 2 * * *").times(datetime(2027, 10, 30, 12, tzinfo=UTC), ZoneInfo("Europe/Berlin")), 3))
    assert [f"{at.astimezone(UTC):%m-%d %H:%M}" for at in found] == ["10-31 00:30", "10-31 01:30", "11-01 01:30"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 2 * * *", "counts them from the seconds: for a crontab's line write '0 0 2 * * *'"),
        ("0 0 2 * *  * 2026", "has 7 fields; write six fields"),
        ("", "has 0 fields"),
        ("TZ=Europe/Berlin 0 0 2 * * *", "has 7 fields"),
        ("60 0 0 * * *", "'60' of the field second: its numbers go from 0 to 59"),
        ("0 0 24 * * *", "the field hour"),
        ("0 0 0 0 * *", "'0' of the field day: its numbers go from 1 to 31"),
        ("0 0 0 * * 7", "'7' of the field weekday: its numbers go from 0 to 6"),
        ("0 0 0 * * fri-mon", "the smaller one first"),
        ("0 0 0 * * noon", "a number or sun, mon"),
        ("0 */0 0 * * *", "a whole number from 1 on"),
        ("0 1/2/3 0 * * *", "a whole number from 1 on"),
        ("0 1,,2 0 * * *", "a number, a range"),
        ("0 0 0 L * *", "a number, a range"),
        ("0 0 0 30 2 *", "never comes"),
        ("@reboot", "'@reboot' is not known; write one of @yearly"),
        ("@every day", "a duration such as 12h"),
    ],
)
def test_what_is_refused_says_what_is_right(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(text)


@given(
    st.lists(
        st.sampled_from(["*", "?", "0", "1", "5-7", "3/4", "*/2", "mon", "feb", "31", "1,2", "7", "x", "-", ""]), max_size=7
    )
)
def test_what_passes_here_passes_there(fields: list[str]) -> None:
    text = " ".join(fields)
    try:
        parse(text)
    except ValueError:
        return
    check_cron(text)
