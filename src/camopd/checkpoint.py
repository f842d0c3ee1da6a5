"""What is kept of the student between rounds: a model folder that anything can load, with the trainer's state beside it.

Each process writes what it holds and nothing more. Weights are whole tensors, so that transformers and vLLM read them: one
``model.safetensors``, or ``model-0000k-of-0000n.safetensors`` with an index, each process some of the tensors. The optimiser's
moments are parts of tensors, as FSDP has spread them, in the safetensors form of ``torch.distributed.checkpoint`` with the
offset of each part in the header, so that any other number of processes reads just its own parts back.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from camopd import plan as layout
from camopd.adapters import is_adapted
from camopd.errors import StoreError
from camopd.group import Group, current
from camopd.lora import Output
from camopd.plan import TRAINER, is_companion
from camopd.schedule import Schedule
from camopd.student import learning, on_host, whole

STATE = "trainer/state.json"
SHARDING = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint looks for the offsets


@dataclass(frozen=True)
class Snapshot:
    """What one process has to write of the student as it was at one moment, on the CPU.

    Attributes:
        model: its configuration is written, not its weights.
        weights: whole tensors that this process writes; of a student with an adapter, the base's, and none where the adapter is
            written alone.
        moments: this process's parts of the optimiser's tensors.
        offsets: where each part begins in its tensor; empty where tensors are whole.
        state: content of ``trainer/state.json``.
        lora: what is written of a student with an adapter.
        adapter: its whole tensors, on every process: they are small.
    """

    model: PreTrainedModel
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    offsets: Mapping[str, Sequence[int]]
    state: Mapping[str, Any]
    lora: Output | None = None
    adapter: Mapping[str, Tensor] = field(default_factory=dict)

    def write(
        self,
        folder: Path,
        group: Group,
        *,
        student: Path,
        template: bytes | None = None,
        finished: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Write this process's files of a model folder.

        Tokenizer and generation settings are the student's own files, byte for byte; the chat template is the one that rendered
        the prompts, which is another where the recipe names one.

        Args:
            folder: an empty one of this process's own.
            group: this process among those that write their parts at the same time.
            student: folder that the model was loaded from.
            template: the chat template, where there is one.
            finished: told of a large file that is written before others are.
        """
        rank, size = group.rank, group.size
        (folder / TRAINER).mkdir(parents=True)
        moments = folder / TRAINER / _file("optimizer", rank, size)
        weights = dict(self.weights) if self.lora is None else self.lora.merged_weights(self.model, self.weights, self.adapter)
        if self.lora is None or self.lora.merged:
            self._write_weights(folder, group, weights)
        for file in folder.glob("*.safetensors"):
            finished(file)
        offsets = {name: {"saved_offsets": list(begin)} for name, begin in self.offsets.items()}
        save_file(dict(self.moments), moments, {SHARDING: json.dumps(offsets)} if size > 1 else None)
        if rank == 0:
            if self.lora is not None:
                self.lora.write_adapter(folder, self.model, self.adapter)
            for path in student.iterdir():
                if path.is_file() and is_companion(path.name):
                    shutil.copyfile(path, folder / path.name)
            if template is not None:
                (folder / layout.TEMPLATE).write_bytes(template)
            (folder / STATE).write_text(json.dumps(self.state) + "\n")

    def _write_weights(self, folder: Path, group: Group, weights: dict[str, Tensor]) -> None:
        """One of the model's files, and of the first process the configuration and the index of all files."""
        rank, size = group.rank, group.size
        if size == 1:
            self.model.save_pretrained(folder, state_dict=weights)
            return
        file = folder / _file("model", rank, size)
        if rank == 0:
            self.model.save_pretrained(folder, state_dict=weights, max_shard_size=1 << 60)
            (folder / "model.safetensors").rename(file)
        else:  # save_pretrained writes nothing here; names and shapes are those that checkpoints have, as there
            save_file(revert_weight_conversion(self.model, weights), file, {"format": "pt"})
        with safe_open(file, "pt") as written:
            names = group.gather(sorted(written.keys()))
        if rank == 0:
            files = {name: _file("model", owner, size) for owner, own in enumerate(names) for name in own}
            own = [parameter for name, parameter in self.model.named_parameters() if not is_adapted(name)]
            size_of_all = sum(parameter.numel() * parameter.element_size() for parameter in own)
            index = {"metadata": {"total_size": size_of_all}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def snapshot(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    seed: int,
    copy: bool = False,
    lora: Output | None = None,
) -> Snapshot:
    """What this process has to write of the student; all processes that share it must call.

    It takes 12 bytes for each parameter of the model, divided by the number of processes, of the CPU's memory, where it is not
    there already. The generators' state is the seed: each round derives its own from it and the round's number.

    Args:
        model: the student.
        optimizer: of its parameters.
        schedule: where it stands.
        seed: of the recipe.
        copy: whether updates will go on before it is written.
        lora: what is written of a student with an adapter.
    """
    group = current()
    names = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}  # a tied one once
    kept = {names[id(tensor)]: tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) in names}
    adapter = {name: on_host(whole(tensor), copy=copy) for name, tensor in kept.items() if lora and tensor.requires_grad}
    if lora is not None:
        kept = {name: tensor for name, tensor in kept.items() if lora.merged and not is_adapted(name)}
    owners = shared_out({name: tensor.numel() for name, tensor in kept.items()}, group.size)
    weights = {}
    for name, tensor in kept.items():  # one after another, so that no device holds more than one of them whole
        everything = whole(tensor)
        if owners[name] == group.rank:
            weights[name] = on_host(everything, copy=copy)
    moments, offsets = {}, {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            name = f"{names[id(parameter)]}.{key}"
            if isinstance(value, DTensor):
                moments[name], offsets[name] = on_host(value.to_local(), copy=copy), value.__create_chunk_list__()[0].offsets
            elif group.rank == 0:  # the number of steps, the same everywhere
                moments[name], offsets[name] = on_host(value, copy=copy), [0] * value.ndim
    state = {"step": schedule.step, "cycle": schedule.cycle, "seed": seed}
    return Snapshot(model, weights, moments, offsets, state, lora, adapter)


def shared_out(sizes: Mapping[str, int], num_parts: int) -> dict[str, int]:
    """A part for each tensor, so that the parts' sizes are close: the largest layer first, each to the smallest part.

    The tensors of a layer stay together, since a model's tensors may be several of its checkpoint's or a piece of one.
    """
    layers = {name: match[0] if (match := re.match(r".*?\.\d+\.", name)) else name for name in sizes}
    layer_sizes = {layer: sum(size for name, size in sizes.items() if layers[name] == layer) for layer in layers.values()}
    totals, parts = [0] * num_parts, {}
    for layer in sorted(layer_sizes, key=lambda layer: (-layer_sizes[layer], layer)):
        parts[layer] = totals.index(min(totals))
        totals[parts[layer]] += layer_sizes[layer]
    return {name: parts[layer] for name, layer in layers.items()}


def _file(name: str, rank: int, size: int) -> str:
    return f"{name}.safetensors" if size == 1 else f"{name}-{rank + 1:05d}-of-{size:05d}.safetensors"


def load_state(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Give the optimiser its moments back and return the optimiser steps done.

    A process reads the parts that it holds itself, whatever the number of those that wrote them.

    Raises:
        StoreError: another model's state.
    """
    place = folder / TRAINER
    reader = HuggingFaceStorageReader(str(place))
    known = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {}
    for name, parameter in learning(model).items():
        state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        own = {f"{name}.{key}": value.detach() for key, value in state.items()}
        if any(key not in known or known[key].size != value.shape for key, value in own.items()):  # type: ignore[union-attr]
            raise StoreError(f"{place} has no moments for {name} as it is: the checkpoint belongs to another model")
        optimizer.state[parameter] = dict(zip(state, own.values(), strict=True))
        wanted |= own
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    return json.loads((folder / STATE).read_text())["step"]
