"""What one update costs: seconds and peak memory against batch, response length and vocabulary; and the loss's memory alone.

    python benchmarks/cost.py             # ten minutes; writes benchmarks/results/cost.md and docs/images/cost.svg

The curves: random Qwen3 models of one shape; one of batch, length and vocabulary varies, the others stay at their base. Every
response has the full length. Rollout, teacher (its top 8) and update (top-k signal, every sample) are those of a recovery.
Every point is a fresh process of one thread. Seconds are its processor time. Peak memory is its largest resident set (VmHWM,
set back before each part, when what is free has gone back to the system) above what was resident before: models and optimiser
state. It is taken in a process of its own, in which large blocks go back as soon as they are free. Linux with glibc.

The loss: forward and backward pass at vocabulary 151,936, hidden width 1,024 and 8,192 tokens, beside the float32 logits that
it never holds. Its peak is the sum of the live tensors' storage after every operation, without inputs and returned gradients.
It is counted on torch's meta device, which runs the same operations on shapes alone, so it holds for any machine; the resident
set of the same loss on a CPU stayed within 15 MiB of it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from page import machine, table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from camopd.config import load_recipe
from camopd.engines.packing import use_packing
from camopd.engines.transformers import TransformersEngine
from camopd.evaluation.charts import COLOURS, NO_METADATA, STYLE
from camopd.losses import Full, Sampled, Signal, Terms, TopK, chunked_objective
from camopd.student import Student
from camopd.update import make_optimizer, update

RESULTS = Path(__file__).with_name("results") / "cost.md"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "cost.svg"
MIB = 2**20
TOP_K = 8
PROMPT = 32  # tokens of each prompt
PARTS = {"rollout": "rollout", "teacher": "teacher", "update": "student's update"}
TOKENS, WIDTH, VOCABULARY = 8_192, 1_024, 151_936  # of the loss alone
SIGNALS = ("sampled", "topk", "full")
LOGITS_MIB = (16, 32, 64)
Costs = Mapping[str, tuple[float, float]]  # by part: seconds, peak MiB


@dataclass(frozen=True)
class Point:
    """What one update works on: prompts a step, tokens a response, ids of the vocabulary."""

    batch: int = 32
    length: int = 64
    vocabulary: int = 4_096


AXES: dict[str, Sequence[int]] = {
    "batch": (8, 16, 32, 64, 128),
    "length": (16, 32, 64, 128, 256),
    "vocabulary": (1_024, 4_096, 16_384, 65_536, 151_936),
}
TITLES = {"batch": "prompts a step", "length": "tokens a response", "vocabulary": "vocabulary"}


# --- Measured, each in a process of its own ---------------------------------------------------------------------------------


def memory(field: str) -> int:
    """A field of /proc/self/status, bytes: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def resident() -> int:
    """Bytes resident once what is free has gone back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    return memory("VmRSS")


def measured(work: Callable[..., Any], *arguments: Any, above: int) -> tuple[Any, tuple[float, float]]:
    """What the work returns, and its processor seconds and peak memory above so many bytes, MiB."""
    resident()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now (man 5 proc)
    begun = time.process_time()
    result = work(*arguments)
    return result, (time.process_time() - begun, (memory("VmHWM") - above) / MIB)


def make_model(vocabulary: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    return use_packing(Qwen3ForCausalLM(config).eval())


def one_update(point: Point, seed: int, repeats: int) -> Costs:
    """Medians of the parts of an update, after one to warm up that also makes the optimiser's moments."""
    torch.set_num_threads(1)
    recipe = load_recipe("micro", {"method": "alternating", "score.signal": "topk", "score.top_k": TOP_K})
    limits = {"vocab_size": point.vocabulary, "batch_size": 256, "batch_tokens": recipe.score.batch_tokens}
    model = make_model(point.vocabulary, seed)
    sampler = TransformersEngine(model, **limits)
    judge = TransformersEngine(make_model(point.vocabulary, seed + 1), **limits)
    student, optimizer = Student(model, recipe.train), make_optimizer(model, recipe)
    prompts = list(np.random.default_rng(seed).integers(0, point.vocabulary, (point.batch, PROMPT), np.int32))

    def rollout(step: int) -> list[dict[str, Any]]:
        never = [point.vocabulary]  # an end token that cannot be sampled: every response has the full length
        seeds = range(step * point.batch, (step + 1) * point.batch)
        samples = dict(sampler.sample(prompts, seeds, max_new_tokens=point.length, eos_ids=never))
        return [
            {"branch": "general", "prompt_ids": prompt, "response_ids": samples[i].token_ids, "logprobs": samples[i].logprobs}
            for i, prompt in enumerate(prompts)
        ]

    def score(rows: list[dict[str, Any]]) -> None:
        for i, scores in judge.score(prompts, [row["response_ids"] for row in rows], top_k=TOP_K):
            rows[i] |= {"topk_ids": scores.topk_ids, "topk_logprobs": scores.topk_logprobs}

    def train(rows: list[dict[str, Any]]) -> None:
        update(student, optimizer, rows, recipe=recipe, vocab_size=point.vocabulary)

    spent = defaultdict(list)
    for step in range(repeats + 1):
        optimizer.zero_grad(set_to_none=True)
        before = resident()
        rows, rollout_cost = measured(rollout, step, above=before)
        _, teacher_cost = measured(score, rows, above=before)
        _, update_cost = measured(train, rows, above=before)
        for part, cost in zip(PARTS, (rollout_cost, teacher_cost, update_cost), strict=True):
            spent[part].append(cost)
    return {
        part: (statistics.median(c[0] for c in costs[1:]), statistics.median(c[1] for c in costs[1:]))
        for part, costs in spent.items()
    }


class LiveStorage(TorchDispatchMode):
    """Most bytes of tensors that were alive at once, those of ``inputs`` left out."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._inputs = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in inputs})
        self._alive = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [value.untyped_storage() for value in tree_leaves(result) if isinstance(value, Tensor)]
        self._alive |= {storage: storage.nbytes() for storage in storages if storage not in self._inputs}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def loss_peak(signal_name: str, logits_mib: int) -> float:
    """Peak memory of the loss's forward and backward pass beyond its inputs and the gradients that it returns, MiB."""
    with torch.device("meta"):
        hidden_TD = torch.empty(TOKENS, WIDTH, requires_grad=True)
        weight_VD = torch.empty(VOCABULARY, WIDTH, requires_grad=True)
        targets_T = torch.empty(TOKENS, dtype=torch.long)
        terms = Terms(torch.empty(TOKENS), torch.empty(TOKENS))
        signals: dict[str, Signal] = {
            "sampled": Sampled(torch.empty(TOKENS)),
            "topk": TopK(torch.empty(TOKENS, TOP_K, dtype=torch.long), torch.empty(TOKENS, TOP_K)),
            "full": Full(torch.empty(TOKENS, WIDTH), torch.empty(VOCABULARY, WIDTH)),
        }
    signal = signals[signal_name]
    inputs = [hidden_TD, weight_VD, targets_T, *vars(signal).values(), terms.weight_T, terms.engine_T]
    with LiveStorage(inputs) as live:
        limits = {"vocab_size": VOCABULARY, "logits_mib": logits_mib}
        loss, _ = chunked_objective(hidden_TD, weight_VD, targets_T, signal, terms, **limits)
        loss.backward()
    assert hidden_TD.grad is not None
    assert weight_VD.grad is not None
    return (live.peak - hidden_TD.grad.nbytes - weight_VD.grad.nbytes) / MIB


def measured_everywhere(points: Sequence[Point], seed: int, repeats: int) -> dict[Point, Costs]:
    """``one_update`` of each point, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = [pool.submit(one_update, point, seed, repeats) for point in points]
        return {point: future.result() for point, future in zip(points, found, strict=True)}


# --- Shown ------------------------------------------------------------------------------------------------------------------


def points(axis: str) -> list[Point]:
    return [replace(Point(), **{axis: value}) for value in AXES[axis]]


def curve_table(axis: str, costs: Mapping[Point, Costs]) -> str:
    header = [TITLES[axis], *(f"{title}, s" for title in PARTS.values()), *(f"{title}, MiB" for title in PARTS.values())]
    rows = [
        [
            f"{getattr(point, axis):,}",
            *(f"{costs[point][p][0]:.2f}" for p in PARTS),
            *(f"{costs[point][p][1]:.0f}" for p in PARTS),
        ]
        for point in points(axis)
    ]
    return table(header, rows)


def loss_table() -> str:
    logits = TOKENS * VOCABULARY * 4 / MIB
    rows = []
    for name in SIGNALS:
        peaks = [loss_peak(name, logits_mib) for logits_mib in LOGITS_MIB]
        rows.append([f"`{name}`", *(f"{peak:.0f} MiB, {peak / logits:.3f}" for peak in peaks)])
    return table(["signal", *(f"`train.logits_mib` {logits_mib}" for logits_mib in LOGITS_MIB)], rows)


def plot(costs: Mapping[Point, Costs]) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        grid = figure.subplots(2, len(AXES), sharey="row")
        for column, axis in zip(grid.T, AXES, strict=True):
            for row, (panel, unit) in enumerate(zip(column, ("seconds an update", "peak memory, MiB"), strict=True)):
                for colour, (part, title) in zip(COLOURS, PARTS.items(), strict=False):
                    values = [costs[point][part][row] for point in points(axis)]
                    panel.plot(AXES[axis], values, marker="o", color=colour, label=title)
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.set_xticks(AXES[axis], [f"{value:,}" for value in AXES[axis]], rotation=30)
                panel.minorticks_off()
                if axis == next(iter(AXES)):
                    panel.set_ylabel(unit)
            column[1].set_xlabel(TITLES[axis])
        grid[0][0].legend()
        PLOT.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PLOT, metadata=NO_METADATA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="updates of each point after the first")
    arguments = parser.parse_args()
    everywhere = list(dict.fromkeys(point for axis in AXES for point in points(axis)))
    seconds = measured_everywhere(everywhere, arguments.seed, arguments.repeats)
    # Else glibc keeps large blocks in a heap that falls to pieces: with a large vocabulary gigabytes that nobody uses.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    peaks = measured_everywhere(everywhere, arguments.seed, 1)
    costs = {p: {part: (seconds[p][part][0], peaks[p][part][1]) for part in PARTS} for p in everywhere}
    plot(costs)
    base = Point()
    text = "\n\n".join(
        [
            "# What an update costs",
            f"`python benchmarks/cost.py --seed {arguments.seed} --repeats {arguments.repeats}`, {machine()}. "
            "Processor seconds of one thread and peak "
            "memory above what was resident before, each point in a fresh process; how stands at the head of the script.",
            f"Random Qwen3 models of four layers and width 128, prompts of {PROMPT} tokens, the teacher's top {TOP_K}, every "
            f"sample trained on; at the base {base.batch} prompts a step, {base.length} tokens a response, vocabulary "
            f"{base.vocabulary:,}. Seconds are medians of {arguments.repeats} updates, memory is of one.",
            "![Seconds and peak memory against batch, length and vocabulary](../../docs/images/cost.svg)",
            *(curve_table(axis, costs) for axis in AXES),
            f"The loss alone, forward and backward pass of {TOKENS:,} tokens at vocabulary {VOCABULARY:,} and width {WIDTH:,}, "
            "beyond its inputs and the gradients that it returns: peak, and its share of the float32 logits that it never "
            f"holds ({TOKENS * VOCABULARY * 4 / MIB:,.0f} MiB), by how many MiB of logits are alive at once "
            f"({load_recipe('micro').train.logits_mib} unless the recipe says otherwise):",
            loss_table(),
        ]
    )
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
