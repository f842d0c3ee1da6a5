"""The engine for a model that somebody else serves, with vLLM or what speaks its dialect of OpenAI's completions.

Token ids go in and come out. Log-probabilities of given tokens come as ``prompt_logprobs``, vLLM's extension, which names each
token by its id; ``echo`` with ``logprobs`` would name them by text, which several tokens may share. They are over the head that
is served: ids beyond the shared ones keep their part, which `prepare` has found to be small (``camopd.inputs.served``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from camopd.engines import Sample, Scores, TokenIds, checked_lengths
from camopd.engines.served import TOGETHER, Server
from camopd.errors import EngineError

# What a server's own defaults, which may come from the model's generation_config.json, must not change.
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
PLAIN |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
ROUNDING = 1e-3  # by how much a log-probability may be above 0, or a sum of probabilities above 1

Found = TypeVar("Found")


class RemoteEngine:
    """A served model. See ``camopd.engines.Engine`` for the methods' contract.

    Args:
        server: where it is served.
        model: its name there.
        vocab_size: shared ids.
        batch_size: responses sampled at the same time.
        batch_tokens: tokens scored at the same time, over all requests in flight.
        max_length: longest sequence, prompt and response together.
    """

    def __init__(
        self, server: Server, model: str, *, vocab_size: int, batch_size: int, batch_tokens: int, max_length: int
    ) -> None:
        self._server, self._model, self._vocab_size = server, model, vocab_size
        self._batch_size, self._batch_tokens, self.max_length = batch_size, batch_tokens, max_length

    def close(self) -> None:
        """Let go of the connections; the model is not ours."""
        self._server.close()

    def sample(
        self,
        prompts: Sequence[TokenIds],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        top_k: int = 0,
    ) -> Iterator[tuple[int, Sample]]:
        """As ``Engine.sample``, without ``top_k``. ``Sample.entropy`` is an estimate from the drawn tokens.

        Raises:
            EngineError: the server refuses or keeps failing, or a sequence does not fit.
        """
        if top_k:
            raise ValueError("a served model is not asked for the most likely tokens of its own answers")
        checked_lengths(
            [len(prompt) for prompt in prompts], [max_new_tokens] * len(prompts), self.max_length, self._server.base
        )

        def one(index: int) -> Sample:
            seed = seeds[index] % 2**63  # the protocol's are signed
            asked = {"seed": seed, "max_tokens": max_new_tokens, "logprobs": 0}
            ids, choice = self._written(prompts[index], eos_ids, asked)
            logprobs = checked((choice.get("logprobs") or {}).get("token_logprobs") or [])
            if len(logprobs) != len(ids):
                raise EngineError(f"{self._server.base} gave {len(ids)} tokens and {len(logprobs)} log-probabilities")
            reason = "stop" if int(ids[-1]) in eos_ids else "length"
            nothing = np.empty((len(ids), 0))
            empty = nothing.astype(np.int32), nothing.astype(np.float32)
            return Sample(ids, logprobs, -float(logprobs.mean()), reason, *empty)

        yield from in_flight([(i, 1) for i in range(len(prompts))], self._batch_size, one)

    def greedy(
        self, prompts: Sequence[TokenIds], *, max_new_tokens: int, eos_ids: Sequence[int], stop: Sequence[str], **settings: Any
    ) -> list[NDArray[np.int32]]:
        """The most likely continuation of each prompt, for the evaluation; ``settings`` may ask for another temperature.

        Args:
            prompts: token ids of each prompt.
            max_new_tokens: where an answer is cut.
            eos_ids: tokens that end an answer.
            stop: texts that end it.
            settings: fields of the request.
        """
        checked_lengths(
            [len(prompt) for prompt in prompts], [max_new_tokens] * len(prompts), self.max_length, self._server.base
        )
        asked = {"temperature": 0.0, "max_tokens": max_new_tokens, "stop": list(stop)} | settings

        def one(index: int) -> NDArray[np.int32]:
            return self._written(prompts[index], eos_ids, asked)[0]

        found = dict(in_flight([(i, 1) for i in range(len(prompts))], self._batch_size, one))
        return [found[index] for index in range(len(prompts))]

    def _written(
        self, prompt: TokenIds, eos_ids: Sequence[int], asked: dict[str, Any]
    ) -> tuple[NDArray[np.int32], dict[str, Any]]:
        """Ids of one answer and the choice that they came with."""
        ends: dict[str, Any] = {"stop_token_ids": list(map(int, eos_ids)), "ignore_eos": True}  # these end tokens and no others
        choice = self._complete(prompt, ends | asked)
        ids = choice.get("token_ids")
        if not ids:
            raise EngineError(f"{self._server.base} gave no token_ids with its answer; which a sampler must, as vLLM does")
        return np.array(ids, np.int32), choice

    def score(
        self,
        prompts: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        *,
        top_k: int = 0,
        ids: Sequence[NDArray[np.int32]] | None = None,
        hidden: bool = False,
    ) -> Iterator[tuple[int, Scores]]:
        """As ``Engine.score``, without ``ids`` and ``hidden``, which a recipe with a served teacher cannot ask for.

        Raises:
            EngineError: the server refuses or keeps failing, gives what is no log-probability of these tokens, or a sequence
                does not fit.
        """
        if ids is not None or hidden:
            raise ValueError("a server neither scores given ids nor gives hidden states; give the model's folder")
        lengths = checked_lengths(list(map(len, prompts)), list(map(len, responses)), self.max_length, self._server.base)
        top_k = min(top_k, self._vocab_size)

        def one(index: int) -> Scores:
            return self.score_one(prompts[index], responses[index], top_k)

        longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        yield from in_flight([(index, lengths[index]) for index in longest_first], self._batch_tokens, one)

    def score_one(self, prompt: TokenIds, response: TokenIds, top_k: int, **asked: Any) -> Scores:
        """One response; ``asked`` may hold further fields of the request."""
        whole = [*map(int, prompt), *map(int, response)]
        choice = self._complete(whole, {"max_tokens": 1, "prompt_logprobs": top_k} | asked)
        echoed = choice.get("prompt_token_ids")
        rows = choice.get("prompt_logprobs")
        if not rows:
            raise EngineError(f"{self._server.base} gives no prompt_logprobs; a served teacher needs them, as vLLM gives them")
        if len(rows) != len(whole) or (echoed is not None and list(echoed) != whole):
            raise EngineError(f"{self._server.base} did not take the token ids as they are: it read others, or another number")
        return self._read(rows[len(prompt) :], whole[len(prompt) :], top_k)

    def _read(self, rows: Sequence[Mapping[str, Any]], response: Sequence[int], top_k: int) -> Scores:
        try:
            own = checked([row[str(token)]["logprob"] for row, token in zip(rows, response, strict=True)])
        except (KeyError, TypeError):
            what = "log-probabilities of other tokens than those that were sent"
            raise EngineError(f"{self._server.base} gave {what}: is its model of the same tokenizer?") from None
        likely = [sorted(((entry["logprob"], token) for token, entry in row.items()), key=by_value)[:top_k] for row in rows]
        if any(len(row) != top_k for row in likely):
            raise EngineError(f"{self._server.base} gave fewer than the {top_k} most likely tokens of a position")
        top_ids = np.array([[int(token) for _, token in row] for row in likely], np.int32).reshape(len(rows), top_k)
        top = checked([value for row in likely for value, _ in row]).reshape(len(rows), top_k)
        if top_k and (np.exp(top).sum(-1) > 1 + ROUNDING).any():
            raise EngineError(f"{self._server.base} gave probabilities whose sum is above 1: they are not the model's own")
        if top_ids.size and top_ids.max() >= self._vocab_size:
            what = f"finds the id {top_ids.max()} likely, which the student's tokenizer does not have"
            raise EngineError(f"{self._server.base} {what}: give the model's folder, where such ids are masked")
        return Scores(own, top_ids, top)

    def _complete(self, prompt: TokenIds, asked: dict[str, Any]) -> dict[str, Any]:
        given = {"model": self._model, "prompt": list(map(int, prompt)), "add_special_tokens": False}
        return self._server.complete(given | {"return_token_ids": True} | PLAIN | asked)


def by_value(entry: tuple[float, str]) -> float:
    return -entry[0]


def checked(values: Sequence[Any]) -> NDArray[np.float32]:
    """Log-probabilities as an array. Raises EngineError for what cannot be one."""
    found = np.array([math.nan if value is None else value for value in values], np.float32)
    if not (found <= ROUNDING).all():  # NaN is not below anything
        raise EngineError("the server gave a number that is no log-probability: above 0, or none at all")
    return np.minimum(found, 0)


def in_flight(jobs: Sequence[tuple[int, int]], budget: int, answer: Callable[[int], Found]) -> Iterator[tuple[int, Found]]:
    """Answer jobs beside each other: as many as fit into the budget, one at least; each answer as it comes.

    Args:
        jobs: index and cost of each, in the order in which they start.
        budget: what the running ones may cost together.
        answer: makes the answer of an index.
    """
    waiting, running = deque(jobs), dict[Future[Found], tuple[int, int]]()
    with ThreadPoolExecutor(TOGETHER) as pool:
        while waiting or running:
            cost = sum(price for _, price in running.values())
            while waiting and len(running) < TOGETHER and (not running or cost + waiting[0][1] <= budget):
                index, price = waiting.popleft()
                running[pool.submit(answer, index)] = index, price
                cost += price
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index, _ = running.pop(future)
                yield index, future.result()
