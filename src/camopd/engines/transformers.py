"""The default engine: Hugging Face models, any machine. Also loads the model that `train` updates and `evaluate` asks.

Shape suffixes: N sequences of a batch, S padded positions, T tokens of all responses laid end to end, D hidden width, V shared
vocabulary, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from camopd.engines import Sample, Scores, TokenIds, sample_batches, token_batches
from camopd.engines.cache import roomy_cache
from camopd.engines.packing import hidden_states, use_packing
from camopd.errors import InputError, Problem
from camopd.inputs.checks import nonfinite_parameters
from camopd.losses import rows_at_once, token_logprobs

LOGITS_MIB = 64  # size of the float32 logits that are alive at once while scoring
DRAWS = 64  # uniform numbers drawn at a time for each sequence
MIN_LIVE = 0.5  # a batch is cut down to its unfinished sequences once no larger share is left: each cut copies the cache
disable_progress_bar()  # bars for loading and saving shards, which no log needs


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(path: Path, where: torch.device | None = None) -> PreTrainedModel:
    """Load a causal model in float32 in evaluation mode.

    Args:
        path: model folder.
        where: device; none means the GPU when there is one. On ``meta`` the model has its form alone and no weight is read: its
            values come from another process (``camopd.student.receive``).

    Raises:
        InputError: parameters that are missing, NaN or infinite, named.
    """
    where = where or device()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        device_map="meta" if where.type == "meta" else None,
    )
    model, found = loaded
    bad = dict.fromkeys(sorted(found["missing_keys"]), "is in none of the files, and would be random")
    if where.type == "meta":
        model.tie_weights()  # left undone without values to compare, where the files have both
    else:
        bad |= dict.fromkeys(nonfinite_parameters(model.named_parameters()), "holds NaN or infinity")
    if bad:
        raise InputError([Problem(str(path), f"{name} {what}", "export the checkpoint again") for name, what in bad.items()])
    return model.eval() if where.type == "meta" else use_packing(model.to(where).eval())


def output_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The layer from hidden states to logits, whose weight is all that the losses need.

    Raises:
        InputError: the layer has a bias, or the architecture changes its logits after it (soft caps, scales).
    """
    head = model.get_output_embeddings()
    probe = torch.arange(min(8, head.weight.shape[0]), device=model.device)
    length = torch.tensor([len(probe)], device=model.device)
    with torch.no_grad():
        whole, ours = model(probe[None], use_cache=False).logits[0], hidden_states(model, probe, length) @ head.weight.mT
    if head.bias is not None or not torch.allclose(whole, ours, atol=1e-3):
        what = f"{type(model).__name__} adds a bias to its logits or changes them after the output layer"
        raise InputError([Problem(str(model.config.name_or_path), what, "only plain output layers are supported")])
    return head


def response_hidden(model: PreTrainedModel, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Tensor:
    """Last hidden states that predict the response tokens, laid end to end (T, D), with gradient where it is enabled.

    Position p predicts token p + 1, so a response of L tokens after a prompt of P is read at positions P - 1 .. P + L - 2.
    """
    where = model.device
    pieces = [piece for prompt, response in zip(prompts, responses, strict=True) for piece in (prompt, response[:-1])]
    tokens = torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(where)
    lengths = np.array([len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)])
    ends = zip(lengths.cumsum().tolist(), responses, strict=True)
    read = np.concatenate([np.arange(end - len(response), end) for end, response in ends])
    hidden = hidden_states(model, tokens, torch.from_numpy(lengths).to(where))
    return hidden.index_select(0, torch.from_numpy(read).to(where))


class TransformersEngine:
    """A model in memory. See ``camopd.engines.Engine`` for the two methods' contract.

    Only a reference is kept: weights that training changes in place are the ones that sample and score next.

    Args:
        model: in evaluation mode, on its device.
        vocab_size: shared ids; the rest of the head is masked.
        batch_size: sequences decoded together.
        batch_tokens: padded tokens of one scoring pass.

    Raises:
        InputError: a head that ``output_head`` refuses.
    """

    def __init__(self, model: PreTrainedModel, *, vocab_size: int, batch_size: int, batch_tokens: int) -> None:
        self._model, self._weight_VD = model, output_head(model).weight
        self._vocab_size, self._batch_size, self._batch_tokens = vocab_size, batch_size, batch_tokens

    def close(self) -> None:
        """Let go of the model; its memory is free when nobody else holds it."""
        del self._model, self._weight_VD

    def score(
        self,
        prompts: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        *,
        top_k: int = 0,
        ids: Sequence[NDArray[np.int32]] | None = None,
        hidden: bool = False,
    ) -> Iterator[tuple[int, Scores]]:
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        for batch in token_batches(lengths, self._batch_tokens):
            given = None if ids is None else [ids[i] for i in batch]
            scores = self._score_batch([prompts[i] for i in batch], [responses[i] for i in batch], top_k, given, hidden)
            yield from zip(batch, scores, strict=True)

    @torch.inference_mode()
    def _score_batch(
        self,
        prompts: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        top_k: int,
        ids: Sequence[NDArray[np.int32]] | None,
        hidden: bool,
    ) -> list[Scores]:
        where = self._model.device
        hidden_TD = response_hidden(self._model, prompts, responses)
        out = token_logprobs(
            hidden_TD,
            self._weight_VD,
            torch.from_numpy(np.concatenate(responses).astype(np.int64)).to(where),
            vocab_size=self._vocab_size,
            chunk=rows_at_once(self._vocab_size, LOGITS_MIB),
            ids_TK=None if ids is None else torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(where),
            top_k=top_k,
        )
        lengths = [len(response) for response in responses]
        nothing = torch.empty(sum(lengths), 0)
        top_ids, top = (nothing if column is None else column for column in (out.top_ids_TK, out.chosen_TK))
        own_ids = split(top_ids.int(), lengths) if ids is None else ids
        states = hidden_TD.split(lengths) if hidden else [None] * len(lengths)
        return list(map(Scores, split(out.sampled_T, lengths), own_ids, split(top, lengths), states))

    def sample(
        self,
        prompts: Sequence[TokenIds],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        top_k: int = 0,
    ) -> Iterator[tuple[int, Sample]]:
        for batch in sample_batches([len(prompt) for prompt in prompts], self._batch_size):
            samples = self._sample_batch([prompts[i] for i in batch], [seeds[i] for i in batch], max_new_tokens, eos_ids, top_k)
            yield from zip(batch, samples, strict=True)

    @torch.inference_mode()
    def _sample_batch(
        self, prompts: Sequence[TokenIds], seeds: Sequence[int], max_new_tokens: int, eos_ids: Sequence[int], top_k: int
    ) -> list[Sample]:
        """Decode together. What a step draws stays on the device, finished rows and all, and is sorted out once at the end."""
        model, where = self._model, self._model.device
        tokens, mask = (part.to(where) for part in pad_left(prompts, max_new_tokens))
        width = tokens.shape[1]
        position = mask[:, :width].cumsum(-1).sub(1).clamp_min(0)
        cache = roomy_cache(model.config)
        stop = torch.tensor(list(eos_ids), device=where)
        request = torch.arange(len(prompts), device=where)  # which prompt a row of the batch belongs to
        live = torch.ones_like(request, dtype=torch.bool)
        steps: list[tuple[Tensor, ...]] = []
        for step in range(max_new_tokens):
            out = model(
                input_ids=tokens,
                attention_mask=mask[:, : width + step],
                position_ids=position,
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            if step % DRAWS == 0:
                uniform = torch.from_numpy(uniforms(seeds, step, DRAWS)).to(where)
            drawn = draw(out.logits[:, -1, : self._vocab_size].float(), uniform[request, step % DRAWS], top_k)
            steps.append((request, live, *drawn))
            live = live & ~torch.isin(drawn.tokens_N, stop)
            num_live = int(live.sum())
            if not num_live:
                break
            tokens, position = drawn.tokens_N[:, None], position[:, -1:] + 1
            if num_live <= MIN_LIVE * len(live):
                keep = live.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                tokens, position, mask, request, live = (part[keep] for part in (tokens, position, mask, request, live))
        return samples(steps, len(prompts), eos_ids)


def pad_left(prompts: Sequence[TokenIds], room: int) -> tuple[Tensor, Tensor]:
    """Prompts (N, S) whose newest token is the last column, and the attention mask (N, S + room) that goes with them.

    A padded batch decoded without its mask is wrong by tenths of a nat, and nothing says so.
    """
    width = max(map(len, prompts))
    tokens = np.zeros((len(prompts), width), np.int64)
    mask = np.ones((len(prompts), width + room), bool)
    for row, seen, prompt in zip(tokens, mask, prompts, strict=True):
        row[width - len(prompt) :] = prompt
        seen[: width - len(prompt)] = False
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def samples(steps: Sequence[tuple[Tensor, ...]], count: int, eos_ids: Sequence[int]) -> list[Sample]:
    """One sample a request from what the decoding steps drew.

    Args:
        steps: of each step the request of each row, whether it was still unfinished, and the columns of ``Draw``.
        count: requests.
        eos_ids: end tokens.
    """
    request, live, *columns = (torch.cat(column) for column in zip(*steps, strict=True))
    request = request[live]
    order = request.argsort(stable=True)  # each response's tokens together, in the order they were drawn
    lengths = request.bincount(minlength=count)
    ids, logprobs, entropy, topk_ids, topk_logprobs = (column[live][order] for column in columns)
    mean_entropy = torch.segment_reduce(entropy, "mean", lengths=lengths).tolist()
    drawn = zip(
        *(split(column, lengths.tolist()) for column in (ids.int(), logprobs, topk_ids.int(), topk_logprobs)), strict=True
    )
    return [
        Sample(own, values, spread, "stop" if int(own[-1]) in eos_ids else "length", top, top_values)
        for (own, values, top, top_values), spread in zip(drawn, mean_entropy, strict=True)
    ]


def split(column: Tensor, lengths: Sequence[int]) -> list[NDArray]:
    """What is laid end to end as one array a response."""
    array = column.cpu().numpy()
    return [array[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]


def uniforms(seeds: Sequence[int], start: int, count: int) -> NDArray[np.float64]:
    """Numbers ``start .. start + count - 1`` of each seed's stream, uniform in [0, 1): SplitMix64 (Steele et al., OOPSLA 2014).

    A number depends on seed and place alone, so there is no state to carry; a NumPy generator a sequence would cost 20 us each.
    """
    place = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    state: NDArray[np.uint64] = np.array(seeds, np.uint64)[:, None] + place * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)) * np.float64(2.0**-53)


class Draw(NamedTuple):
    """One decoding step: sampled ids, their log-probabilities, entropies in nats, and the K most likely ids with theirs."""

    tokens_N: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor
    topk_ids_NK: Tensor
    topk_logprobs_NK: Tensor


def draw(logits_NV: Tensor, uniform_N: Tensor, top_k: int = 0) -> Draw:
    """Sample by inverting the cumulative distribution: one uniform number a row, so rows never share randomness.

    Args:
        logits_NV: float32.
        uniform_N: float64, in [0, 1).
        top_k: how many of the most likely tokens to give.
    """
    logprobs = logits_NV.log_softmax(-1)
    probabilities = logprobs.exp()
    # float64: a cumulative sum of 150,000 float32 probabilities would lose the rare tokens.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    point = uniform_N[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True).clamp_max(logits_NV.shape[1] - 1)  # never one of probability 0
    entropy = -(probabilities * logprobs.clamp_min(torch.finfo().min)).sum(-1)  # 0 log 0 is 0
    values, ids = logprobs.topk(min(top_k, logits_NV.shape[1]))
    return Draw(token.squeeze(1), logprobs.gather(1, token).squeeze(1), entropy, ids, values)
