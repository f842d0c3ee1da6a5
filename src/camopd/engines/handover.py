"""Weights on their way from a trainer to an engine in another process: a file in shared memory, and a digest of each tensor.

A file, so that each process of a tensor-parallel engine takes its own part of it, and nothing travels as a pickle.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from camopd.errors import EngineError

SHARED_MEMORY = Path("/dev/shm")
SPARE = 2**26  # bytes of it that are left to others


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, wherever it lies."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


@contextmanager
def weights_file(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[Path, dict[str, str]]]:
    """A file with the model's weights as they are now, and the digest of each; the file is gone at the end.

    It lies in shared memory where that has room, else in the temporary folder. The host holds the weights twice meanwhile.

    Args:
        model: in memory, whole.
        dtype: of the engine; weights are rounded to it as the engine would.

    Yields:
        Where it is, and sha256 by the name that a checkpoint gives the tensor; tied tensors once.
    """
    weights = {name: weight.detach().to(dtype).cpu().contiguous() for name, weight in model.named_parameters()}
    size = sum(weight.nbytes for weight in weights.values())
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > size + SPARE
    with tempfile.TemporaryDirectory(prefix="camopd-", dir=SHARED_MEMORY if roomy else None) as folder:
        path = Path(folder, "weights.safetensors")
        save_file(weights, path)
        digests = {name: digest(weight) for name, weight in weights.items()}
        del weights
        yield path, digests


def running_copy(
    name: str, shapes: Mapping[str, Sequence[int]], running: Mapping[str, Tensor], fused: Mapping[str, Sequence[str]]
) -> Tensor | None:
    """What an engine computes with in the place of a checkpoint's tensor; None where it keeps that in another form.

    Args:
        name: of the tensor, ``model.layers.0.mlp.up_proj.weight``.
        shapes: of every tensor of the checkpoint.
        running: the engine's parameters by name.
        fused: what it puts one below the other in one parameter, ``{"gate_up_proj": ["gate_proj", "up_proj"]}``.
    """
    found = running.get(name)
    for whole, parts in fused.items():
        for index, part in enumerate(parts):
            if f".{part}." in name:
                own = [shapes.get(name.replace(f".{part}.", f".{other}."), (0,))[0] for other in parts]
                found = running.get(name.replace(f".{part}.", f".{whole}."))
                if found is not None and len(found) == sum(own):
                    found = found[sum(own[:index]) : sum(own[: index + 1])]
    return found if found is not None and list(found.shape) == list(shapes[name]) else None


def check_taken(expected: Mapping[str, str], found: Mapping[str, str], rank: int) -> None:
    """Whether a process of vLLM has the weights that it was given, by their digests.

    Raises:
        EngineError: it has others; some are named.
    """
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        raise EngineError(
            f"process {rank} of vLLM samples with other weights than the trainer's: {len(wrong)} of {len(expected)} tensors "
            f'differ, among them {", ".join(wrong[:3])}; use engine transformers, or execution "staged"'
        )
