"""Models with LoRA adapters in memory, by PEFT: merged into their base, or beside it, several over one set of weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from camopd.adapters import PREFIX, TENSORS, TRAINED, USED, local_config, modules_of
from camopd.engines import Sample, Scores
from camopd.engines.transformers import TransformersEngine
from camopd.errors import InputError, Problem
from camopd.inputs.checks import nonfinite_parameters

_OTHER = "merging"


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add an adapter to the weights themselves."""
    config, tensors = read_adapter(folder)
    tuner = LoraModel(model, config, _OTHER)
    _fill(model, tensors, _OTHER, folder)
    tuner.merge_and_unload()  # in place
    return model.requires_grad_(True)


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Settings and float32 tensors of an adapter; nothing else of its folder is read, and no code is looked up.

    Raises:
        InputError: parameters that are NaN or infinite, named.
    """
    tensors = {name.removeprefix(PREFIX): tensor.float() for name, tensor in load_file(folder / TENSORS).items()}
    bad = nonfinite_parameters(tensors.items())
    if bad:
        raise InputError([Problem(str(folder), f"{name} holds NaN or infinity", "export the adapter again") for name in bad])
    given = local_config(folder)
    settings = {key: given[key] for key in USED if given.get(key) is not None}
    return LoraConfig(task_type="CAUSAL_LM", target_modules=modules_of(tensors), inference_mode=True, **settings), tensors


def add_adapter(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Put an adapter beside a model's weights, under a name."""
    config, tensors = read_adapter(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the model has another one already
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=model.device.type == "meta")
    _fill(model, tensors, name, folder)
    if TRAINED in model.peft_config:
        use(model, TRAINED)


def _fill(model: PreTrainedModel, tensors: Mapping[str, Tensor], name: str, folder: Path) -> None:
    if model.device.type == "meta":
        return  # no room for values
    try:
        result: Any = set_peft_model_state_dict(model, dict(tensors), name)
        wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{name}." in key)]
    except RuntimeError as error:  # shapes
        wrong = [" ".join(str(error).split())[:200]]
    if wrong:
        raise InputError([Problem(str(folder), f"does not fit the base: {wrong[0]}", "give the adapter's own base")])


def fresh_adapter(model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Put an adapter to be trained beside a model's weights, which are frozen by it. B is 0: the model computes what it did.

    Args:
        model: whole.
        rank: r.
        alpha: A B is scaled by alpha / r.
        targets: ends of module names; none are all linear layers but the output layer.
        seed: of A, drawn on the CPU, so the same on every machine.
    """
    torch.manual_seed(seed)
    chosen: Any = list(targets) or "all-linear"
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=chosen)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model, TRAINED, low_cpu_mem_usage=model.device.type == "meta")
    use(model, TRAINED)


# --- Which of them speaks -------------------------------------------------------------------------------------------------


def tuned_layers(model: PreTrainedModel) -> dict[str, LoraLayer]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def use(model: PreTrainedModel, name: str | None) -> None:
    """Let a model compute with one of its adapters, or with none. Only ``TRAINED`` has gradients."""
    for layer in tuned_layers(model).values():
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name, inference_mode=name != TRAINED)


@contextmanager
def speaking(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """``use`` for a while; then the adapter that learns is on again, where there is one."""
    use(model, name)
    try:
        yield
    finally:
        if TRAINED in getattr(model, "peft_config", {}):
            use(model, TRAINED)


class AdaptedEngine(TransformersEngine):
    """One of several models over one set of weights. See ``camopd.engines.Engine`` for the two methods' contract.

    Args:
        model: with its adapters.
        adapter: which of them speaks; None is the base alone.
        limits: those of ``TransformersEngine``.
    """

    def __init__(self, model: PreTrainedModel, adapter: str | None, **limits: int) -> None:
        super().__init__(model, **limits)
        self._adapter = adapter

    def _score_batch(self, *arguments: Any) -> list[Scores]:
        with speaking(self._model, self._adapter):
            return super()._score_batch(*arguments)

    def _sample_batch(self, *arguments: Any) -> list[Sample]:
        with speaking(self._model, self._adapter):
            return super()._sample_batch(*arguments)
