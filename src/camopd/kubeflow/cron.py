"""When a cron line of Kubeflow Pipelines fires: the grammar of robfig/cron 1.2, which its API server and scheduler use. Pure.

Six fields, seconds first: second, minute, hour, day of the month, month, day of the week (0 to 6 from Sunday, or names). It
also takes five fields, but as the first five of the six, so that a crontab's line means something else: refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

YEARS = 5  # after which robfig/cron gives up looking
FORM = "six fields: second minute hour day month weekday, such as 0 0 2 * * * for 02:00 each day"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTHS = {name: number for number, name in enumerate(_MONTHS, 1)}
WEEKDAYS = {name: number for number, name in enumerate(_WEEKDAYS)}
FIELDS: tuple[tuple[str, int, int, Mapping[str, int]], ...] = (
    ("second", 0, 59, {}),
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day", 1, 31, {}),
    ("month", 1, 12, MONTHS),
    ("weekday", 0, 6, WEEKDAYS),
)
DESCRIPTORS = {
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *",
    "@midnight": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Cron:
    """A parsed line.

    Attributes:
        fields: allowed numbers of second, minute, hour, day, month, weekday, sorted.
        any_day: whether day or weekday was left open by a star; then both must fit, else one is enough.
        every: seconds between two times, in place of all that; 0 for none.
    """

    fields: tuple[tuple[int, ...], ...] = ()
    any_day: bool = True
    every: int = 0

    def times(self, after: datetime, zone: tzinfo = UTC) -> Iterator[datetime]:
        """The times that follow, in the scheduler's time zone. An hour that clocks skip has none, one that they repeat both."""
        if self.every:
            begun = after.astimezone(zone).replace(microsecond=0)
            yield from (begun + n * timedelta(seconds=self.every) for n in range(1, 1_000_000))
        seconds, minutes, hours, *_ = self.fields or ((), (), ())
        first = after.astimezone(zone).date()
        for day in (first + timedelta(days=n) for n in range(366 * YEARS)) if self.fields else ():
            if not self._has_day(day.day, day.month, day.isoweekday() % 7):
                continue
            for hour in hours:
                for fold in (0, 1):
                    whole = datetime(day.year, day.month, day.day, hour, tzinfo=zone, fold=fold)
                    if fold and whole.utcoffset() == whole.replace(fold=0).utcoffset():
                        continue
                    for time in (whole.replace(minute=m, second=s) for m in minutes for s in seconds):
                        exists = time.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == time.replace(tzinfo=None)
                        if exists and time.astimezone(UTC) > after.astimezone(UTC):
                            yield time

    def _has_day(self, day: int, month: int, weekday: int) -> bool:
        fits = (day in self.fields[3], weekday in self.fields[5])
        return month in self.fields[4] and (all(fits) if self.any_day else any(fits))


def parse(text: str) -> Cron:
    """Read a line. Raises ValueError with what is wrong and the right form."""
    if text.startswith("@every "):
        return Cron(every=_duration(text.removeprefix("@every ")))
    if text.startswith("@") and text not in DESCRIPTORS:
        raise ValueError(f"{text!r} is not known; write one of {', '.join(DESCRIPTORS)}, @every 12h, or {FORM}")
    parts = DESCRIPTORS.get(text, text).split()
    if len(parts) == 5:
        raise ValueError(
            f"{text!r} has five fields, and Kubeflow counts them from the seconds: for a crontab's line write "
            f"{'0 ' + ' '.join(parts)!r}"
        )
    if len(parts) != 6:
        raise ValueError(f"{text!r} has {len(parts)} fields; write {FORM}")
    read = [_field(part, *field) for part, field in zip(parts, FIELDS, strict=True)]
    cron = Cron(tuple(tuple(sorted(numbers)) for numbers, _ in read), any_day=read[3][1] or read[5][1])
    if next(cron.times(datetime(2024, 1, 1, tzinfo=UTC)), None) is None:
        raise ValueError(f"{text!r} never comes: no such day is in the calendar")
    return cron


def _field(text: str, name: str, low: int, high: int, names: Mapping[str, int]) -> tuple[set[int], bool]:
    """The numbers that a field allows, and whether a star was in it."""
    numbers, star = set[int](), False
    for part in text.split(","):
        body, slash, step = part.partition("/")
        start, hyphen, end = body.partition("-")
        if body in ("*", "?"):
            first, last, star = low, high, True
        else:
            first = _number(start, name, part, names)
            last = _number(end, name, part, names) if hyphen else high if slash else first
        if slash and not (step.isascii() and step.isdigit() and int(step)):
            raise ValueError(f"{part!r} of the field {name}: after / stands a whole number from 1 on")
        if not low <= first <= last <= high:
            raise ValueError(f"{part!r} of the field {name}: its numbers go from {low} to {high}, the smaller one first")
        numbers |= set(range(first, last + 1, int(step) if slash else 1))
    return numbers, star


def _number(text: str, name: str, part: str, names: Mapping[str, int]) -> int:
    if text.lower() in names:
        return names[text.lower()]
    if not (text.isascii() and text.isdigit()):
        known = f" or {', '.join(names)}" if names else ""
        raise ValueError(f"{part!r} of the field {name}: a number{known}, a range a-b, a list a,b, a step */n or * is expected")
    return int(text)


def _duration(text: str) -> int:
    """Seconds of Go's ``1h30m``: at least one, the rest below a second cut off."""
    parts = re.findall(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"@every {text}: a duration such as 12h or 1h30m is expected (units h, m, s)")
    return max(1, int(sum(float(number) * UNITS[unit] for number, unit in parts)))
