"""Several models over one base, which is loaded once: the base alone, and each of its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from camopd.engines import Engine, load_engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Key = TypeVar("Key")


@contextmanager
def open_engines(name: str, base: Path, adapters: Mapping[str, Path | None], **options: Any) -> Iterator[dict[str, Engine]]:
    """An engine for each model, closed at the end.

    Args:
        name: ``transformers`` or ``vllm``.
        base: local folder of the base.
        adapters: local folder of each model's adapter; None is the base alone.
        options: those of ``load_engine``.
    """
    if len(adapters) == 1:
        ((key, folder),) = adapters.items()
        with closing(load_engine(name, base, adapter=folder, **options)) as engine:
            yield {key: engine}
    elif name == "vllm":
        from camopd.engines.vllm import VllmEngine
        from camopd.engines.vllm_lora import VllmAdapter

        folders = [folder for folder in dict.fromkeys(adapters.values()) if folder is not None]
        with closing(load_engine(name, base, adapters=folders, **options)) as whole:
            assert isinstance(whole, VllmEngine)
            numbers = {folder: number for number, folder in enumerate(folders, 1)}
            yield {key: VllmAdapter(whole, numbers[at], at) if at else whole for key, at in adapters.items()}
    else:
        from camopd.engines.transformers import load_model

        limits = {key: options[key] for key in ("vocab_size", "batch_size", "batch_tokens")}
        yield engines_over(load_model(base), adapters, **limits)


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
