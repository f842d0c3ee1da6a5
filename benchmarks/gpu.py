"""An update and the loss on a GPU: speed, share of the card's peak, memory; beside the plan's figures and TRL's kernels.

    make bench-gpu                      # eight minutes on one CUDA GPU; writes benchmarks/results/gpu.md
    python benchmarks/gpu.py --toy      # the same code at toy size, on whatever there is; benchmarks/results/gpu_cpu_toy.md

*Update*: Qwen3 shapes, random weights, through `Student`, `update` and packing, in bfloat16 with float32 weights, one GPU.
Prompts of 512 tokens, responses of one length, the sampled token as signal. The first update, which makes the moments, is left
out. Operations are ``estimate.work.train_flops``: 6 for each parameter of a layer's matrices and token (2 forward, 4 backward),
3.5 times 4 N Q for each pair of a token and one it sees, 6 V D for each trained token. The share of the peak leaves out what is
computed again for ``train.activation_checkpointing``; "executed" has it. *Loss*: see gpu_losses.py; repeats take turns. A
spread is median (least to greatest). The page is written again after every case, so a run that is stopped leaves one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_losses import SIGNALS, expected_bytes, hands, make_inputs, trl_version
from meter import free_bytes, held, measured
from page import machine, table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from camopd.config import Recipe, load_recipe
from camopd.engines.packing import use_packing
from camopd.engines.transformers import device
from camopd.estimate.assumptions import GPUS, TERA, Assumptions
from camopd.estimate.memory import STATE, alone_parts
from camopd.estimate.shapes import ModelShape, causal_pairs, read_shape
from camopd.estimate.sources import SHIPPED
from camopd.estimate.work import train_flops
from camopd.student import Student
from camopd.update import make_optimizer, update

RESULTS = Path(__file__).with_name("results")
GIGA, MIB = 1e9, 2**20
RATE = 2e-6  # the recipes' own for models of this size
LARGEST: dict[str, Any] = json.loads((SHIPPED / "Qwen3-4B-Instruct-2507.json").read_text())
SMALLER = {  # from the config.json files of Qwen/Qwen3-0.6B and Qwen3-1.7B; what is not named is the 4B model's
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
}
SIZES = {name: LARGEST | size for name, size in SMALLER.items()} | {
    "4B, 18 of 36 layers": LARGEST | {"num_hidden_layers": 18},
    "4B": LARGEST,
}
TINY = {"num_hidden_layers": 2, "num_attention_heads": 16, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 4096}


@dataclass(frozen=True)
class Scale:
    """What is measured: sizes by name, prompt and response lengths with samples an update, and the loss's tokens and width."""

    prompt: int
    sizes: Mapping[str, Mapping[str, Any]]
    samples: Mapping[int, int]
    loss_tokens: Sequence[int]
    loss_width: int
    vocab_size: int
    logits_mib: Mapping[str, int]


MORE = " (four times the default)"
REAL = Scale(512, SIZES, {2_048: 12, 8_192: 4}, (8_192, 2_048, 32_768), 2_560, 151_936, {"": 64, MORE: 256})
TOY = Scale(16, {"toy": LARGEST | TINY}, {32: 4, 64: 2}, (256, 64), 64, 4_096, {"": 1, " (four times as much)": 4})


def operations(shape: ModelShape, lengths: Iterable[tuple[int, int]], *, again: bool) -> float:
    """FLOPs of an update over samples of (prompt, response) tokens; ``again`` counts what checkpointing computes twice."""
    total = 0.0
    for prompt, response in lengths:
        tokens = prompt + response - 1
        total += train_flops(shape, tokens, causal_pairs(tokens), response, checkpointing=again)
    return total


def peak_of_card(name: str, given: float | None) -> float | None:
    """Dense bfloat16 TFLOP/s of a card, from its name where ``camopd plan`` knows it."""
    return given or next((gpu.peak for key, gpu in GPUS.items() if key in name), None)


# --- The update -------------------------------------------------------------------------------------------------------------


def make_model(config: Mapping[str, Any], where: torch.device) -> PreTrainedModel:
    """Random weights, float32, made where they will be."""
    options = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(0)
    with where:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **options))
    return use_packing(model.to(where).eval())


def make_rows(samples: int, prompt: int, response: int, vocab_size: int, seed: int) -> list[dict[str, Any]]:
    """Random tokens, with log-probabilities near the uniform ones that a random model has: nearly all count."""
    rng = np.random.default_rng(seed)
    uniform = -np.log(vocab_size)
    return [
        {
            "branch": "general",
            "prompt_ids": rng.integers(0, vocab_size, prompt, np.int32),
            "response_ids": rng.integers(0, vocab_size, response, np.int32),
            "logprobs": np.full(response, uniform, np.float32),
            "teacher_logprobs": rng.normal(uniform, 0.5, response).astype(np.float32),
        }
        for _ in range(samples)
    ]


@dataclass
class Bench:
    """The run: where, how long, and the tables' rows so far."""

    where: torch.device
    scale: Scale
    options: argparse.Namespace
    page: Path
    until: float
    updates: list[list[str]] = field(default_factory=list)
    losses: list[list[str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def card(self) -> str:
        return torch.cuda.get_device_name(self.where) if self.where.type == "cuda" else "no GPU: the CPU, at toy size"

    def fits(self, what: str, needed: float) -> bool:
        """Whether there is time and memory; where not, the page says which is missing."""
        if time.monotonic() > self.until:
            self.skipped.append(f"{what}: the {self.options.minutes:g} minutes were over")
        elif needed > (free := free_bytes(self.where)):
            self.skipped.append(f"{what}: some {needed / GIGA:.0f} GB are needed, {free / GIGA:.0f} GB are free")
        else:
            return True
        return False

    def run(self) -> None:
        """The loss at its first length, all updates, the loss at the other lengths."""
        first, *others = self.scale.loss_tokens
        cases = [*self.loss_cases(first), *self.update_cases(), *(case for t in others for case in self.loss_cases(t))]
        for what, needed, work in cases:
            if self.fits(what, needed):
                print(what, file=sys.stderr)
                try:
                    work()
                except torch.OutOfMemoryError:
                    self.skipped.append(f"{what}: out of memory, with {needed / GIGA:.0f} GB foreseen")
            self.page.write_text(self.text(), encoding="utf-8")

    # --- Updates ---

    def update_cases(self) -> Iterator[tuple[str, float, Any]]:
        for name, config in self.scale.sizes.items():
            shape = read_shape(config, name)
            for response, samples in self.scale.samples.items():
                for again in (True, False):
                    recipe = self.recipe(response, again)
                    needed = self.planned_bytes(shape, recipe)
                    what = f"update of {name}, responses of {response:,}" + (", layers computed again" if again else "")
                    yield what, needed, (lambda *case: lambda: self.one_update(*case))(name, config, recipe, response, samples)

    def recipe(self, response: int, again: bool) -> Recipe:
        settings = {
            "score.signal": "sampled",
            "prompts.max_prompt_tokens": self.scale.prompt,
            "rollout.max_new_tokens": response,
            "rollout.prompts_per_step": self.scale.samples[response],
            "train.learning_rate": RATE,
            "train.precision": "bfloat16",
            "train.activation_checkpointing": again,
        }
        return load_recipe("micro", settings)

    @staticmethod
    def planned_bytes(shape: ModelShape, recipe: Recipe) -> float:
        given = Assumptions(checkpointing=recipe.train.activation_checkpointing)
        return STATE * shape.parameters + sum(alone_parts(shape, recipe, given).values())

    def one_update(self, name: str, config: Mapping[str, Any], recipe: Recipe, response: int, samples: int) -> None:
        shape, again = read_shape(config, name), recipe.train.activation_checkpointing
        before = held(self.where)
        model = make_model(config, self.where)
        student, optimizer = Student(model, recipe.train), make_optimizer(model, recipe)
        rows = make_rows(samples, self.scale.prompt, response, shape.vocab_size, self.options.seed)

        def work() -> None:
            update(student, optimizer, rows, recipe=recipe, vocab_size=shape.vocab_size)

        work()
        spent = [measured(work, self.where) for _ in range(self.options.repeats)]
        seconds, peak = [one[0] for one in spent], max(one[1] for one in spent) - before
        lengths = [(self.scale.prompt, response)] * samples
        useful, executed = (operations(shape, lengths, again=a) for a in (False, again))
        card = peak_of_card(self.card, self.options.peak)

        def share(flops: float) -> str:
            return f"{flops / statistics.median(seconds) / (card * TERA):.3f}" if card else "peak unknown"

        tokens = sum(prompt + length - 1 for prompt, length in lengths)
        planned = executed / Assumptions(peak=card).flops if card else float("nan")
        self.updates.append(
            [
                name,
                f"{response:,} x {samples}",
                "yes" if again else "no",
                spread([tokens / one for one in seconds], 0),
                f"{tokens / planned:,.0f}" if card else "peak unknown",
                share(useful),
                share(executed),
                f"{peak / GIGA:.2f}",
                f"{self.planned_bytes(shape, recipe) / GIGA:.2f}",
            ]
        )

    # --- Losses ---

    def loss_cases(self, tokens: int) -> Iterator[tuple[str, float, Any]]:
        for signal in SIGNALS:
            rough = 4 * (2 * tokens + 4 * self.scale.vocab_size) * self.scale.loss_width
            yield f"loss of {tokens:,} tokens, `{signal}`", rough, (lambda *case: lambda: self.one_loss(*case))(tokens, signal)

    def one_loss(self, tokens: int, signal: str) -> None:
        given = make_inputs(
            tokens, self.scale.loss_width, self.scale.vocab_size, signal, seed=self.options.seed, where=self.where
        )
        values, spent = {}, {}
        for name in hands(self.scale.logits_mib):
            if self.fits(f"{name}, {tokens:,} tokens, `{signal}`", expected_bytes(name, given, self.scale.logits_mib)):
                spent[name], values[name] = [], []

        def work(name: str) -> None:
            given.hidden_TD.grad = given.weight_VD.grad = None
            loss = hands(self.scale.logits_mib)[name](given)
            loss.backward()
            values[name].append(loss.item())

        for _ in range(self.options.repeats + 1):
            for name in spent:
                given.hidden_TD.grad = given.weight_VD.grad = None
                before = held(self.where)
                seconds, peak = measured(lambda name=name: work(name), self.where)
                spent[name].append((seconds, peak - before))
        logits = tokens * self.scale.vocab_size * 4
        for name, turns in spent.items():
            peak = max(turn[1] for turn in turns[1:])
            times = spread([1000 * turn[0] for turn in turns[1:]], 1)
            row = [f"{tokens:,}", f"`{signal}`", name, times, f"{peak / MIB:,.0f}", f"{peak / logits:.2f}"]
            self.losses.append([*row, f"{values[name][-1]:.5f}"])

    # --- The page ---

    def text(self) -> str:
        real = self.where.type == "cuda" and self.scale is REAL
        versions = f"CUDA {torch.version.cuda}" if self.where.type == "cuda" else "no CUDA"
        title = "# An update and the loss on a GPU" if real else "# The GPU benchmark at toy size: no figure here is a GPU's"
        note = "" if real else "It shows that the script runs from end to end; times and memory say nothing about a GPU. "
        options = self.options
        peak = peak_of_card(self.card, options.peak)
        parts = [
            title,
            f"{note}`python benchmarks/gpu.py --minutes {options.minutes:g} --repeats {options.repeats} --seed {options.seed}"
            f"{'' if real else ' --toy'}`, **{self.card}**, {versions}, {machine()}. "
            f"{f'Peak {peak:g} TFLOP/s (bfloat16, dense).' if peak else 'No peak is known for it: --peak gives one.'} "
            "How it is measured stands at the head of the script.",
        ]
        if self.updates:
            header = ["model", "response x samples", "layers computed again", "tokens a second", "planned tokens a second"]
            header += ["share of peak", "executed", "peak memory, GB", "planned, GB"]
            share = Assumptions.peak_share
            parts += [
                "## An update",
                f"Planned: `camopd plan`'s formulas, with its peak share of {share}.",
                table(header, self.updates),
            ]
        if self.losses:
            header = ["tokens", "signal", "by", "ms, forward and backward", "peak, MiB", "of the float32 logits", "value"]
            size = f"Vocabulary {self.scale.vocab_size:,}, width {self.scale.loss_width:,}, bfloat16. Peak beyond the inputs, "
            parts += ["## The loss", size + "the returned gradients included.", table(header, self.losses)]
            found = trl_version()
            parts += [f"TRL {found}." if found else "TRL is not installed here and was not measured."]
        if self.skipped:
            parts += ["## Left out", "\n".join(f"- {line}" for line in self.skipped)]
        return "\n\n".join(parts) + "\n"


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="no case is begun after so many")
    parser.add_argument("--repeats", type=int, default=3, help="of each case, after one to warm up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the card in bfloat16, dense")
    parser.add_argument("--toy", action="store_true", help="toy size; always so where there is no GPU")
    parser.add_argument("--trl", type=Path, help="a site-packages folder that has TRL, when this environment has none")
    parser.add_argument("--output", type=Path, help="the page")
    options = parser.parse_args()
    if options.trl:
        sys.path.append(str(options.trl))  # at the end: everything else stays this environment's
    where = device()
    real = where.type == "cuda" and not options.toy
    page = options.output or RESULTS / ("gpu.md" if real else "gpu_cpu_toy.md" if where.type == "cpu" else "gpu_toy.md")
    bench = Bench(where, REAL if real else TOY, options, page, time.monotonic() + 60 * options.minutes)
    bench.run()
    print(bench.text())


if __name__ == "__main__":
    main()
