"""Updates run on shapes alone: our own code, one process of many, no numbers and no memory, and the most bytes alive at once.

torch's FakeTensorMode runs every operator for the shape, type and storage of its result, so a model of any size goes through
`Student`, `update`, FSDP2 and the optimiser on a laptop. A process group of torch's "fake" backend answers every collective at
once with as many bytes as the real one would. What stays real are the token ids and where they stand, which decide on shapes.

What is counted is what the program holds: not fragments of the allocator, workspaces of kernels, or buffers of NCCL and CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from camopd import group
from camopd.config import Recipe
from camopd.engines.packing import PACKED
from camopd.student import Student
from camopd.update import make_optimizer, update

Result = TypeVar("Result")
GRAIN = 1e-5  # of the peak: what is smaller is seen together with the next larger tensor


@dataclass(frozen=True)
class Counted:
    """Bytes of one process.

    Attributes:
        peak: most alive at once during the update.
        state: alive after it: weights, gradients and moments.
    """

    peak: int
    state: int


class OnShapes(TorchDispatchMode):
    """Counts the storages that are alive, lets integers without fake inputs be computed, and answers a question for a number.

    Attributes:
        peak: most bytes that were alive at once since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = WeakIdKeyDictionary()

    @property
    def alive(self) -> int:
        """Bytes alive now; FSDP2 empties and fills storages in place, so their sizes are asked for each time."""
        return sum(storage.nbytes() for storage in list(self._alive))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on this process's part come here next
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # a loss or a norm: any finite number
        places = func.overloadpacket is torch.ops.aten.arange
        if places or (inputs and not any(isinstance(value, FakeTensor) for value in inputs)):
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        storages = [value.untyped_storage() for value in tree_leaves(result) if isinstance(value, Tensor)]
        new = [storage for storage in storages if storage not in self._alive]
        self._alive |= dict.fromkeys(new)
        if sum(storage.nbytes() for storage in new) > GRAIN * self.peak:  # adding up takes longer than all the rest
            self.peak = max(self.peak, self.alive)
        return result


@contextmanager
def on_shapes() -> Iterator[OnShapes]:
    """What is made inside has shapes and no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True), OnShapes() as counter:
        yield counter


def in_new_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """Call it in a process of its own, that has no process group yet and sees no GPU: shapes have none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# --- What is run ------------------------------------------------------------------------------------------------------------


def make_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """A model of a config.json, float32, with random weights where there are numbers; attention without padding."""
    options = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "layer_types")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **options)).eval()
    model.set_attn_implementation(PACKED)  # what `use_packing` settles on; its probe needs numbers
    return model


def make_row(prompt: int, response: int, vocab_size: int) -> dict[str, Any]:
    """A scored sample for the sampled-token signal, of random tokens."""
    rng = np.random.default_rng(response)
    return {
        "branch": "general",
        "prompt_ids": rng.integers(0, vocab_size, prompt, np.int32),
        "response_ids": rng.integers(0, vocab_size, response, np.int32),
        "logprobs": np.full(response, -12.0, np.float32),
        "teacher_logprobs": np.full(response, -11.5, np.float32),
    }


def count_update(config: Mapping[str, Any], recipe: Recipe, prompt: int, response: int, passes: int = 2) -> Counted:
    """Bytes of one of ``train.num_processes`` processes in an update after the first, which makes the moments.

    Args:
        config: of the model, as in config.json.
        recipe: what ``train`` says decides on precision, checkpointing and processes; the signal must be the sampled token.
        prompt: tokens of each prompt.
        response: tokens of each response.
        passes: of each process, as many samples each as ``train.batch_tokens`` allows; gradients stay from one to the next.
    """
    return in_new_process(_count_update, config, recipe, prompt, response, passes)


def _count_update(config: Mapping[str, Any], recipe: Recipe, prompt: int, response: int, passes: int) -> Counted:
    ranks, vocab_size = recipe.train.num_processes, config["vocab_size"]
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        group._current = group.Group(size=ranks)  # as one of many that say nothing
    together = max(recipe.train.batch_tokens // (prompt + response), 1) * ranks  # samples in a pass of all processes
    rows: Sequence[Mapping[str, Any]] = [make_row(prompt, response, vocab_size)] * (passes * together)
    with on_shapes() as counter:
        model = make_model(config)
        student, optimizer = Student(model, recipe.train), make_optimizer(model, recipe)
        update(student, optimizer, rows[:together], recipe=recipe, vocab_size=vocab_size)
        counter.peak = 0  # the first time DTensor finds out how tensors lie, with whole tensors of its own that hold nothing
        update(student, optimizer, rows, recipe=recipe, vocab_size=vocab_size)
        return Counted(counter.peak, counter.alive)
