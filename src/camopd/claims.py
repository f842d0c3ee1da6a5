"""Which pipeline run is at work on a model: so that no schedule starts a second one beside it.

``<output>/claims/<model>/000001.json``, a file for each claim. A store's one compare-and-swap is to write a file if it is
absent; so whoever wants the model writes the next number, and of several who try at once one does. The highest number counts.
Nothing is deleted: a claim is given back by writing so into it, and one that nobody has renewed for ``CLAIM_HOURS`` is dead.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from camopd.store import Store, join

CLAIM_HOURS = 12.0  # renewed as each round begins; Kubernetes may kill a run without its exit handler


@dataclass(frozen=True)
class Claim:
    """Who has a model, or had it.

    Attributes:
        job: id of the pipeline run.
        since: when it took the model, seconds since 1970.
        renewed: when it last said that it is at work.
        released: it has given the model back.
    """

    job: str
    since: float
    renewed: float
    released: bool = False

    def is_live(self, now: float) -> bool:
        return not self.released and now - self.renewed < CLAIM_HOURS * 3600


def claims_uri(output: str, model_id: str) -> str:
    """Prefix of the claims on the model with this content id, among the runs under one output."""
    return join(output, "claims", model_id.removeprefix("sha256:")[:16])


def take(uri: str, job: str, store: Store, *, by_hand: bool = False) -> Claim | None:
    """Claim a model for a pipeline run, or renew its claim. Returns the live claim of another run, if there is one.

    Args:
        uri: as of ``claims_uri``.
        job: id of the pipeline run.
        store: where claims lie.
        by_hand: take it from the other run, too, which goes on; else the model stays with that run.
    """
    while True:
        number, last = _last(uri, store)
        now = time.time()
        other = last if last is not None and last.is_live(now) else None
        if other is not None and other.job == job:
            _write(uri, number, Claim(job, other.since, now), store)
            return None
        if other is not None and not by_hand:
            return other
        if _write(uri, number + 1, Claim(job, now, now), store, if_absent=True):
            return other


def holder(uri: str, store: Store) -> Claim | None:
    """The claim of the run that is at work on a model now, if there is one."""
    _, last = _last(uri, store)
    return last if last is not None and last.is_live(time.time()) else None


def renew(uri: str, job: str, store: Store) -> None:
    """Say that a pipeline run is at work on a model; a claim that has died is made anew, one of another run stays."""
    take(uri, job, store)


def release(uri: str, job: str, store: Store) -> None:
    """Give a model back; nothing where the last claim is another run's."""
    number, last = _last(uri, store)
    if last is not None and last.job == job and not last.released:
        _write(uri, number, Claim(job, last.since, time.time(), released=True), store)


def _last(uri: str, store: Store) -> tuple[int, Claim | None]:
    """Number and content of the claim that counts; 0 where nobody has made one yet."""
    names = [file.name for file in store.list(uri)]
    if not names:
        return 0, None
    return int(max(names).removesuffix(".json")), Claim(**json.loads(store.read(join(uri, max(names)))))


def _write(uri: str, number: int, claim: Claim, store: Store, *, if_absent: bool = False) -> bool:
    place = join(uri, f"{number:06d}.json")
    return store.write(place, json.dumps(asdict(claim), indent=1).encode(), if_absent=if_absent)
