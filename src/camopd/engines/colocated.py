"""vLLM on the device where the model trains: asleep while others compute, awake with that model's weights or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from camopd.engines.handover import check_taken, weights_file
from camopd.engines.vllm import Request, VllmEngine
from camopd.errors import EngineError

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.exceptions import EngineDeadError


class ColocatedVllm(VllmEngine):
    """A vLLM engine for the model that another process trains; asleep until ``awake``, and again after it.

    Asleep it holds neither weights nor cache on the device (vLLM's level 2). It takes the room for them back when it wakes, so
    ``gpu_memory_utilization`` must leave as much as the trainer keeps. On CPUs vLLM cannot give memory back: there sleep only
    stops it.
    """

    sleeps = True

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self._asleep = True
        self._engine.sleep(level=2)

    @contextmanager
    def awake(self, model: PreTrainedModel) -> Iterator[None]:
        """Sample and score within, with the weights that the model has now.

        Raises:
            EngineError: vLLM did not take the weights, took others, or has no room for them.
        """
        torch.cuda.empty_cache()  # what this process keeps for later it cannot have
        with weights_file(model, getattr(torch, self._settings.dtype)) as (path, expected):
            try:
                self._engine.wake_up(tags=["weights"])
                self._engine.collective_rpc("camopd_load", args=(str(path),))
                found = self._engine.collective_rpc("camopd_digests", args=(str(path),))
                self._engine.wake_up(tags=["kv_cache"])
            except Exception as error:  # as which vLLM hands on whatever its workers raise
                reason = " ".join(str(error).split())[:200]
                raise EngineError(
                    f"vLLM did not take over the trainer's weights: {reason}; its own messages are above. Where memory ran "
                    "out, lower vllm.gpu_memory_utilization, which must leave room for all that the trainer keeps"
                ) from error
        for rank, digests in enumerate(found):
            check_taken(expected, digests, rank)
        self._asleep = False
        try:
            yield
        finally:
            self._asleep = True
        self._engine.sleep(level=2)  # not after an error: vLLM may be what died

    def _answers(self, requests: Mapping[int, Request], lora: LoRARequest | None) -> Iterator[tuple[int, RequestOutput]]:
        assert not self._asleep, "its weights may be anything; see awake"
        yield from super()._answers(requests, lora)

    def _start_smaller(self, error: EngineDeadError) -> None:
        """A new start would come up with the weights of the first one."""
        raise EngineError("vLLM's process died while scoring; its own messages are above") from error
