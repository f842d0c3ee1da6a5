"""What is kept of the student between rounds: a model folder that anything can load, with the trainer's state beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from camopd import plan as layout
from camopd.errors import StoreError
from camopd.lora import Output
from camopd.schedule import Schedule
from camopd.student import gathered, learning, placed_like

OPTIMIZER = "trainer/optimizer.safetensors"
STATE = "trainer/state.json"
STEPS = "steps.json"


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    seed: int,
    student: Path,
    template: bytes | None = None,
    writes: bool = True,
    lora: Output | None = None,
) -> None:
    """Write a model folder that anything can load, with the trainer's state in ``trainer/``.

    The generators' state is the seed: each round derives its own from it and the round's number.
    Tokenizer and generation settings are the student's own files, byte for byte; the chat template is the one that rendered the
    prompts, which is another where the recipe names one.

    Processes that share the model hand their parts to the one that writes, so the folder is the same whatever their number, and
    the next round may have another. That one needs memory for the weights and moments of the whole model, 12 bytes a parameter.

    Args:
        folder: where to write.
        model: the student.
        optimizer: of its parameters.
        schedule: where it stands.
        seed: of the recipe.
        student: folder that the model was loaded from.
        template: the chat template, where there is one.
        writes: whether this process is the one; all of them must call.
        lora: what to write of a student with an adapter.
    """
    names = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}  # a tied one once
    own = ((names[id(tensor)], tensor) for tensor in (*model.parameters(), *model.buffers()) if id(tensor) in names)
    weights = gathered(own if lora is None else lora.tensors(model), keep=writes)
    moments = gathered(
        (
            (f"{names[id(parameter)]}.{key}", value)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        ),
        keep=writes,
    )
    if not writes:
        return
    if lora is None:
        model.save_pretrained(folder, state_dict=weights)
    else:
        lora.write(folder, model, weights)
    for path in student.iterdir():
        if path.is_file() and is_companion(path.name):
            shutil.copyfile(path, folder / path.name)
    if template is not None:
        (folder / layout.TEMPLATE).write_bytes(template)
    (folder / OPTIMIZER).parent.mkdir(exist_ok=True)
    save_file(moments, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps({"step": schedule.step, "cycle": schedule.cycle, "seed": seed}) + "\n")


def is_companion(name: str) -> bool:
    """Whether a file of a model folder belongs to the tokenizer or generation: neither weights nor what we write ourselves."""
    ours = {"config.json", "adapter_config.json", "manifest.json", STEPS}
    return name not in ours and not name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".pt", ".md"))


def load_state(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Give the optimiser its moments back and return the optimiser steps done. Raises StoreError on another model's state."""
    with safe_open(folder / OPTIMIZER, "pt") as moments:
        known = set(moments.keys())
        for name, parameter in learning(model).items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in known]
            if len(keys) != 3:
                raise StoreError(f"{folder / OPTIMIZER} has no moments for {name}: the checkpoint belongs to another model")
            optimizer.state[parameter] = {key: placed_like(moments.get_tensor(f"{name}.{key}"), parameter) for key in keys}
    return json.loads((folder / STATE).read_text())["step"]
