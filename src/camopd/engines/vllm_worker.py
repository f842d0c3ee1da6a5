"""What runs inside vLLM's worker processes: its class is named to vLLM, which mixes it into its own worker.

Called by name over vLLM's RPC, so no function travels as a pickle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from camopd.inputs.checks import nonfinite_parameters

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase


class WorkerExtension:
    """One more method for each worker."""

    def camopd_prepare(self: WorkerBase, vocab_size: int) -> list[str]:  # type: ignore[misc]  # vLLM makes it a base of the worker
        """Give ids from ``vocab_size`` on no probability, sampled or scored, and look for broken weights.

        Returns:
            Names of the parameters of this worker that hold NaN or infinity.
        """

        def mask(module: nn.Module, inputs: tuple[object, ...], logits: Tensor | None) -> None:
            if logits is not None:  # only one rank of a tensor-parallel group may have them
                logits[..., vocab_size:] = float("-inf")

        model = self.get_model()
        heads = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        if not heads:
            raise NotImplementedError(f"{type(model).__name__} makes its logits without vLLM's LogitsProcessor")
        for head in heads:
            head.register_forward_hook(mask)
        return nonfinite_parameters(model.named_parameters())
