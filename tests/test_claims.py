"""Claims: of all who want a model at once one gets it, on a disk and on a real S3 server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from camopd import claims
from camopd.claims import CLAIM_HOURS, Claim, holder, release, renew, take
from camopd.store import Store, digest, join


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path) -> str:
    output = str(tmp_path / "runs") if request.param == "disk" else request.getfixturevalue("s3_prefix")
    return claims.claims_uri(output, digest("model"))


def numbers(place: str) -> list[int]:
    return [int(file.name.removesuffix(".json")) for file in Store().list(place)]


def age(place: str, number: int, hours: float) -> None:
    """Let the holder of a claim have been silent for so long."""
    uri = join(place, f"{number:06d}.json")
    record = json.loads(Store().read(uri))
    Store().write(uri, json.dumps({**record, "renewed": record["renewed"] - 3600 * hours}).encode())


def all_at_once(place: str, jobs: list[str]) -> list[Claim | None]:
    """What each of several processes of their own would be told, started together."""
    stores, together = [Store() for _ in jobs], Barrier(len(jobs))

    def want(job: str, store: Store) -> Claim | None:
        store.list(place)  # a connection, so that none is late
        together.wait()
        return take(place, job, store)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(want, jobs, stores))


def test_of_many_at_once_one_has_the_model_and_the_others_are_told_who(place: str) -> None:
    jobs = [f"job-{number}" for number in range(8)]
    for turn in range(3):
        told = dict(zip(jobs, all_at_once(place, jobs), strict=True))
        (winner,) = (job for job, other in told.items() if other is None)
        assert {other.job for other in told.values() if other is not None} == {winner}
        assert numbers(place) == list(range(1, turn + 2)), "no loser has written anything"
        current = holder(place, Store())
        assert current is not None
        assert current.job == winner
        release(place, winner, Store())
        assert holder(place, Store()) is None


def test_of_many_who_find_a_dead_claim_one_takes_it_over(place: str) -> None:
    assert take(place, "killed", Store()) is None
    age(place, 1, CLAIM_HOURS - 0.1)
    other = take(place, "early", Store())
    assert other is not None
    assert other.job == "killed"
    age(place, 1, 0.2)
    jobs = [f"job-{number}" for number in range(8)]
    told = all_at_once(place, jobs)
    assert sum(other is None for other in told) == 1
    assert numbers(place) == [1, 2]


def test_a_run_that_says_so_in_time_keeps_the_model(place: str) -> None:
    take(place, "a", Store())
    age(place, 1, CLAIM_HOURS - 0.1)
    renew(place, "a", Store())
    age(place, 1, 1.0)
    assert take(place, "b", Store()) is not None
    assert numbers(place) == [1]


def test_who_starts_a_run_by_hand_takes_over_and_is_told_of_the_other(place: str) -> None:
    take(place, "scheduled", Store())
    other = take(place, "by-hand", Store(), by_hand=True)
    assert other is not None
    assert other.job == "scheduled"
    renew(place, "scheduled", Store())  # it goes on, and does not fight
    release(place, "scheduled", Store())
    current = holder(place, Store())
    assert current is not None
    assert current.job == "by-hand"
    release(place, "by-hand", Store())
    renew(place, "scheduled", Store())  # still at work when the other has ended
    current = holder(place, Store())
    assert current is not None
    assert current.job == "scheduled"
    assert numbers(place) == [1, 2, 3]


def test_what_was_given_back_is_given_back_once(place: str) -> None:
    take(place, "a", Store())
    release(place, "a", Store())
    release(place, "a", Store())
    release(place, "nobody", Store())
    assert take(place, "b", Store()) is None
    release(place, "a", Store())
    assert holder(place, Store()) is not None
