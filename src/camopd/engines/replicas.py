"""Several copies of one model on the GPUs of a pod, behind the interface of one.

Each copy is a process with its own GPUs, since decoding is Python that waits for no one's lock but its own. Requests go out in
the batches that one engine would make of them, longest first, many at a time in the beginning and one at a time in the end, so
that all copies finish together and results do not depend on their number.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from camopd.engines import Sample, Scores, TokenIds, sample_batches, token_batches
from camopd.engines.replica_worker import end_to_end, pack, result, unpack
from camopd.errors import EngineError, InputError, Problem
from camopd.failures import revived


@dataclass
class Replica:
    """A process with a copy of the model, this side of its pipe, and which requests it is working on."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    call: int = 0
    indices: Sequence[int] = field(default_factory=tuple)
    busy: bool = True


class Replicas:
    """Copies of a model. See ``camopd.engines.Engine`` for the methods' contract.

    Args:
        count: copies.
        gpus_each: GPUs of each.
        engine: arguments of ``load_engine``, JSON.

    Raises:
        InputError: fewer GPUs than the copies need, before one is loaded; or what loading found.
        EngineError: a copy that does not start.
    """

    def __init__(self, count: int, gpus_each: int, engine: Mapping[str, Any]) -> None:
        self._batch_size, self._batch_tokens = engine["batch_size"], engine["batch_tokens"]
        self._call = 0
        self._replicas: list[Replica] = []
        settings = json.dumps({"engine": dict(engine), "num_threads": threads_each(count)}).encode()
        try:
            for extra in visible_devices(count, gpus_each):
                self._replicas.append(start(extra))
                self._send(self._replicas[-1], settings)
            while any(replica.busy for replica in self._replicas):
                list(self._arrived())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes, and with them all that they hold on the devices."""
        for replica in self._replicas:
            end(replica.process)
            replica.pipe.close()
        self._replicas = []

    def sample(
        self,
        prompts: Sequence[TokenIds],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        top_k: int = 0,
    ) -> Iterator[tuple[int, Sample]]:
        lengths = [len(prompt) for prompt in prompts]
        longest_first = sample_batches(lengths, self._batch_size)
        options = {"max_new_tokens": max_new_tokens, "eos_ids": list(map(int, eos_ids)), "top_k": top_k}
        own_seeds = np.array(seeds, np.uint64)

        def task(chunk: list[int]) -> bytes:
            laid = end_to_end([prompts[i] for i in chunk])
            return pack({"method": "sample", "options": options}, [*laid, own_seeds[chunk]])

        for index, sample in self._run(longest_first, lambda i: (-lengths[i], i), task):
            assert isinstance(sample, Sample), "as asked for"
            yield index, sample

    def score(
        self,
        prompts: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        *,
        top_k: int = 0,
        ids: Sequence[NDArray[np.int32]] | None = None,
        hidden: bool = False,
    ) -> Iterator[tuple[int, Scores]]:
        """As ``Engine.score``, without ``hidden``: such states stay on the device of the process that made them."""
        if hidden:
            raise ValueError("hidden states do not travel between processes; use one engine in this one")
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        longest_first = list(token_batches(lengths, self._batch_tokens))[::-1]

        def task(chunk: list[int]) -> bytes:
            arrays = [*end_to_end([prompts[i] for i in chunk]), *end_to_end([responses[i] for i in chunk])]
            given = [] if ids is None else [np.concatenate([np.asarray(ids[i], np.int32) for i in chunk])]
            return pack({"method": "score", "options": {"top_k": top_k}}, arrays + given)

        for index, scores in self._run(longest_first, lambda i: (lengths[i], i), task):
            assert isinstance(scores, Scores), "as asked for"
            yield index, scores

    def _run(
        self, batches: Sequence[Sequence[int]], order: Callable[[int], tuple[int, int]], task: Callable[[list[int]], bytes]
    ) -> Iterator[tuple[int, Sample | Scores]]:
        """Hand out batches to whoever has nothing to do, and give each result as it comes.

        Args:
            batches: requests, those that take longest first.
            order: in which an engine sorts requests, so that it makes the same batches of several that came together.
            task: the message that asks for some requests.
        """
        self._call += 1
        waiting, open_requests = deque(batches), sum(map(len, batches))
        while open_requests:
            for replica in self._replicas:
                if not replica.busy and waiting:
                    count = max(1, len(waiting) // (2 * len(self._replicas)))
                    chunk = sorted((i for _ in range(count) for i in waiting.popleft()), key=order)
                    replica.busy, replica.call, replica.indices = True, self._call, chunk
                    self._send(replica, task(chunk))
            for replica, header, arrays in self._arrived():
                if replica.call == self._call:  # otherwise nobody waits for it any more
                    index, found = result(header, arrays)
                    open_requests -= 1
                    yield replica.indices[index], found

    def _send(self, replica: Replica, message: bytes) -> None:
        try:
            replica.pipe.send_bytes(message)
        except ConnectionError:
            self._fail(replica, {})

    def _arrived(self) -> Iterator[tuple[Replica, dict[str, Any], list[NDArray[Any]]]]:
        """Wait for a message at least. Those that say that a copy is done are noted, the others given."""
        by_pipe = {replica.pipe: replica for replica in self._replicas}
        for pipe in wait(list(by_pipe)):
            replica = by_pipe[pipe]  # type: ignore[index]  # wait gives what it got
            try:
                header, arrays = unpack(replica.pipe.recv_bytes())
            except (EOFError, ConnectionError):
                self._fail(replica, {})
            if "error" in header:
                self._fail(replica, header["error"])
            if "done" in header:
                replica.busy = False
            else:
                yield replica, header, arrays

    def _fail(self, replica: Replica, error: Mapping[str, Any]) -> NoReturn:
        """End all copies and raise what one of them met: an error of ours as it is."""
        number, count = self._replicas.index(replica) + 1, len(self._replicas)
        code = None if error else replica.process.wait()
        self.close()
        if error and "trace" not in error:
            raise revived(error)
        if error:
            sys.stderr.write(error["trace"])
            raise EngineError(f"replica {number} of {count} failed: {error['type']}, see its trace in the log of this step")
        how = "was killed, as happens where memory runs out" if code == -signal.SIGKILL else f"ended with exit code {code}"
        fix = "its own messages are above; where memory ran out, lower rollout.batch_size or score.batch_tokens"
        raise EngineError(f"replica {number} of {count} {how}; {fix}")


# --- Their processes ------------------------------------------------------------------------------------------------------


def start(environment: dict[str, str]) -> Replica:
    """A process with this one's path of imports. What it prints goes to standard error: a stage's output is its result."""
    ours, theirs = Pipe()
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "camopd.engines.replica_worker", str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": paths} | environment,
            stdin=subprocess.PIPE,  # never written to: it closes when this process is gone
            stdout=2,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a group of its own: what it starts ends with it
        )
    return Replica(process, ours)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started: nothing of them is wanted any more."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()  # waits, and closes its pipe


def visible_devices(count: int, gpus_each: int) -> list[dict[str, str]]:
    """What each copy's environment adds so that it sees its own GPUs; nothing on a machine that has none.

    Raises:
        InputError: there are fewer GPUs than needed.
    """
    import torch

    if not torch.cuda.is_available():
        return [{} for _ in range(count)]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = chosen.split(",") if chosen else [str(number) for number in range(torch.cuda.device_count())]
    if len(devices) < count * gpus_each:
        what = f"{count} replicas with {gpus_each} each need {count * gpus_each} GPUs, and there are {len(devices)}"
        raise InputError([Problem("rollout.replicas", what, "lower it, or ask for a pod with more")])
    starts = range(0, count * gpus_each, gpus_each)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + gpus_each])} for first in starts]


def threads_each(count: int) -> int:
    """CPU threads of each copy: this process's, which ``num_threads`` has set, divided where it is more than one."""
    import torch

    return max(1, torch.get_num_threads() // count)
