"""The vLLM engine: samples and scores on GPUs, with the model in processes of its own.

Token ids go in and come out, never text. Log-probabilities are the model's own at temperature 1, over the shared ids alone: a
hook in the workers masks the rest of the head, so that they equal those of the transformers engine to vLLM's precision.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from camopd.config import VLLM
from camopd.engines import Sample, Scores, TokenIds, checked_lengths, token_batches
from camopd.errors import EngineError, InputError, Problem
from camopd.losses import rows_at_once

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its own progress would bury ours
os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "2")  # then it kills them; SIGTERM leaves ten in all
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # a device is free for certain when the process that held it has ended
os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # for the one token after a scored sequence, see _start

from vllm import EngineArgs, RequestOutput, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from camopd.engines.vllm_lora import lora_arguments

LOGITS_MIB = 1024  # float32 logits of one forward pass over a prompt that is scored: vLLM leaves no room for them by itself
GRACE = 2.0  # seconds for a process to end by itself, twice; vLLM has waited five before
MAX_HALVINGS = 3  # restarts with half the tokens before a scoring that dies is given up

Request = tuple[list[int], SamplingParams]


class VllmEngine:
    """A model served by vLLM on this machine. See ``camopd.engines.Engine`` for the two methods' contract.

    A response depends on its prompt and seed alone as far as vLLM's arithmetic does not depend on the batch: neighbours can
    change a log-probability in its last digits, and so, once in a while, a token.

    vLLM spawns its processes, so a script that makes an engine needs ``if __name__ == "__main__":``.

    Args:
        path: local model folder.
        vocab_size: shared ids; the rest of the head is masked.
        batch_size: sequences decoded together.
        batch_tokens: tokens scored at once, in one batch of requests and in one forward pass.
        max_length: longest sequence, prompt and response together; the cache is sized by it.
        settings: the recipe's ``vllm`` table.
        adapters: local folders of the LoRA adapters over it that requests may name (``camopd.engines.vllm_lora``).

    Raises:
        EngineError: vLLM does not start with this model and these settings.
        InputError: parameters that are NaN or infinite, named.
    """

    sleeps = False  # whether it can give its memory back for a while; see camopd.engines.colocated

    def __init__(
        self,
        path: Path,
        *,
        vocab_size: int,
        batch_size: int,
        batch_tokens: int,
        max_length: int,
        settings: VLLM,
        adapters: Sequence[Path] = (),
    ) -> None:
        self._adapters = adapters
        self._path, self._vocab_size, self._settings = path, vocab_size, settings
        self._batch_size, self._batch_tokens, self._halvings = batch_size, batch_tokens, 0
        self._max_length = max_length
        self._engine = self._start()

    def _start(self) -> LLMEngine:
        # vLLM samples a token after every prompt, a scored sequence too, and wants a position for it.
        positions = self._max_length + 1
        # It dies on CPUs when it cuts the prompt of a request that has a seed.
        whole_prompts = current_platform.is_cpu()
        step_tokens = min(self._batch_tokens, rows_at_once(self._vocab_size, LOGITS_MIB))
        arguments = EngineArgs(
            model=str(self._path),
            skip_tokenizer_init=True,
            generation_config="vllm",  # none: end tokens come with the requests, and sampling has no defaults
            max_model_len=positions,
            max_num_seqs=self._batch_size,
            max_num_batched_tokens=max(self._batch_size, step_tokens, positions if whole_prompts else 1),
            enable_chunked_prefill=not whole_prompts,
            enable_prefix_caching=False,
            max_logprobs=-1,  # no limit: top_k is checked with the recipe
            logprobs_mode="raw_logprobs",
            worker_extension_cls="camopd.engines.vllm_worker.WorkerExtension",
            disable_log_stats=True,
            enable_sleep_mode=self.sleeps and current_platform.is_sleep_mode_available(),
            **self._settings.model_dump(),
            **lora_arguments(self._adapters),
        )
        others = children()
        try:
            engine = LLMEngine.from_engine_args(arguments)
            self._processes = [process for process in children() - others if is_vllm(process)]
            broken = {name for names in engine.collective_rpc("camopd_prepare", args=(self._vocab_size,)) for name in names}
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:300]
            raise EngineError(
                f"vLLM does not start with {self._path}: {reason}; its own messages are above. Where memory is short, set "
                "vllm.gpu_memory_utilization or vllm.tensor_parallel_size"
            ) from error
        except BaseException:  # SIGTERM's: vLLM ends the processes that it knows of, not one that it is just about to start
            kill(children() - others)
            raise
        if broken:
            stop(engine, self._processes)
            fix = "export the checkpoint again"
            raise InputError([Problem(str(self._path), f"{name} holds NaN or infinity", fix) for name in sorted(broken)])
        return engine

    def close(self) -> None:
        """End vLLM's processes, and with them all that they hold on the device. It may come twice."""
        stop(self._engine, self._processes)

    def sample(
        self,
        prompts: Sequence[TokenIds],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        top_k: int = 0,
        lora: LoRARequest | None = None,
    ) -> Iterator[tuple[int, Sample]]:
        """As ``Engine.sample``, but ``Sample.entropy`` is an estimate from the drawn tokens: vLLM gives no distribution.

        Raises:
            EngineError: prompts that are empty or leave no room, before any is sampled; or vLLM died.
        """
        checked_lengths([len(prompt) for prompt in prompts], [max_new_tokens] * len(prompts), self._max_length, "vLLM")
        top_k = min(top_k, self._vocab_size)
        requests = {
            index: (
                list(map(int, prompt)),
                SamplingParams(
                    temperature=1.0,
                    seed=seed % 2**63,  # vLLM's are signed
                    max_tokens=max_new_tokens,
                    stop_token_ids=list(eos_ids),
                    ignore_eos=True,  # these end tokens and no others
                    logprobs=top_k,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        }
        try:
            for index, output in self._answers(requests, lora):
                answer = output.outputs[0]
                assert isinstance(answer.logprobs, FlatLogprobs), "as asked for"
                assert answer.finish_reason, "finished"
                logprobs, topk_ids, topk_logprobs = columns(answer.logprobs, top_k)
                ids = np.array(answer.token_ids, np.int32)
                yield index, Sample(ids, logprobs, -float(logprobs.mean()), answer.finish_reason, topk_ids, topk_logprobs)
        except EngineDeadError as error:
            raise EngineError(
                "vLLM's process died while sampling; its own messages are above. Where memory ran out, lower "
                "rollout.batch_size or vllm.gpu_memory_utilization"
            ) from error

    def score(
        self,
        prompts: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        *,
        top_k: int = 0,
        ids: Sequence[NDArray[np.int32]] | None = None,
        hidden: bool = False,
        lora: LoRARequest | None = None,
    ) -> Iterator[tuple[int, Scores]]:
        """As ``Engine.score``, without ``ids`` and ``hidden``, which a recipe with this engine cannot ask for.

        When vLLM dies, which it does when memory runs out, it is started again with half the tokens at once.

        Raises:
            EngineError: sequences that are empty or too long, before any is scored; or vLLM keeps dying.
        """
        if ids is not None or hidden:
            raise ValueError("vLLM neither scores given ids nor gives hidden states; use the transformers engine")
        lengths = checked_lengths(list(map(len, prompts)), list(map(len, responses)), self._max_length, "vLLM")
        top_k = min(top_k, self._vocab_size)
        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        waiting = deque(token_batches(lengths, self._batch_tokens))
        while waiting:
            batch = waiting.popleft()
            try:
                asked = {i: ([*map(int, prompts[i]), *map(int, responses[i])], params) for i in batch}
                found = dict(self._answers(asked, lora))
            except EngineDeadError as error:
                self._start_smaller(error)
                half = (len(batch) + 1) // 2
                waiting.extendleft(part for part in (batch[half:], batch[:half]) if part)
                continue
            for index in batch:
                given = found.pop(index).prompt_logprobs
                assert isinstance(given, FlatLogprobs), "as asked for"
                start = len(prompts[index]) - 1  # a row of each token but the first, which nothing predicts
                own, topk_ids, topk_logprobs = columns(given, top_k)
                yield index, Scores(own[start:], topk_ids[start:], topk_logprobs[start:])

    def _answers(self, requests: Mapping[int, Request], lora: LoRARequest | None) -> Iterator[tuple[int, RequestOutput]]:
        """Run requests to their end, and give each as it ends. Results are joined by id, never by order."""
        engine, open_ids = self._engine, set(requests)
        for index, (token_ids, params) in requests.items():
            engine.add_request(str(index), {"prompt_token_ids": token_ids}, params, lora_request=lora)
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    assert isinstance(output, RequestOutput), "no pooling was asked for"
                    assert output.finished, "nothing else was asked to be told"
                    open_ids.remove(int(output.request_id))
                    yield int(output.request_id), output
        except GeneratorExit:
            engine.abort_request([str(index) for index in open_ids])
            raise

    def _start_smaller(self, error: EngineDeadError) -> None:
        stop(self._engine, self._processes)
        if self._halvings == MAX_HALVINGS or self._batch_tokens == 1:
            raise EngineError(
                f"vLLM's process died {self._halvings + 1} times while scoring, at last with {self._batch_tokens} tokens at "
                "once; its own messages are above. Where memory ran out, lower vllm.gpu_memory_utilization, which leaves more "
                "to log-probabilities, or raise vllm.tensor_parallel_size"
            ) from error
        self._halvings += 1
        self._batch_tokens //= 2
        self._engine = self._start()


# --- Its processes --------------------------------------------------------------------------------------------------------


def stop(engine: LLMEngine, processes: Sequence[psutil.Process]) -> None:
    """End an engine, and wait until its processes are gone: the device may be wanted by the next one.

    vLLM alone may come back before: it waits neither for what it kills nor for an end that its watching thread has begun.
    """
    engine.renderer.shutdown()
    engine.engine_core.shutdown()
    for _ in range(2):
        deadline = time.monotonic() + GRACE
        while any(map(is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.01)
        kill(processes)


def children() -> set[psutil.Process]:
    """This process's, and theirs."""
    return set(psutil.Process().children(recursive=True))


def is_vllm(process: psutil.Process) -> bool:
    """By the name that vLLM gives its processes: Python's own for resources stays for the next engine."""
    try:
        return process.name().startswith("VLLM")
    except psutil.NoSuchProcess:
        return False


def is_alive(process: psutil.Process) -> bool:
    """One that has ended and waits to be read holds nothing any more. (``psutil.wait_procs`` would read it in vLLM's place.)"""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


# --- Its answers ----------------------------------------------------------------------------------------------------------


def columns(given: FlatLogprobs, top_k: int) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """What vLLM lays end to end, each token before the ``top_k`` most likely ones of its position.

    Returns:
        Log-probabilities of the tokens (L,), the most likely ids (L, K) and their log-probabilities (L, K).
    """
    values = np.array(given.logprobs, np.float32).reshape(-1, top_k + 1)
    ids = np.array(given.token_ids, np.int32).reshape(-1, top_k + 1)
    return values[:, 0], ids[:, 1:], values[:, 1:]
