"""What can be known of a LoRA adapter without loading a model: its settings, its tensors, and whether they fit its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from camopd.adapters import PREFIX, TENSORS, Weights, is_target, modules_of, read_config, unsupported, vllm_rank
from camopd.errors import InputError, Problem
from camopd.inputs.checks import AGAIN, PICKLE, Shapes, check_file, read_header
from camopd.recipe.sections import Lora
from camopd.store import FileInfo, Store
from camopd.store.uris import join

OUTER = ("embed_tokens", "lm_head")  # what the losses and both engines read as it is
# Bits that are all set in NaN and infinity, and nowhere else: the exponent.
_EXPONENT = {
    "F64": (np.uint64, 0x7FF << 52),
    "F32": (np.uint32, 0xFF << 23),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


def check_adapter(where: str, weights: Weights, store: Store, base: Shapes, *, vllm: bool) -> list[Problem]:
    """Everything that is wrong with an adapter.

    Args:
        where: the parameter that names it.
        weights: the adapter and its base.
        store: where they lie.
        base: shape of each of the base's tensors; empty when they could not be read.
        vllm: whether vLLM is to load it.
    """
    uri = weights.adapter
    assert uri is not None
    files = {file.name: file for file in store.list(uri)}
    try:
        config = read_config(uri, store)
    except InputError as error:
        return list(error.problems)
    problems = [
        Problem(where, f"{uri} has {setting}, which not every engine follows", "merge it where it was made: merge_and_unload()")
        for setting in unsupported(config)
    ]
    if TENSORS not in files:
        what = f"has adapter_model.bin but no {TENSORS}; {PICKLE}" if "adapter_model.bin" in files else f"has no {TENSORS}"
        return [*problems, Problem(where, f"{uri} {what}", "save it with PEFT: save_pretrained(folder)")]
    shapes, damage = check_file(store, uri, files[TENSORS])
    problems += damage
    if damage or problems:  # what is no plain LoRA has other tensors
        return problems
    problems += _check_numbers(where, uri, config, shapes, vllm=vllm)
    problems += _check_fit(where, weights, shapes, base)
    return problems + _check_values(store, uri, files[TENSORS])


def _check_numbers(where: str, uri: str, config: Mapping[str, Any], shapes: Shapes, *, vllm: bool) -> list[Problem]:
    """Rank and alpha of the settings, and the ranks of the tensors."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        return [
            Problem(where, f"{uri}/adapter_config.json has r = {rank!r} and lora_alpha = {alpha!r}", "give the adapter's own")
        ]
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight")}
    if not config.get("rank_pattern") and ranks - {rank}:
        what = f"{uri} has tensors of rank {', '.join(map(str, sorted(ranks)))}, its adapter_config.json says r = {rank}"
        return [Problem(where, what, "give both files of one adapter")]
    try:
        vllm_rank(max(ranks, default=rank))
    except ValueError as error:
        return [Problem(where, f"{uri}: {error}", "use rollout.engine transformers, or merge the adapter")] if vllm else []
    return []


def _check_fit(where: str, weights: Weights, shapes: Shapes, base: Shapes) -> list[Problem]:
    """Whether each pair A (r, in) and B (out, r) belongs to a matrix (out, in) of the base."""
    wrong, modules = [], modules_of(list(shapes))
    names = {f"{PREFIX}{module}.lora_{side}.weight" for module in modules for side in "AB"}
    if not modules or names != shapes.keys():
        odd = sorted(names ^ shapes.keys())
        what = f"{weights.adapter} holds {odd[0] if odd else 'no tensors'}: it is not made of pairs lora_A and lora_B"
        return [Problem(where, what, AGAIN)]
    for module in modules if base else ():
        low, high = (shapes[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        own = base.get(f"{module}.weight")
        if module.rpartition(".")[2] in OUTER:
            wrong.append(f"{module} is an embedding or the output layer, which must stay as it is")
        elif own is None:
            wrong.append(f"{module} is no layer of it")
        elif len(low) != 2 or len(high) != 2 or (high[0], low[1]) != own or high[1] != low[0]:
            wrong.append(f"{module} is {own} there, and the adapter's matrices are {high} and {low}")
    if not wrong:
        return []
    what = f"{weights.adapter} does not fit its base {weights.base} in {len(wrong)} of {len(modules)} layers: {wrong[0]}"
    return [Problem(where, what, "set base to the model that it was trained on")]


def _check_values(store: Store, uri: str, file: FileInfo) -> list[Problem]:
    """Tensors with NaN or infinity, which the header does not show. Adapters are small enough to be read."""
    where = join(uri, TENSORS)
    header, length = read_header(store, where, file.size)
    data = store.read(where, 8 + length)
    broken, odd = [], []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _EXPONENT:
            odd.append(f"{name} is {entry['dtype']}")
            continue
        kind, mask = _EXPONENT[entry["dtype"]]
        bits = np.frombuffer(data[slice(*entry["data_offsets"])], kind)
        if ((bits & kind(mask)) == kind(mask)).any():
            broken.append(name)
    problems = (
        [Problem(where, f"{len(broken)} tensors hold NaN or infinity, {broken[0]} first", "export it again")] if broken else []
    )
    return problems + [Problem(where, f"{what}, not a float", "save it in float32 or bfloat16") for what in odd[:1]]


def check_lora(lora: Lora, student: Weights, store: Store, base: Shapes, *, vllm: bool) -> list[Problem]:
    """Whether ``train.lora`` can be done: over the adapter that the student is, or over the student's matrices."""
    problems = []
    if student.adapter is not None:
        given = read_config(student.adapter, store)
        told = {"rank": (lora.rank, given.get("r")), "alpha": (lora.alpha, given.get("lora_alpha"))}
        for name, (wanted, own) in told.items():
            if wanted is not None and wanted != own:
                what = f"{wanted:g} is not the {own} of {student.adapter}, which goes on learning"
                problems.append(
                    Problem(f"train.lora.{name}", what, "leave it out, or give a merged model to begin a new adapter")
                )
        if lora.targets is not None:
            what = f"{student.adapter} goes on learning in the layers that it has"
            problems.append(Problem("train.lora.targets", what, "leave it out"))
        return problems
    layers = [name.removesuffix(".weight") for name, shape in base.items() if len(shape) == 2 and name.endswith(".weight")]
    layers = [name for name in layers if name.rpartition(".")[2] not in OUTER]
    for target in lora.targets or ():
        if layers and not any(is_target(layer, target) for layer in layers):
            ends = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
            problems.append(Problem("train.lora.targets", f"{student.base} has no layer {target!r}", f"it has {ends}"))
    if vllm and lora.output == "adapter" and lora.rank is not None:
        try:
            vllm_rank(lora.rank)
        except ValueError as error:
            problems.append(Problem("train.lora.rank", str(error), 'lower it, or set output = "merged"'))
    return problems
