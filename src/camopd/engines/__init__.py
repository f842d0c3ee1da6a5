"""What samples from a model and what scores with it, behind one small interface.

Shape suffixes: L tokens of one response, K most likely tokens of a position. Log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from camopd.errors import EngineError, InputError, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from camopd.config import VLLM

TokenIds = Sequence[int] | NDArray[np.int32]  # of one prompt or one response


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        token_ids: sampled ids, int32 (L,), the end token included when one was sampled.
        logprobs: log-probability of each under the distribution it was sampled from, float32 (L,).
        entropy: mean entropy of those distributions, nats; from vLLM the estimate -mean(logprobs) from the drawn tokens, which
            has the same expectation at each position.
        finish_reason: ``stop`` at an end token, ``length`` at the limit.
        topk_ids: the sampler's own K most likely tokens at each position, int32 (L, K); K is 0 when none were asked for.
        topk_logprobs: their log-probabilities, float32 (L, K).
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    entropy: float
    finish_reason: str
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """What a model says about a given response; K is 0 when only the response's own tokens were asked for.

    Attributes:
        logprobs: log-probability of each token of the response, float32 (L,).
        topk_ids: the given ids, or the model's own K most likely tokens at each position, int32 (L, K).
        topk_logprobs: the model's log-probabilities of them, float32 (L, K).
        hidden: last hidden states (L, D) that predict the tokens, on the model's device; None when they were not asked for.
    """

    logprobs: NDArray[np.float32]
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]
    hidden: Tensor | None = None


class Engine(Protocol):
    """A loaded model. Results come as (index of the request, result), in whatever order suits the engine."""

    def sample(
        self,
        prompts: Sequence[TokenIds],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        top_k: int = 0,
    ) -> Iterator[tuple[int, Sample]]:
        """Sample one response a prompt at temperature 1; a response depends on its prompt and seed, not on its neighbours.

        Args:
            prompts: token ids of each prompt.
            seeds: one number below 2**64 a prompt.
            max_new_tokens: where a response is cut.
            eos_ids: tokens that end a response.
            top_k: how many of the sampler's own most likely tokens to give with each position.
        """

    def score(
        self,
        prompts: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        *,
        top_k: int = 0,
        ids: Sequence[NDArray[np.int32]] | None = None,
        hidden: bool = False,
    ) -> Iterator[tuple[int, Scores]]:
        """Log-probabilities of given responses.

        Args:
            prompts: token ids of each prompt.
            responses: token ids of each response.
            top_k: how many of the model's own most likely tokens to give with each position.
            ids: one (L, K) array a response of the tokens to give instead of the model's own top k.
            hidden: give the hidden states, too, for a loss over the whole vocabulary in the same process.
        """

    def close(self) -> None:
        """Free the model and the device. The engine answers nothing after it."""


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Groups of indices, sorted by length, with members times longest member within ``budget``; at least one a group."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def sample_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Groups of indices of at most ``size``, the longest prompts first: little padding, and most memory at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def checked_lengths(prompts: Sequence[int], responses: Sequence[int], longest: int, to: str) -> list[int]:
    """Lengths of whole sequences: one that is refused on its way would end all others with it.

    Args:
        prompts: length of each prompt.
        responses: length of each response, or the longest that it may get.
        longest: sequence that is taken.
        to: where they go, for the message.

    Raises:
        EngineError: some are empty or too long.
    """
    lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    bad = [i for i, whole in enumerate(lengths) if not (prompts[i] and responses[i] and whole <= longest)]
    if bad:
        raise EngineError(
            f"{len(bad)} of {len(lengths)} sequences cannot go to {to}, the first with {prompts[bad[0]]} prompt and "
            f"{responses[bad[0]]} response tokens: both must have one at least, and together at most {longest}"
        )
    return lengths


def import_engine(name: str) -> None:
    """Do the imports of an engine, which take seconds: its weights may come meanwhile."""
    if find_spec(name) is not None:  # what is not installed is said where the engine is loaded
        import_module(f"camopd.engines.{name}")  # ours, which sets what vLLM reads when it is imported


def check_installed(name: str) -> None:
    """Raises ValueError for an engine that does not exist, InputError for one that is not installed here."""
    if name not in ("transformers", "vllm"):
        raise ValueError(f"rollout.engine {name!r} is not known; use transformers or vllm")
    if name == "vllm" and find_spec(name) is None:
        what, fix = "vLLM is not installed here", "run this stage in the inference environment, or use transformers"
        raise InputError([Problem("rollout.engine", what, fix)])


def load_engine(
    name: str,
    path: Path,
    *,
    vocab_size: int,
    batch_size: int,
    batch_tokens: int,
    max_length: int,
    vllm: VLLM | None = None,
    adapter: Path | None = None,
    replicas: int = 1,
) -> Engine:
    """The engine of that name with the model at ``path``; heavy imports happen here.

    Several models over one base: ``camopd.engines.shared``. vLLM beside a trainer: ``camopd.engines.colocated``.

    Args:
        name: ``transformers`` or ``vllm``.
        path: local model folder.
        vocab_size: shared ids; the rest of the head is masked.
        batch_size: sequences decoded together.
        batch_tokens: padded tokens of one scoring pass.
        max_length: longest sequence, prompt and response together; vLLM sizes its cache by it.
        vllm: the recipe's table of that name; None is its defaults.
        adapter: local folder of a LoRA adapter that the model is to have.
        replicas: copies of the model in processes of their own, which share the work; each has its own GPUs.

    Raises:
        ValueError: an engine that does not exist.
        InputError: a model that the engine does not take, an engine that is not installed, or fewer GPUs than needed.
        EngineError: vLLM does not start.
    """
    check_installed(name)
    from camopd.config import VLLM
    from camopd.engines.shared import engines_over, vllm_over

    limits, settings = {"vocab_size": vocab_size, "batch_size": batch_size, "batch_tokens": batch_tokens}, vllm or VLLM()
    if replicas > 1:
        from camopd.engines.replicas import Replicas

        place = {"path": str(path), "adapter": str(adapter) if adapter else None}
        engine = {"name": name, **place, "max_length": max_length, "vllm": settings.model_dump(mode="json")}
        return Replicas(replicas, settings.tensor_parallel_size if name == "vllm" else 1, engine | limits)
    if name == "vllm":
        return vllm_over(path, {"": adapter}, **limits, max_length=max_length, settings=settings)[""]
    from camopd.engines.transformers import load_model

    return engines_over(load_model(path), {"": adapter}, **limits)[""]
