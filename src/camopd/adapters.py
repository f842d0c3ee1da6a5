"""LoRA adapters: which folders are one, over which base each lies, and what of PEFT's format is understood. Light imports only.

An adapter is a folder with adapter_config.json and adapter_model.safetensors, as ``PeftModel.save_pretrained`` writes it: for
some of its base's matrices W two small ones, which stand for W + alpha / r B A (LoRA, arXiv:2106.09685).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camopd.errors import InputError, Problem, StoreError
from camopd.store import Store, digest
from camopd.store.uris import check_uri, is_s3, join

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WHOLE = ("model.safetensors", "model.safetensors.index.json")  # a folder with one of them is a model, whatever else it holds
PREFIX = "base_model.model."  # before each module's name in PEFT's files
TRAINED = "student"  # in memory, the name of the adapter that learns
RANK = 16  # of a new adapter, where the recipe names none
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has kernels (vllm.config.lora.MaxLoRARanks)


@dataclass(frozen=True)
class Weights:
    """Where a model's weights lie.

    Attributes:
        base: folder of a whole model.
        adapter: folder of a LoRA adapter over it; None is the model as it is.
    """

    base: str
    adapter: str | None = None

    @property
    def locations(self) -> tuple[str, ...]:
        """The folders, the base first."""
        return (self.base,) if self.adapter is None else (self.base, self.adapter)


def is_adapter(uri: str, store: Store) -> bool:
    """Whether the folder is an adapter and not a whole model."""
    return store.stat(join(uri, CONFIG)) is not None and not any(store.stat(join(uri, name)) for name in WHOLE)


def weights_at(uri: str, store: Store, base: str | None = None, *, where: str = "base") -> Weights:
    """The weights that a model's location stands for.

    Args:
        uri: folder of a model or of an adapter.
        store: where it lies.
        base: under every adapter; None asks the adapter itself.
        where: the parameter that names the model.

    Raises:
        InputError: an adapter whose base nobody names.
    """
    if not is_adapter(uri, store):
        return Weights(uri)
    named = read_config(uri, store).get("base_model_name_or_path")
    found = base or _reachable(named, store)
    if found is None:
        says = f"names as its base {str(named)[:200]!r}, which is no place of a model" if named else "does not name its base"
        what = f"{uri} is an adapter and {says}"
        raise InputError([Problem(where, what, "set base = to where the model lies that it was trained on")])
    return Weights(found, uri)


def _reachable(named: Any, store: Store) -> str | None:
    """What an adapter's config calls its base, where that is a place: a name of a hub is none, nor is a relative path."""
    try:
        uri = check_uri(named) if isinstance(named, str) else ""
        found = (is_s3(uri) or uri.startswith("/")) and store.stat(join(uri, "config.json")) is not None
    except (ValueError, StoreError):
        return None
    return uri if found else None


def read_config(uri: str, store: Store) -> dict[str, Any]:
    """An adapter's settings. Raises InputError when they are not a JSON table."""
    return parse_config(join(uri, CONFIG), store.read(join(uri, CONFIG)))


def parse_config(where: str, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError([Problem(where, "is not a JSON table of settings", "save the adapter again with PEFT")])
    return found


def content_id(weights: Weights, store: Store) -> str:
    """Identity of a model: of its folder, or of base and adapter together."""
    base = store.content_id(weights.base)
    return base if weights.adapter is None else digest({"base": base, "adapter": store.content_id(weights.adapter)})


def tokenizer_folder(weights: Weights, store: Store) -> str:
    """Where the model's tokenizer lies: with the adapter, where that has one, else with the base."""
    own = weights.adapter
    return own if own is not None and store.stat(join(own, "tokenizer_config.json")) else weights.base


def is_adapted(parameter: str) -> bool:
    """Whether a parameter of a model in memory belongs to an adapter, by its name."""
    return ".lora_" in parameter


def vllm_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds an adapter's. Raises ValueError above the largest."""
    for allowed in VLLM_RANKS:
        if allowed >= rank:
            return allowed
    raise ValueError(f"rank {rank} is above {VLLM_RANKS[-1]}, the largest that vLLM takes")


# --- What an adapter's files say ------------------------------------------------------------------------------------------

# Keys of adapter_config.json that shape what an adapter computes and that both engines know.
USED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# Those that only say how it was made or found its layers, whose names the tensors tell.
IGNORED = (
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",  # off outside of training, and here in training, too: it would tell trainer and engine apart
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
)
# Ways to begin that leave the base as it is. Others (PiSSA, OLoRA, LoftQ, ...) are differences to a base that was changed.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """Settings of an adapter that not both engines follow, as ``key = value``."""
    shown = []
    if config.get("peft_type") != "LORA":
        shown.append(("peft_type", config.get("peft_type")))
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        shown.append(("task_type", config["task_type"]))
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        shown.append(("init_lora_weights", config["init_lora_weights"]))
    known = {*USED, *IGNORED, "init_lora_weights"}
    shown += [
        (key, value) for key, value in config.items() if key not in known and value not in (None, False, "none", [], {}, "")
    ]
    return [f"{key} = {json.dumps(value)[:80]}" for key, value in shown]


def modules_of(names: Mapping[str, Any] | list[str]) -> list[str]:
    """The base's modules that an adapter's tensors belong to, sorted."""
    return sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in names})


def is_target(module: str, target: str) -> bool:
    """PEFT's rule: a target is a module's whole name, or the end of it from a dot on."""
    return module == target or module.endswith(f".{target}")


def local_config(folder: Path) -> dict[str, Any]:
    """``read_config`` of a local copy."""
    return parse_config(str(folder / CONFIG), (folder / CONFIG).read_bytes())
