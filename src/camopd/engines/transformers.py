"""The default engine: Hugging Face models, any machine. Also loads the model that `train` updates and `evaluate` asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from camopd.engines import Sample, Scores
from camopd.errors import InputError, Problem
from camopd.inputs.checks import nonfinite_parameters
from camopd.losses import Head, TokenLogprobs, token_logprobs

Item = TypeVar("Item")
SCORE_CHUNK = 1024  # positions whose logits are alive at once while scoring
DRAWS = 64  # uniform numbers drawn at a time for each sequence
disable_progress_bar()  # bars for loading and saving shards, which no log needs


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(path: Path) -> PreTrainedModel:
    """Load a causal model in float32, on the GPU when there is one, in evaluation mode.

    Raises:
        InputError: parameters that are NaN or infinite, named.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    bad = nonfinite_parameters(model.named_parameters())
    if bad:
        raise InputError([Problem(str(path), f"{name} holds NaN or infinity", "export the checkpoint again") for name in bad])
    return model.to(device()).eval()  # type: ignore[arg-type]


def output_head(model: PreTrainedModel) -> Head:
    """The layer from hidden states to logits.

    Raises:
        InputError: the architecture changes its logits after that layer (soft caps, scales), which we would miss.
    """
    head = model.get_output_embeddings()
    probe = torch.arange(min(8, head.weight.shape[0]), device=model.device)[None]
    with torch.no_grad():
        whole, ours = model(probe, use_cache=False).logits, head(hidden_states(model, probe, torch.ones_like(probe)))
    if not torch.allclose(whole, ours, atol=1e-3):
        what = f"{type(model).__name__} changes its logits after the output layer"
        raise InputError([Problem(str(model.config.name_or_path), what, "only plain output layers are supported")])
    return head


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states (B, S, D); the attention mask (B, S) tells padding from text."""
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def response_logprobs(
    model: PreTrainedModel,
    head: Head,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    chunk: int,
    ids_TK: Tensor | None = None,
    top_k: int = 0,
) -> TokenLogprobs:
    """Forward pass of one micro-batch, padded on the right; results for the response tokens alone, laid end to end.

    Position p's hidden state predicts token p + 1, so a response of L tokens after a prompt of P is read at P - 1 .. P + L - 2.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    where = model.device
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=where)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=where)
    hidden = hidden_states(model, input_ids, mask)
    at = [
        n * width + position
        for n, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        for position in range(len(prompt) - 1, len(row) - 1)
    ]
    hidden_td = hidden.flatten(0, 1)[torch.tensor(at, device=where)]
    targets = torch.tensor([token for response in responses for token in response], device=where)
    return token_logprobs(hidden_td, head, targets, vocab_size=vocab_size, chunk=chunk, ids_TK=ids_TK, top_k=top_k)


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


class TransformersEngine:
    """A model in memory. See ``camopd.engines.Engine`` for the two methods' contract."""

    def __init__(self, path: Path, *, vocab_size: int, batch_size: int, batch_tokens: int) -> None:
        self._model = load_model(path)
        self._head = output_head(self._model)
        self._vocab_size, self._batch_size, self._batch_tokens = vocab_size, batch_size, batch_tokens

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, top_k: int = 0
    ) -> Iterator[tuple[int, Scores]]:
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        for batch in token_batches(lengths, self._batch_tokens):
            out = response_logprobs(
                self._model,
                self._head,
                [prompts[i] for i in batch],
                [responses[i] for i in batch],
                vocab_size=self._vocab_size,
                chunk=SCORE_CHUNK,
                top_k=top_k,
            )
            counts = [len(responses[i]) for i in batch]
            sampled = out.sampled_T.split(counts)
            if out.chosen_TK is None or out.top_ids_TK is None:
                yield from ((i, Scores(part.tolist(), [], [], [])) for i, part in zip(batch, sampled, strict=True))
                continue
            tail = (1 - out.chosen_TK.exp().sum(-1)).clamp_min(0)
            parts = zip(
                batch, sampled, out.top_ids_TK.split(counts), out.chosen_TK.split(counts), tail.split(counts), strict=True
            )
            yield from (
                (i, Scores(own.tolist(), ids.tolist(), top.tolist(), rest.tolist())) for i, own, ids, top, rest in parts
            )

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, max_new_tokens: int, eos_ids: Sequence[int]
    ) -> Iterator[tuple[int, Sample]]:
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))  # little padding, longest (most memory) first
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            samples = self._sample_batch([prompts[i] for i in batch], [seeds[i] for i in batch], max_new_tokens, eos_ids)
            yield from zip(batch, samples, strict=True)

    def _sample_batch(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int, eos_ids: Sequence[int]
    ) -> list[Sample]:
        model, where = self._model, self._model.device
        width = max(map(len, prompts))
        # Padding goes to the left here, so that every row's newest token is the last column; the mask must go with it.
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=where)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=where)
        position = mask.cumsum(-1).sub(1).clamp_min(0)
        cache = DynamicCache(config=model.config)
        stop = torch.tensor(list(eos_ids), device=where)
        draws = [np.random.default_rng(seed) for seed in seeds]
        alive = list(range(len(prompts)))
        sampled: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        entropies = [0.0] * len(prompts)
        finished = ["length"] * len(prompts)
        uniform = np.empty((len(prompts), 0))
        for step in range(max_new_tokens):
            out = model(
                input_ids=tokens, attention_mask=mask, position_ids=position, cache=cache, use_cache=True, logits_to_keep=1
            )
            if step % DRAWS == 0:
                uniform = np.stack([draws[row].random(DRAWS) for row in alive])
            next_ids, chosen, entropy = draw(out.logits[:, -1, : self._vocab_size].float(), uniform[:, step % DRAWS])
            ended = torch.isin(next_ids, stop).tolist()
            for row, token, value, spread, end in zip(
                alive, next_ids.tolist(), chosen.tolist(), entropy.tolist(), ended, strict=True
            ):
                sampled[row].append(token)
                logprobs[row].append(value)
                entropies[row] += spread
                if end:
                    finished[row] = "stop"
            if any(ended):  # finished rows leave the batch at once: what remains costs nothing more for them
                keep = [i for i, end in enumerate(ended) if not end]
                alive, uniform = [alive[i] for i in keep], uniform[keep]
                if not alive:
                    break
                index = torch.tensor(keep, device=where)
                cache.batch_select_indices(index)
                next_ids, mask, position = next_ids[index], mask[index], position[index]
            tokens = next_ids[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            position = position[:, -1:] + 1
        return [
            Sample(ids, values, spread / len(ids), reason)
            for ids, values, spread, reason in zip(sampled, logprobs, entropies, finished, strict=True)
        ]


def draw(logits_NV: Tensor, uniform_N: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by inverting the cumulative distribution: one uniform number a row, so rows never share randomness.

    Returns:
        Token ids (N,), their log-probabilities (N,) and the distributions' entropies (N,), nats.
    """
    logprobs = logits_NV.log_softmax(-1)
    probabilities = logprobs.exp()
    # float64: a cumulative sum of 150,000 float32 probabilities would lose the rare tokens.
    cumulative = probabilities.double().cumsum(-1)
    point = torch.as_tensor(uniform_N, device=logits_NV.device)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True).clamp_max(logits_NV.shape[1] - 1)  # never one of probability 0
    entropy = -(probabilities * logprobs.masked_fill(probabilities == 0, 0)).sum(-1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1), entropy
