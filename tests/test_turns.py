"""One at a time, by tags alone: numbers are drawn, the dead are passed by, and processes that race never meet inside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from camopd.tracking import OutageError, Registry, Version, turns
from camopd.tracking.turns import DRAWING, TURN, Number, Turn, ahead, numbers, turn
from tests.registered import client, open_tracker


def test_smaller_numbers_go_first_then_names_and_who_draws_is_waited_for() -> None:
    own = Number(3, "camopd.turn.b", "2")
    others = [Number(1, f"camopd.turn.{name}", text) for name, text in [("a", "2"), ("c", "2"), ("d", "1"), ("e", "3")]]
    drawing = Number(2, "camopd.turn.f", DRAWING)
    assert {other.tag[-1] for other in ahead(own, [own, *others, drawing])} == {"a", "d", "f"}


def test_numbers_are_tags_among_others() -> None:
    found = numbers([Version(1, {"camopd.status": "promoted"}), Version(2, {TURN + "x": "7"})])
    assert found == [Number(2, TURN + "x", "7")]
    assert found[0].order[0] == 7


def test_a_turn_that_took_too_long_changes_nothing() -> None:
    Turn(time.monotonic() + 5).require()
    with pytest.raises(OutageError):
        Turn(time.monotonic() - 1).require()


@pytest.fixture
def opened(mlflow_server: str) -> Callable[[], Registry]:
    """The registry of a model with two versions, by a client of its own at each call."""
    name = f"model-{uuid4().hex}"
    mlflow = client(mlflow_server)
    mlflow.create_registered_model(name)
    for _ in range(2):
        mlflow.create_model_version(name, "s3://bucket/weights", await_creation_for=0)

    def make() -> Registry:
        registry = open_tracker(mlflow_server).registry(name)
        assert registry is not None
        return registry

    return make


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(2))
def test_nobody_meets_inside(repetition: int, opened: Callable[[], Registry]) -> None:
    inside, most, passed, lock = 0, 0, 0, threading.Lock()

    def work(number: int) -> None:
        nonlocal inside, most, passed
        registry = opened()
        for _ in range(2):
            with turn(registry, 1 + number % 2) as mine:
                mine.require()
                with lock:
                    inside, passed = inside + 1, passed + 1
                    most = max(most, inside)
                registry.tag(1, {"somebody.is": str(number)})
                assert registry.versions()[0].tags["somebody.is"] == str(number)
                with lock:
                    inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (most, passed) == (1, 8)
    assert numbers(opened().versions()) == []


@pytest.mark.slow
@pytest.mark.parametrize("left", ["1", DRAWING])
def test_a_dead_process_is_waited_for_once(left: str, opened: Callable[[], Registry], monkeypatch: Any) -> None:
    monkeypatch.setattr(turns, "DEAD_SECONDS", 0.5)
    registry = opened()
    registry.tag(2, {TURN + "dead": left})
    begun = time.monotonic()
    with turn(registry, 1):
        assert 0.5 < time.monotonic() - begun < 5
    assert numbers(registry.versions()) == []


@pytest.mark.slow
def test_those_who_wait_are_not_taken_for_dead(opened: Callable[[], Registry], monkeypatch: Any) -> None:
    """The one in front is: the second waits for as long as the third watches it."""
    monkeypatch.setattr(turns, "DEAD_SECONDS", 1.0)
    registry = opened()
    registry.tag(2, {TURN + "dead": "1"})
    order: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.3 * number)
        with turn(opened(), 1):
            order.append(number)
            time.sleep(0.6)  # less than what is taken for dead
            order.append(number)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert order == [0, 0, 1, 1, 2, 2]
