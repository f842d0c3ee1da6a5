"""What samples from a model and what scores with it, behind one small interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        token_ids: sampled ids, the end token included when one was sampled.
        logprobs: log-probability of each under the distribution it was sampled from, nats.
        entropy: mean entropy of those distributions, nats.
        finish_reason: ``stop`` at an end token, ``length`` at the limit.
    """

    token_ids: list[int]
    logprobs: list[float]
    entropy: float
    finish_reason: str


@dataclass(frozen=True)
class Scores:
    """What a model says about a given response of L tokens; the last three are empty when top_k is 0.

    Attributes:
        logprobs: log-probability of each token, length L.
        topk_ids: the model's k most likely tokens at each position, L by k.
        topk_logprobs: their log-probabilities.
        tail_mass: probability left over at each position, length L.
    """

    logprobs: list[float]
    topk_ids: list[list[int]]
    topk_logprobs: list[list[float]]
    tail_mass: list[float]


class Engine(Protocol):
    """A loaded model. Results come as (index of the request, result), in whatever order suits the engine."""

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, max_new_tokens: int, eos_ids: Sequence[int]
    ) -> Iterator[tuple[int, Sample]]:
        """Sample one response a prompt at temperature 1; a response depends on its prompt and seed, not on its neighbours."""

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, top_k: int = 0
    ) -> Iterator[tuple[int, Scores]]:
        """Log-probabilities of given responses, with the top k of each position when ``top_k`` is above 0."""


def load_engine(name: str, path: Path, *, vocab_size: int, batch_size: int, batch_tokens: int) -> Engine:
    """The engine of that name with the model at ``path``; heavy imports happen here.

    Args:
        name: ``transformers``.
        path: local model folder.
        vocab_size: shared ids; the rest of the head is masked.
        batch_size: sequences decoded together.
        batch_tokens: padded tokens of one scoring pass.
    """
    if name == "transformers":
        from camopd.engines.transformers import TransformersEngine

        return TransformersEngine(path, vocab_size=vocab_size, batch_size=batch_size, batch_tokens=batch_tokens)
    raise ValueError(f"rollout.engine {name!r} is not known; use transformers")
