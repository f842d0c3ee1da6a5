"""An adapter that learns (``train.lora``): how a round's student is put together, and what its checkpoints hold.

The base is the domain model, or the base under it where the domain model is an adapter, which then goes on learning. Its
weights are frozen and stay where they are; a checkpoint holds what has been learnt.

PEFT is imported where there is an adapter and not before: without one there is no need of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, device
from transformers import PreTrainedModel

from camopd.adapters import CONFIG, PREFIX, RANK, TENSORS, TRAINED, Weights
from camopd.engines.transformers import load_model
from camopd.plan import Plan
from camopd.schedule import seed_of
from camopd.store import Store

BESIDE = "trainer/adapter"  # in a merged checkpoint: the adapter by itself, which the next round goes on with


@dataclass(frozen=True)
class Output:
    """What of a student with an adapter a checkpoint holds.

    Attributes:
        base: location of the model under the adapter.
        merged: the whole model, with the adapter beside the trainer's state; else the adapter alone.
    """

    base: str
    merged: bool

    @classmethod
    def of(cls, plan: Plan, store: Store) -> Output | None:
        """None where all weights learn."""
        lora = plan.recipe.train.lora
        return cls(plan.weights(plan.recipe.student, store).base, lora.output == "merged") if lora else None

    def merged_weights(
        self, model: PreTrainedModel, weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weights of the whole model that base and adapter stand for, under the names of a model without adapters.

        Args:
            model: whose adapter it is.
            weights: of the base, all or some, by the model's parameter names.
            adapter: all of its tensors by the model's parameter names.
        """
        found = {}
        for name, tensor in weights.items():
            module, inner, part = name.partition(".base_layer.")
            names = [f"{module}.lora_{side}.{TRAINED}.weight" for side in "AB"]
            if part == "weight" and names[0] in adapter:
                low, high = (adapter[own] for own in names)
                scaling: Any = model.get_submodule(module).scaling
                tensor = tensor + scaling[TRAINED] * (high @ low)
            found[f"{module}.{part}" if inner else name] = tensor
        return found

    def write_adapter(self, folder: Path, model: PreTrainedModel, adapter: Mapping[str, Tensor]) -> None:
        """Write the adapter in its place in a checkpoint, as PEFT does, the same bytes each time."""
        place = folder / BESIDE if self.merged else folder
        place.mkdir(parents=True, exist_ok=True)
        named = {PREFIX + name.replace(f".{TRAINED}.", "."): tensor for name, tensor in adapter.items()}
        save_file(named, place / TENSORS, metadata={"format": "pt"})
        given: Any = model.peft_config[TRAINED]  # type: ignore[index]
        config = given.to_dict() | {"base_model_name_or_path": self.base, "inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        (place / CONFIG).write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_weights(weights: Weights, store: Store, where: device | None = None) -> PreTrainedModel:
    """``load_model``; an adapter is merged into its base, so that the model is one like others.

    Args:
        weights: where they lie.
        store: brings them here.
        where: device, as of ``load_model``.

    Raises:
        InputError: parameters that are missing, NaN or infinite, or an adapter of another base.
    """
    model = load_model(store.fetch(weights.base), where)
    if weights.adapter is None or model.device.type == "meta":  # which has the form that it has merged
        return model
    from camopd.engines.lora import merge

    return merge(model, store.fetch(weights.adapter))


def load_student(plan: Plan, checkpoint: Path | None, store: Store, where: device | None = None) -> PreTrainedModel:
    """The student as a round begins with it; with ``train.lora`` its adapter alone has gradients.

    Args:
        plan: the run's plan.
        checkpoint: local folder of the one to go on from; None begins with the domain model.
        store: where the models lie.
        where: device, as of ``load_model``.
    """
    recipe, lora = plan.recipe, plan.recipe.train.lora
    domain = plan.weights(recipe.student, store)
    if lora is None:
        return load_weights(domain, store, where) if checkpoint is None else load_model(checkpoint, where)
    from camopd.engines.lora import add_adapter, fresh_adapter

    model = load_model(store.fetch(domain.base), where)
    if checkpoint is not None:
        add_adapter(model, TRAINED, checkpoint / BESIDE if lora.output == "merged" else checkpoint)
    elif domain.adapter is not None:
        add_adapter(model, TRAINED, store.fetch(domain.adapter))
    else:
        rank = lora.rank or RANK
        seed = seed_of(recipe.seed, "train", "lora")
        fresh_adapter(model, rank=rank, alpha=lora.alpha or 2 * rank, targets=lora.targets or (), seed=seed)
    return model
