"""One copy of a model in a process of its own, and the messages that go between it and ``camopd.engines.replicas``.

``python -m camopd.engines.replica_worker FD`` answers on that pipe until it closes. A message is a line's worth of JSON and
arrays as they lie in memory: no object of Python's travels.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camopd.engines import Engine, Sample, Scores, TokenIds

Arrays = Sequence[NDArray[Any]]


def pack(header: Mapping[str, Any], arrays: Arrays = ()) -> bytes:
    """A message: the header's length, the header with each array's type and shape, the arrays."""
    shapes = [(array.dtype.str, array.shape) for array in arrays]
    head = json.dumps({**header, "arrays": shapes}).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *(array.tobytes() for array in arrays)])


def unpack(message: bytes) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Header and arrays of ``pack``."""
    start = 4 + int.from_bytes(message[:4], "little")
    header = json.loads(message[4:start])
    data, arrays = memoryview(bytearray(message[start:])), []
    for kind, shape in header.pop("arrays"):
        dtype = np.dtype(kind)
        size = dtype.itemsize * int(np.prod(shape))
        arrays.append(np.frombuffer(data[:size], dtype).reshape(shape))
        data = data[size:]
    return header, arrays


def end_to_end(rows: Sequence[TokenIds | NDArray[np.int32]]) -> list[NDArray[np.int32]]:
    """Rows as two arrays: their lengths, and all of them laid end to end."""
    lengths = np.array([len(row) for row in rows], np.int32)
    return [lengths, np.concatenate([np.asarray(row, np.int32) for row in rows])]


def apart(lengths: NDArray[np.int32], laid: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """The rows of ``end_to_end``."""
    return [laid[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]


def answers(engine: Engine, header: Mapping[str, Any], arrays: Arrays) -> Iterator[bytes]:
    """The message of each result of a task, each with the number that its request has in the task."""
    prompts, rest = apart(arrays[0], arrays[1]), arrays[2:]
    if header["method"] == "sample":
        for index, sample in engine.sample(prompts, rest[0].tolist(), **header["options"]):
            word = {"index": index, "entropy": sample.entropy, "finish_reason": sample.finish_reason}
            yield pack(word, [sample.token_ids, sample.logprobs, sample.topk_ids, sample.topk_logprobs])
        return
    ids = apart(rest[0], rest[2]) if len(rest) > 2 else None
    for index, scores in engine.score(prompts, apart(rest[0], rest[1]), ids=ids, **header["options"]):
        yield pack({"index": index}, [scores.logprobs, scores.topk_ids, scores.topk_logprobs])


def result(header: Mapping[str, Any], arrays: Arrays) -> tuple[int, Sample | Scores]:
    """What such a message holds."""
    if "entropy" not in header:
        logprobs, topk_ids, topk_logprobs = arrays
        return header["index"], Scores(logprobs, topk_ids, topk_logprobs)
    token_ids, logprobs, topk_ids, topk_logprobs = arrays
    sample = Sample(token_ids, logprobs, header["entropy"], header["finish_reason"], topk_ids, topk_logprobs)
    return header["index"], sample


def main(pipe: Connection) -> None:
    """Load the model, then answer tasks until the pipe closes; a failure is told and ends it."""
    from camopd.failures import described

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        settings = json.loads(pipe.recv_bytes())
        with closing(_load(settings)) as engine:
            pipe.send_bytes(pack({"done": True}))
            while True:
                header, arrays = unpack(pipe.recv_bytes())
                for message in answers(engine, header, arrays):
                    pipe.send_bytes(message)
                pipe.send_bytes(pack({"done": True}))
    except (EOFError, ConnectionError):
        return  # closed from the other side
    except Exception as error:  # whatever it is, the process that waits has to be told, and says it
        with suppress(ConnectionError):
            pipe.send_bytes(pack({"error": described(error)}))


def _load(settings: Mapping[str, Any]) -> Engine:
    from camopd.config import VLLM
    from camopd.engines import load_engine
    from camopd.runtime import set_threads

    set_threads(settings["num_threads"])
    options = dict(settings["engine"])
    adapter = options.pop("adapter", None)
    options |= {"adapter": Path(adapter) if adapter else None, "vllm": VLLM(**options.pop("vllm"))}
    return load_engine(options.pop("name"), Path(options.pop("path")), **options)


def _end_with_parent() -> None:
    """vLLM's processes are of this one's group and end with it."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
