"""Several models over one base, which is loaded once: the base alone, and each of its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from camopd.engines import Engine, check_installed, load_engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Key = TypeVar("Key")


@contextmanager
def open_engines(name: str, base: Path, adapters: Mapping[Key, Path | None], **options: Any) -> Iterator[dict[Key, Engine]]:
    """An engine for each model, closed at the end: what they held on the device is free again.

    Args:
        name: ``transformers`` or ``vllm``.
        base: local folder of the base.
        adapters: local folder of each model's adapter; None is the base alone.
        options: those of ``load_engine``; ``replicas`` counts for one model alone.
    """
    check_installed(name)
    limits = {key: options[key] for key in ("vocab_size", "batch_size", "batch_tokens")}
    if len(adapters) == 1:
        ((key, folder),) = adapters.items()
        engines = {key: load_engine(name, base, adapter=folder, **options)}
    elif name == "vllm":
        engines = vllm_over(base, adapters, **limits, max_length=options["max_length"], settings=options["vllm"])
    else:
        from camopd.engines.transformers import load_model

        engines = engines_over(load_model(base), adapters, **limits)
    try:
        yield engines
    finally:
        for engine in set(engines.values()):
            engine.close()


def vllm_over(base: Path, adapters: Mapping[Key, Path | None], **options: Any) -> dict[Key, Engine]:
    """An engine for each of several models in one vLLM, which ends when one of them is closed.

    Args:
        base: local folder of the base.
        adapters: as in ``open_engines``.
        options: those of ``VllmEngine``.
    """
    from camopd.engines.vllm import VllmEngine
    from camopd.engines.vllm_lora import VllmAdapter

    folders = [folder for folder in dict.fromkeys(adapters.values()) if folder]
    whole = VllmEngine(base, **options, adapters=folders)
    engines: dict[Path | None, Engine] = {at: VllmAdapter(whole, number, at) for number, at in enumerate(folders, 1)}
    engines[None] = whole
    return {key: engines[at] for key, at in adapters.items()}


def engines_over(model: PreTrainedModel, adapters: Mapping[Key, Path | None], **limits: int) -> dict[Key, Engine]:
    """An engine for each of several models over one that is in memory; their adapters are put beside its weights.

    Args:
        model: the base, which may have adapters already.
        adapters: as in ``open_engines``.
        limits: those of ``TransformersEngine``.
    """
    from camopd.engines.transformers import TransformersEngine

    folders = [folder for folder in dict.fromkeys(adapters.values()) if folder]
    if not folders and not hasattr(model, "peft_config"):
        engine = TransformersEngine(model, **limits)
        return dict.fromkeys(adapters, engine)
    from camopd.engines.lora import AdaptedEngine, add_adapter

    names = {folder: f"adapter{number}" for number, folder in enumerate(folders)}
    for folder, name in names.items():
        add_adapter(model, name, folder)
    engines = {at: AdaptedEngine(model, names[at] if at else None, **limits) for at in dict.fromkeys(adapters.values())}
    return {key: engines[at] for key, at in adapters.items()}
