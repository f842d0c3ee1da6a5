"""The model that learns: in which precision it computes, over how many processes it lies, and how its gradients are made.

One process holds the whole of it. Several share it by FSDP2 (``torch.distributed.fsdp.fully_shard``): each holds an equal part
of every parameter, of its float32 gradient and of the optimiser's moments, and sees a layer whole only while it computes there.
The first process alone has to have read the weights: the others' may be on the meta device, which takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from camopd.config import Train
from camopd.engines.transformers import device
from camopd.errors import InputError, Problem, WorkerError
from camopd.group import current

Seen = TypeVar("Seen")
LossOf = Callable[[PreTrainedModel], tuple[Tensor, Seen]]


class Student(nn.Module):
    """A model and what ``train`` says of its computation. Weights, gradients and moments are float32 in any case.

    Args:
        model: in evaluation mode, on its device; where it is to be spread, which moves it layer by layer, on the CPU of the
            first process and anywhere, or on ``meta``, of the others, whose values become the first one's.
        train: precision and activation checkpointing. Where this process has joined a group, all of it share the model.

    Attributes:
        model: the same model; spread, its parameters are ``DTensor``.
        rank: number of this process.
        num_ranks: how many processes share the updates.

    Raises:
        InputError: activation checkpointing of an architecture whose layers are not known.
        WorkerError: processes whose models differ in form.
    """

    def __init__(self, model: PreTrainedModel, train: Train) -> None:
        super().__init__()
        self.model, self._dtype = model, getattr(torch, train.precision)
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if train.activation_checkpointing:
            _checkpoint(layers, model)
        group = current()
        self.rank, self.num_ranks = group.rank, group.size
        if self.num_ranks > 1:
            self._spread(layers)

    def _spread(self, layers: Iterable[nn.Module]) -> None:
        """A group a layer, and one of all the rest: embedding and output layer, which may be one tensor, are whole throughout
        ``forward``, so that a loss may read the weight and hand it a gradient like any other."""
        agree(self.model)
        mesh = init_device_mesh(device().type, (self.num_ranks,))
        policy = MixedPrecisionPolicy(param_dtype=self._dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*layers, self):
            receive(part)
            fully_shard(part, mesh=mesh, mp_policy=policy)
            assert isinstance(part, FSDPModule)
            part.set_gradient_divide_factor(1.0)  # a loss is a sum over samples, wherever they are
            part.set_force_sum_reduction_for_comms(True)  # the default for a factor of one's own is NCCL's alone

    def forward(self, loss_of: LossOf[Seen]) -> tuple[Tensor, Seen]:
        """``loss_of(model)``, where FSDP has the weights whole."""
        return loss_of(self.model)

    def backward(self, loss_of: LossOf[Seen]) -> tuple[Tensor, Seen]:
        """Add the gradient of a loss to the parameters' float32 gradients. Every process of the group must call it as often.

        In bfloat16 the weights are rounded for the pass, and the gradients are summed in float32.

        Args:
            loss_of: the loss of a model, a scalar, and what else is to be kept of the pass.
        """

        def run(model: PreTrainedModel) -> tuple[Tensor, Seen]:
            loss, seen = loss_of(model)
            loss.backward()
            return loss.detach(), seen

        if self.num_ranks > 1:
            loss, seen = self(loss_of)
            loss.backward()
            return loss.detach(), seen
        if self._dtype == torch.float32:
            return run(self.model)
        rounded = {name: parameter.to(self._dtype) for name, parameter in self.named_parameters()}
        return functional_call(self, rounded, (run,))  # the backward pass in it, since checkpointed layers compute again

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of numbers over the processes, the same on each."""
        if self.num_ranks > 1:
            dist.all_reduce(numbers)
        return numbers


def _checkpoint(layers: Iterable[nn.Module], model: PreTrainedModel) -> None:
    """Keep of each layer its input alone and compute the rest again in the backward pass.

    transformers' own switch needs the layers in training mode, where dropout would tell trainer and engine apart.
    """
    if not layers:
        where, what = "train.activation_checkpointing", f"the layers of {type(model).__name__} are not known"
        raise InputError([Problem(where, what, "set it to false")])
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]


# --- From the process that has read the weights to the others -------------------------------------------------------------


def agree(model: PreTrainedModel) -> None:
    """Take over how the first process's model attends, which it has tried out. All processes must call.

    Raises:
        WorkerError: its tensors are others than this one's, so that they cannot be received one after another.
    """
    form = {name: list(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    attention, first = current().gather([model.config._attn_implementation, form])[0]
    if form != first:
        raise WorkerError(
            f"{model.config.name_or_path} has other tensors on process {current().rank + 1} than on the first; "
            "if config.json ties some that differ in the files, set tie_word_embeddings to false there"
        )
    model.set_attn_implementation(attention)


@torch.no_grad()
def receive(part: nn.Module) -> None:
    """Bring a module's tensors, but those that are spread already, onto the device with the values of the first process.

    One after another; parameters stay the objects that they were, tied ones tied. All processes must call.
    """
    for tensor in (*part.parameters(), *part.buffers()):
        if isinstance(tensor, DTensor):
            continue
        if not tensor.is_meta:
            tensor.data = tensor.to(device())
        else:
            room = torch.empty_like(tensor, device=device())
            is_parameter = isinstance(tensor, nn.Parameter)
            torch.utils.swap_tensors(tensor, nn.Parameter(room, tensor.requires_grad) if is_parameter else room)
        dist.broadcast(tensor.detach(), src=0)


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that updates change: all, or those of an adapter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- Tensors of one process or of several ---------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over the processes, on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_host(tensor: Tensor, *, copy: bool = False) -> Tensor:
    """The tensor on the CPU, without its history; with ``copy`` it stays as it is now whatever becomes of the original."""
    return tensor.detach().to("cpu", copy=copy).contiguous()
