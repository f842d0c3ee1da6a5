"""What an estimate takes for granted: the GPU, what of it is reached, and how long prompts and responses are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from camopd.config import Branch, Recipe

GpuName = Literal["H100", "H200", "A100", "L40S"]
EngineName = Literal["transformers", "vllm"]
Dtype = Literal["bfloat16", "float32"]

GIGA, TERA = 1e9, 1e12
WIDTHS = {"bfloat16": 2, "float32": 4}  # bytes
TYPICAL = 1 / 8  # of the recipe's limit: the length of a prompt or a response where nobody says otherwise; a guess


@dataclass(frozen=True)
class Gpu:
    """Memory in GB (10^9 bytes), dense bfloat16 peak in TFLOP/s, memory bandwidth in TB/s."""

    memory: float
    peak: float
    bandwidth: float


# NVIDIA's data sheets of the SXM (H100, H200, A100 80 GB) and PCIe (L40S) cards; peaks are without sparsity.
GPUS: Mapping[GpuName, Gpu] = {
    "H100": Gpu(80, 989, 3.35),
    "H200": Gpu(141, 989, 4.8),
    "A100": Gpu(80, 312, 2.039),
    "L40S": Gpu(48, 362, 0.864),
}


@dataclass(frozen=True)
class Assumptions:
    """Everything that is not in the recipe or in a config.json. What is None follows from the rest.

    Attributes:
        gpu: a name of ``GPUS``; its three numbers hold where the next three are None.
        gpu_memory: GB of one GPU.
        peak: TFLOP/s of one GPU in the computation's type.
        bandwidth: TB/s of one GPU's memory.
        peak_share: of the peak, in everything but decoding. torchtitan's 5,762 tokens a second and H100 for Llama 3.1 8B at
            8,192 tokens, with FSDP (benchmarks/llama3_h100_202412_torchtitan.md), are 0.31 as ``work`` counts operations; its
            6,667 with torch.compile are 0.35.
        bandwidth_share: of the bandwidth, in decoding; a guess, to be replaced by a measurement.
        reserve: share of the memory that is left free for CUDA, NCCL and fragments; a guess.
        dtype: of the computation. Parameters that are trained, their gradients and moments are float32 in either case.
        engine: what samples; None is the recipe's. ``transformers`` decodes a batch until its longest response ends,
            ``vllm`` puts a new one in the place of each that ends.
        checkpointing: whether training keeps each layer's input alone and computes the rest again.
        start_minutes: from a GPU pod's start until it computes: image, process, weights. A guess.
        price: of a GPU-hour.
    """

    gpu: GpuName = "H100"
    gpu_memory: float | None = None
    peak: float | None = None
    bandwidth: float | None = None
    peak_share: float = 0.3
    bandwidth_share: float = 0.6
    reserve: float = 0.1
    dtype: Dtype = "bfloat16"
    engine: EngineName | None = None
    checkpointing: bool = True
    start_minutes: float = 3.0
    price: float | None = None

    @property
    def width(self) -> int:
        """Bytes of a number in the computation's type."""
        return WIDTHS[self.dtype]

    @property
    def usable_bytes(self) -> float:
        """Of one GPU: its memory without the reserve."""
        return (self.gpu_memory or GPUS[self.gpu].memory) * GIGA * (1 - self.reserve)

    @property
    def flops(self) -> float:
        """FLOP/s reached on one GPU: peak x share. float32 is taken as TF32, half of bfloat16 on all cards of ``GPUS``."""
        peak = self.peak or GPUS[self.gpu].peak * (1 if self.dtype == "bfloat16" else 0.5)
        return peak * TERA * self.peak_share

    @property
    def bytes_per_second(self) -> float:
        """Reached on one GPU: bandwidth x share."""
        return (self.bandwidth or GPUS[self.gpu].bandwidth) * TERA * self.bandwidth_share

    def refills(self, recipe: Recipe) -> bool:
        """Whether the engine puts new sequences in the place of finished ones."""
        return (self.engine or recipe.rollout.engine) != "transformers"


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of one branch.

    Attributes:
        prompt: tokens of a prompt.
        response: tokens of a response.
        kept: share of the samples that selection leaves to train on.
    """

    prompt: float
    response: float
    kept: float


def most_kept(branch: Branch) -> float:
    """The largest share of samples that selection can leave: ``mass``, with all gaps equal. The more a few samples hold the
    gap, the fewer are kept; a batch without any gap is kept whole (method section 4), which is not counted here."""
    return branch.mass


def typical_lengths(recipe: Recipe, share: float = TYPICAL) -> dict[str, Lengths]:
    """By branch, that share of the recipe's limits; 1 is the worst case."""
    prompt, response = recipe.prompts.max_prompt_tokens * share, recipe.rollout.max_new_tokens * share
    return {branch.name: Lengths(max(prompt, 1), max(response, 1), most_kept(branch)) for branch in recipe.branches}
