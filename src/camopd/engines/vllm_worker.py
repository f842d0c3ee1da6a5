"""What runs inside vLLM's worker processes: its class is named to vLLM, which mixes it into its own worker.

Called by name over vLLM's RPC, so no function travels as a pickle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from camopd.engines.handover import digest, running_copy
from camopd.inputs.checks import nonfinite_parameters

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase


class WorkerExtension:
    """More methods for each worker."""

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

    def camopd_load(self: WorkerBase, path: str) -> None:  # type: ignore[misc]
        """Take the weights of a safetensors file in the place of those that the model has."""
        with safe_open(path, "pt") as file:
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
        for head in self.get_model().modules():
            if isinstance(head, ParallelLMHead):  # a tied one is not in the file, and on CPUs has a packed copy of its own
                head.quant_method.process_weights_after_loading(head)

    def camopd_digests(self: WorkerBase, path: str) -> dict[str, str]:  # type: ignore[misc]
        """sha256 of each tensor of a safetensors file: of what the model computes with in its place where that has the same
        form, which on GPUs without tensor parallel is everything; else of the file's own, which is what it was given."""
        model = self.get_model()
        running, fused = dict(model.named_parameters()), getattr(model, "packed_modules_mapping", {})
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            found = {}
            for name in shapes:
                own = running_copy(name, shapes, running, fused)
                found[name] = digest(file.get_tensor(name) if own is None else own)
        return found
