"""LoRA adapters in vLLM: several models served from one base in its memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from vllm.lora.request import LoRARequest

from camopd.adapters import TENSORS, modules_of, vllm_rank
from camopd.engines import Sample, Scores

if TYPE_CHECKING:
    from camopd.engines.vllm import VllmEngine


def lora_arguments(adapters: Sequence[Path]) -> dict[str, Any]:
    """vLLM's arguments for a base with adapters; none without one.

    Its head must stay as it is: with a LoRA layer around it vLLM 0.32 mixes up prompt log-probabilities. So the layers that
    adapters have are named.
    """
    if not adapters:
        return {}
    ranks, targets = set(), set()
    for folder in adapters:
        with safe_open(folder / TENSORS, "np") as tensors:
            names = list(tensors.keys())
            ranks |= {tensors.get_slice(name).get_shape()[0] for name in names if name.endswith(".lora_A.weight")}
        targets |= {module.rpartition(".")[2] for module in modules_of(names)}
    return {
        "enable_lora": True,
        "max_loras": len(adapters),
        "max_lora_rank": vllm_rank(max(ranks)),
        "lora_target_modules": sorted(targets),
    }


class VllmAdapter:
    """One of the models of an engine with adapters. See ``camopd.engines.Engine`` for the two methods' contract.

    Args:
        engine: the base with all adapters.
        number: which of them, from 1.
        folder: where it lies.
    """

    def __init__(self, engine: VllmEngine, number: int, folder: Path) -> None:
        self._engine, self._request = engine, LoRARequest(folder.as_posix(), number, str(folder))

    def sample(self, *arguments: Any, **options: Any) -> Iterator[tuple[int, Sample]]:
        return self._engine.sample(*arguments, **options, lora=self._request)

    def score(self, *arguments: Any, **options: Any) -> Iterator[tuple[int, Scores]]:
        return self._engine.score(*arguments, **options, lora=self._request)

    def close(self) -> None:
        """End vLLM's processes, and with them the other models of the engine."""
        self._engine.close()
