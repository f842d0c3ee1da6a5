"""Does a 32,768-token response of an 8B model fit on one of 8 devices of 80 GB? As far as a machine without GPUs can say.

    nice python benchmarks/long_response.py     # some ten minutes on two cores; writes benchmarks/results/long_response.md

*Counted*: one of the processes of an update of Qwen3-8B, run by our own code on shapes alone (on_shapes.py): what is alive at
once, whole model, whole vocabulary, real lengths. Beside it what `camopd plan` says.

*Measured*: layers of the same widths with numbers in them, forward and backward pass in bfloat16 with layers computed again, as
one process of this machine does them; and the loss at the same width and vocabulary. Peak resident set (VmHWM) above what was
resident before, beside what is counted of the very same pass. Each in a fresh process. So that the counting is worth something.

Linux with glibc.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from cost import MIB, memory, resident
from on_shapes import Counted, OnShapes, count_update, in_new_process, make_model, make_row, on_shapes
from page import machine, table
from torch import Tensor

from camopd.config import Recipe, load_recipe
from camopd.estimate.assumptions import Assumptions
from camopd.estimate.memory import Memory, alone_parts, train_parts
from camopd.estimate.shapes import read_shape
from camopd.estimate.sources import SHIPPED
from camopd.losses import Sampled, Terms, chunked_objective
from camopd.student import Student
from camopd.update import rows_loss

RESULTS = Path(__file__).with_name("results") / "long_response.md"
RECIPE = Path(__file__).parents[1] / "recipes" / "medical-8b.toml"
CONFIG = json.loads((SHIPPED / "Qwen3-8B.json").read_text())
GIGA = 1e9
LENGTHS = (4_096, 16_384, 32_768)
LAYERS, TOKENS, LOSS_TOKENS = 1, 1_024, 512  # of the measured passes
FEW_IDS = 1_024  # vocabulary of the measured layers, so that they are what is seen


def recipe_for(response: int, num_processes: int) -> Recipe:
    """The 8B recipe with responses up to that length."""
    return load_recipe(RECIPE, {"rollout.max_new_tokens": response, "train.num_processes": num_processes})


# --- Counted beside the plan ------------------------------------------------------------------------------------------------


def counted_row(response: int, gpus: int) -> list[str]:
    """One line of the page: bytes of one GPU, counted and planned, of samples with the longest prompt and such a response."""
    begun = time.monotonic()
    recipe = recipe_for(response, gpus)
    found = count_update(CONFIG, recipe, recipe.prompts.max_prompt_tokens, response)
    print(f"{response} tokens, {gpus} GPUs: {found}, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return beside_the_plan(response, gpus, found)


def beside_the_plan(response: int, gpus: int, found: Counted) -> list[str]:
    parts = train_parts(read_shape(CONFIG, "Qwen3-8B"), recipe_for(response, gpus), Assumptions())
    planned = Memory(*parts, gpus).on_each(gpus)
    sizes = (found.state, found.peak - found.state, found.peak, planned)
    return [f"{response:,}", str(gpus), *(f"{size / GIGA:.1f}" for size in sizes), f"{found.peak / planned:.2f}"]


# --- Measured beside what is counted ----------------------------------------------------------------------------------------


def layers_peak(layers: int, tokens: int, *, real: bool) -> float:
    """Peak of ``Student.backward`` over one sample of so many tokens, beyond the float32 weights, bytes."""
    recipe = recipe_for(tokens, 1)
    config = CONFIG | {"num_hidden_layers": layers, "vocab_size": FEW_IDS}
    rows = [make_row(1, tokens, FEW_IDS)]
    with nullcontext() if real else on_shapes() as counter:
        torch.manual_seed(0)
        student = Student(make_model(config), recipe.train)
        before = start(counter)
        student.backward(lambda model: rows_loss(model, rows, recipe=recipe, vocab_size=FEW_IDS, num_selected=1))
        return peak(counter) - before


def loss_peak(tokens: int, bits: int, *, real: bool) -> float:
    """Peak of the loss's forward and backward pass beyond hidden states and the output layer's weight, bytes."""
    vocab_size, width = CONFIG["vocab_size"], CONFIG["hidden_size"]
    with nullcontext() if real else on_shapes() as counter:
        torch.manual_seed(0)
        dtype = {16: torch.bfloat16, 32: torch.float32}[bits]
        hidden_TD = torch.randn(tokens, width, dtype=dtype).requires_grad_()
        weight_VD = torch.randn(vocab_size, width, dtype=dtype).mul_(0.02).requires_grad_()
        targets_T, numbers_T = torch.zeros(tokens, dtype=torch.long), torch.full((tokens,), -12.0)
        before = start(counter)
        signal, terms = Sampled(numbers_T), Terms(numbers_T, numbers_T)
        loss, _ = chunked_objective(
            hidden_TD, weight_VD, targets_T, signal, terms, vocab_size=vocab_size, logits_mib=recipe_for(1, 1).train.logits_mib
        )
        loss.backward()
        assert isinstance(weight_VD.grad, Tensor)
        return peak(counter) - before


def start(counter: OnShapes | None) -> float:
    """Bytes held now; from here on the peak counts."""
    if counter is not None:
        counter.peak = counter.alive
        return counter.alive
    held = resident()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now (man 5 proc)
    return held


def peak(counter: OnShapes | None) -> float:
    return memory("VmHWM") if counter is None else counter.peak


def both(work: Any, *arguments: int) -> list[str]:
    """Counted, measured and their ratio, with the pass warmed up by nothing: kernels' own buffers are part of what is seen."""
    counted, seen = (in_new_process(_call, work.__name__, arguments, real) for real in (False, True))
    print(f"{work.__name__}{arguments}: counted {counted / GIGA:.2f} GB, resident {seen / GIGA:.2f} GB", file=sys.stderr)
    return [f"{counted / GIGA:.2f}", f"{seen / GIGA:.2f}", f"{seen / counted:.2f}"]


def _call(name: str, arguments: Sequence[int], real: bool) -> float:
    return globals()[name](*arguments, real=real)


# --- The page ---------------------------------------------------------------------------------------------------------------


def page(counted: Sequence[Sequence[str]], measured: Sequence[Sequence[str]]) -> str:
    recipe, shape = recipe_for(LENGTHS[-1], 8), read_shape(CONFIG, "Qwen3-8B")
    logits = LENGTHS[-1] * shape.vocab_size * 4 / GIGA
    alone = sum(alone_parts(shape, recipe, Assumptions()).values()) / GIGA
    parts = [
        "# A response of 32,768 tokens of an 8B model",
        f"`python benchmarks/long_response.py`, {machine()}. No GPU. What is counted and measured stands at the head of "
        "the script.",
        "## One GPU of an update of Qwen3-8B",
        f"`{RECIPE.name}`: bfloat16, layers computed again, prompts of {recipe.prompts.max_prompt_tokens:,} tokens before each "
        f"response, `train.logits_mib` {recipe.train.logits_mib}, the sampled token as signal, two passes a GPU. Counted by "
        "running the update on shapes, after one that makes the moments; GB (10^9 bytes) on each GPU. State: float32 weights, "
        "gradients and moments. The plan is `camopd plan`'s, before the tenth that it leaves free.",
        table(["response", "GPUs", "state", "beside it", "peak", "the plan says", "peak / plan"], counted),
        "Not counted: fragments of the allocator, kernels' workspaces, NCCL's and CUDA's own memory. Logits of the whole "
        f"response in float32 would be {logits:.1f} GB, and a log-softmax and its gradient are as large again each. On one GPU "
        f"alone the state is {16 * shape.parameters / GIGA:.0f} GB and {alone:.0f} GB come on top: 80 GB do not hold it, "
        "whatever the length.",
        "## The same passes with numbers in them",
        f"One process, width {shape.hidden:,}; the layers in bfloat16 with a vocabulary of {FEW_IDS:,} ids, the loss with "
        f"{shape.vocab_size:,}. GB beyond what was there before (float32 weights of the layers; hidden states and weight of "
        "the loss). A product in bfloat16 on this CPU packs its operands into copies, which are resident and not counted: of "
        f"the output layer {2 * shape.head / GIGA:.2f} GB each. In float32 there are none.",
        table(["", "tokens", "counted", "resident", "resident / counted"], measured),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, nargs="+", default=LENGTHS, help="tokens of the counted responses")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8], help="processes that share the counted updates")
    parser.add_argument("--layers", type=int, nargs="+", default=[LAYERS], help="measured layers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[TOKENS], help="tokens of the measured layers' passes")
    options = parser.parse_args()
    # Else glibc keeps large blocks in a heap that falls to pieces, and what is resident is not what is held.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    cases = [(response, gpus) for response in options.responses for gpus in options.gpus]
    with ThreadPoolExecutor(len(cases)) as pool:  # each waits for a process of its own; little memory, and no time is measured
        counted = list(pool.map(counted_row, *zip(*cases, strict=True)))
    measured = [
        [f"layers: {layers}", f"{tokens:,}", *both(layers_peak, layers, tokens)]
        for layers in options.layers
        for tokens in options.lengths
    ]
    measured += [[f"the loss, {bits} bits", f"{LOSS_TOKENS:,}", *both(loss_peak, LOSS_TOKENS, bits)] for bits in (32, 16)]
    counted_loss = in_new_process(_call, loss_peak.__name__, (LENGTHS[-1], 16), False)
    measured += [["the loss, 16 bits", f"{LENGTHS[-1]:,}", f"{counted_loss / GIGA:.2f}", "", ""]]
    text = page(counted, measured)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
