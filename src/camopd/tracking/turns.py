"""Whose turn it is to change a registered model: one process at a time, although the registry has neither lock nor swap.

What it has is tags, each written and read whole. That is enough for Lamport's bakery (CACM 17(8), 1974): say that you draw a
number, draw one above all that are there, and wait for those who draw and for the smaller numbers. A tag is on the version that
its holder is about; it goes with the turn. What a killed process leaves is removed by whoever has watched it for long enough.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from camopd.errors import TrackingError
from camopd.tracking import OutageError, Registry, Version

TURN = "camopd.turn."  # + a name that nobody else has
DRAWING = "drawing"
DEAD_SECONDS = 60.0  # a number that is watched for so long is nobody's any more
HOLD_SECONDS = 30.0  # after that its holder begins no further change; a request takes 10 at most
PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Number:
    """A drawn number, or one that is being drawn."""

    version: int
    tag: str
    text: str

    @property
    def order(self) -> tuple[int, str]:
        """Smaller ones go first; equal numbers, drawn at one moment, by name. Those that draw go before everybody."""
        return (int(self.text) if self.text.isdigit() else 0, self.tag)


@dataclass(frozen=True)
class Turn:
    """The right to change the model, for a while."""

    ends: float

    def require(self) -> None:
        """Raises OutageError when others may take the holder for dead: the server was too slow."""
        if time.monotonic() > self.ends:
            raise OutageError(f"the registry took more than {HOLD_SECONDS:.0f} s over a few requests")


def numbers(versions: Iterable[Version]) -> list[Number]:
    """The numbers that are out, of all versions of a model."""
    return [
        Number(version.number, tag, text) for version in versions for tag, text in version.tags.items() if tag.startswith(TURN)
    ]


def ahead(own: Number, drawn: Iterable[Number]) -> set[Number]:
    """Those that go first."""
    return {other for other in drawn if other.tag != own.tag and other.order < own.order}


@contextlib.contextmanager
def turn(registry: Registry, version: int) -> Iterator[Turn]:
    """Wait until nobody else is at work on the model, and keep others waiting for the time of the block.

    Args:
        registry: the model.
        version: the one that the change is about.

    Raises:
        TrackingError: the server did not answer, or refused; nobody waits for long then.
    """
    tag = TURN + secrets.token_hex(4)
    begun = time.monotonic()
    try:
        registry.tag(version, {tag: DRAWING})
        own = Number(version, tag, str(1 + max((number.order[0] for number in numbers(registry.versions())), default=0)))
        registry.tag(version, {tag: own.text})
        Turn(begun + HOLD_SECONDS).require()  # else others may have gone on without us
        _wait(registry, own)
        yield Turn(time.monotonic() + HOLD_SECONDS)
    finally:
        with contextlib.suppress(TrackingError):  # then it is dead after a while
            registry.untag(version, tag)


def _wait(registry: Registry, own: Number) -> None:
    first, since = own, time.monotonic()
    while others := ahead(own, numbers(registry.versions())):
        if (head := min(others, key=lambda other: other.order)) != first:  # those behind it wait, too, and say nothing
            first, since = head, time.monotonic()
        if time.monotonic() - since > DEAD_SECONDS:
            registry.untag(head.version, head.tag)
        time.sleep(PAUSE_SECONDS)
