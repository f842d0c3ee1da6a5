"""A round's sampling and scoring spread over pods: whose part is what, where it lies, and how the parts become one again.

A shard is every n-th of the batches that one pod would compute. So a pod's tokens are about an n-th of all, and the default
engine computes each batch as one pod would: the same bits, whatever n is. Parts lie under names that hold n, so that those of
another n are never taken for ours. They are joined by id, never by order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from camopd.errors import StoreError
from camopd.store import Manifest, Store, canonical, join

Row = Mapping[str, Any]
Key = tuple[str, str, int]  # branch, prompt id, sample index

_SHARD = re.compile(r"(?P<stage>rollout|score-.+)-(?P<number>[1-9]\d*)-of-(?P<count>[1-9]\d*)")


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number} of {self.count}"

    def share(self, batches: Iterable[Sequence[int]]) -> list[int]:
        """The indices in this shard's batches, every ``count``-th, in ascending order."""
        return sorted(index for place, batch in enumerate(batches) if place % self.count == self.number - 1 for index in batch)


@dataclass(frozen=True)
class Place:
    """What a task of the pipeline is to do, as its prefix tells.

    Attributes:
        round_uri: the round.
        branch: the branch that is scored; empty for a rollout.
        shard: the part; None is the whole.
    """

    round_uri: str
    branch: str
    shard: Shard | None


def place_of(uri: str) -> Place:
    """Read a round's prefix (its rollout), ``<round>/score-<branch>``, or a shard's prefix of either."""
    above, _, name = uri.rstrip("/").rpartition("/")
    shard = None
    if above.endswith("/shards") and (found := _SHARD.fullmatch(name)):
        above, name = above.removesuffix("/shards"), found["stage"]
        shard = Shard(int(found["number"]), int(found["count"]))
        if name == "rollout":
            return Place(above, "", shard)
    if name.startswith("score-"):
        return Place(above, name.removeprefix("score-"), shard)
    return Place(uri, "", None)


def shard_uri(whole_uri: str, shard: Shard | None) -> str:
    """Where a shard of ``<round>/rollout`` or ``<round>/score-<branch>`` lies; None is that prefix itself."""
    if shard is None:
        return whole_uri
    round_uri, _, stage = whole_uri.rpartition("/")
    return join(round_uri, "shards", f"{stage}-{shard.number}-of-{shard.count}")


def shard_uris(whole_uri: str, count: int, store: Store) -> list[str]:
    """What is left to be done for a prefix: its shards, or the prefix itself when there is one part or it is finished.

    Never empty: a loop over nothing is not the same to all that run the graph.
    """
    if count == 1 or store.manifest(whole_uri) is not None:
        return [whole_uri]
    return [shard_uri(whole_uri, Shard(number, count)) for number in range(1, count + 1)]


def key_of(row: Row) -> Key:
    return row["branch"], row["prompt_id"], row["sample_index"]


def finished_parts(
    whole_uri: str, count: int, config: Mapping[str, Any], inputs: Mapping[str, str], store: Store
) -> dict[str, Manifest]:
    """The manifest of each shard by its prefix.

    Args:
        whole_uri: the prefix that they make up.
        count: how many there are.
        config: the settings that shape the whole.
        inputs: content id of each input of the whole.
        store: where they lie.

    Raises:
        StoreError: one is not finished, or was made from something else.
    """
    parts = {}
    for number in range(1, count + 1):
        shard = Shard(number, count)
        uri = shard_uri(whole_uri, shard)
        part = parts[uri] = store.require(uri)
        if (part.config, part.inputs) != (canonical(part_config(config, shard)), canonical(inputs)):
            raise StoreError(f"{uri} was made with other settings or inputs than the rest; remove it and start again")
    return parts


def part_config(config: Mapping[str, Any], shard: Shard | None) -> dict[str, Any]:
    """The settings that shape a part: those of the whole, and which part it is."""
    return dict(config) if shard is None else {**config, "shard": str(shard)}


def joined(whole_uri: str, keys: Sequence[Key], tables: Mapping[str, Iterable[Row]]) -> list[dict[str, Any]]:
    """The rows of all tables, in the order of the keys.

    Args:
        whole_uri: the prefix that the tables make up, for the messages.
        keys: of the rows that there must be, once each.
        tables: rows by prefix.

    Raises:
        StoreError: a row that is missing, is there twice, or belongs to nothing that was asked for.
    """
    found: dict[Key, dict[str, Any]] = {}
    origin: dict[Key, str] = {}
    wanted = set(keys)
    for uri, rows in tables.items():
        for row in rows:
            key = key_of(row)
            if key in found:
                raise StoreError(f"{uri} holds {_named(key)}, which {origin[key]} holds, too; remove both and start again")
            if key not in wanted:
                raise StoreError(f"{uri} holds {_named(key)}, which nobody asked for; remove it and start again")
            found[key], origin[key] = dict(row), uri
    missing = [key for key in keys if key not in found]
    if missing:
        what = f"{len(missing)} of {len(keys)} samples, the first of them {_named(missing[0])}"
        raise StoreError(f"the shards of {whole_uri} lack {what}; remove {', '.join(tables)} and start again")
    return [found[key] for key in keys]


def _named(key: Key) -> str:
    return f"sample {key[2]} of prompt {key[1]!r} of branch {key[0]!r}"


def rates(tokens: int, engine_seconds: float) -> dict[str, float]:
    """Throughput of an engine, for a manifest: what it took, and tokens a second where it had anything to do."""
    found = {"engine_seconds": round(engine_seconds, 3)}
    return found | ({"tokens_per_second": tokens / engine_seconds} if tokens and engine_seconds else {})


def joined_rates(tokens: int, parts: Iterable[Manifest]) -> dict[str, float]:
    """The same of all shards. Seconds are added up, so that rate and share of waiting are those of one pod.

    ``shard_seconds``, ``shard_gpu_seconds``, ``shard_seconds_waited`` and ``shard_bytes`` are what all of them took, for the
    ledger: the shards themselves may be gone by then.
    """
    parts = list(parts)
    seconds, waited = sum(part.seconds for part in parts), sum(part.seconds_waited for part in parts)
    spent = {
        "shard_seconds": round(seconds, 3),
        "shard_seconds_waited": round(waited, 3),
        "shard_gpu_seconds": round(sum(part.seconds * part.resources.get("count", 0) for part in parts), 3),
        "shard_bytes": sum(file.size for part in parts for file in part.files),
    }
    engine = sum(part.metrics["engine_seconds"] for part in parts)
    return {"num_shards": len(parts), **spent, **waiting_share(seconds, waited), **rates(tokens, engine)}


def waiting_share(seconds: float, waited: float) -> dict[str, float]:
    """The share of a stage's time that it waited for the store, as a headline number; none of no time. Shards bring theirs."""
    return {"waiting_share": round(waited / seconds, 4)} if seconds else {}
