"""How near a recovery in one process comes to the bare model operations for the same tokens (the micro example, one thread).

    python benchmarks/bound.py            # a few minutes; writes benchmarks/results/bound.md

A step of `camopd recover` (sample, score, select, update) and the bare operations on its very token ids take turns in one
process. The bare operations are calls of the models and of the optimiser alone: prefill and decoding steps with a key-value
cache, of exactly the rows that are unfinished; the teacher's forward pass; the student's forward and backward pass with the
cross entropy of the same tokens, in micro-batches of the same size; AdamW's step. No sampling, scores, selection or objective
of ours, and building their inputs is outside the clock.
Times are processor seconds of the process, which the machine's other work disturbs less than the wall clock. A ratio is of the
sums over one repeat.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page import machine, table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from camopd import rollout, score, workflow
from camopd.engines.transformers import load_model, pad_left, token_batches
from camopd.plan import Plan
from camopd.recover import Session
from camopd.store import Store
from camopd.update import make_optimizer

RESULTS = Path(__file__).with_name("results") / "bound.md"
PARTS = {"rollout": "rollout", "score": "teacher", "train": "student's update", "step": "whole step"}
SETTINGS = {"execution": "colocated", "num_threads": 1, "rollout.prompts_per_step": 64, "train.diagnose_every": 0}
Rows = Sequence[Mapping[str, Any]]
Seconds = tuple[Mapping[str, float], Mapping[str, float]]  # by part: ours, bare


class Clock:
    """Processor seconds by part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        self.seconds[part] += time.process_time() - begun

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self(part):
                return function(*arguments, **options)

        return timed


class Bare:
    """The same models again, called and nothing else."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self._recipe = plan.recipe
        self._student = load_model(store.fetch(plan.student_uri(1)))
        self._optimizer = make_optimizer(self._student, plan.recipe)
        self._teachers = {b.name: load_model(store.fetch(plan.teacher_uri(b))) for b in plan.recipe.branches if b.steps}

    def step(self, batch: Rows, kept: Rows, clock: Clock) -> None:
        """The operations of one step that sampled ``batch`` and trained on ``kept``, all of one branch."""
        self._rollout(batch, clock)
        with torch.inference_mode():
            teacher = self._teachers[batch[0]["branch"]]
            for part in micro_batches(batch, self._recipe.score.batch_tokens):
                inputs, at = padded(part)
                with clock("score"):
                    logits_at(teacher, inputs, at)
        with clock("train"):
            self._optimizer.zero_grad(set_to_none=True)
        for part in micro_batches(kept, self._recipe.train.batch_tokens):
            inputs, at = padded(part)
            targets = torch.from_numpy(np.concatenate([row["response_ids"] for row in part]).astype(np.int64))
            with clock("train"):
                cross_entropy(logits_at(self._student, inputs, at), targets).backward()
        with clock("train"):
            self._optimizer.step()

    @torch.inference_mode()
    def _rollout(self, batch: Rows, clock: Clock) -> None:
        responses = [row["response_ids"] for row in batch]
        longest = max(map(len, responses))
        tokens, mask = pad_left([row["prompt_ids"] for row in batch], longest)
        width = tokens.shape[1]
        position = mask[:, :width].cumsum(-1).sub(1).clamp_min(0)
        cache = DynamicCache(config=self._student.config)
        for step in range(longest):
            seen = mask[:, : width + step]
            with clock("rollout"):
                self._student(
                    input_ids=tokens, attention_mask=seen, position_ids=position, cache=cache, use_cache=True, logits_to_keep=1
                )
            keep = [row for row, response in enumerate(responses) if len(response) > step + 1]
            if keep and len(keep) < len(responses):
                cache.batch_select_indices(torch.tensor(keep))
            mask, position, responses = mask[keep], position[keep, -1:] + 1, [responses[row] for row in keep]
            tokens = torch.tensor([[int(response[step])] for response in responses])


def micro_batches(rows: Rows, budget: int) -> Iterator[Rows]:
    for batch in token_batches([len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows], budget):
        yield [rows[i] for i in batch]


def padded(rows: Rows) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and where in the flattened batch the response tokens are predicted."""
    sequences = [np.concatenate([row["prompt_ids"], row["response_ids"]])[:-1] for row in rows]
    width = max(map(len, sequences))
    inputs = np.stack([np.pad(sequence, (0, width - len(sequence))) for sequence in sequences]).astype(np.int64)
    starts = [number * width + len(row["prompt_ids"]) - 1 for number, row in enumerate(rows)]
    at = np.concatenate([np.arange(start, start + len(row["response_ids"])) for start, row in zip(starts, rows, strict=True)])
    return torch.from_numpy(inputs), torch.from_numpy(at)


def logits_at(model: PreTrainedModel, inputs: Tensor, at: Tensor) -> Tensor:
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden.flatten(0, 1)[at])


def measure(method: str, *, seed: int, repeats: int, steps: int, warm_up: int) -> list[Seconds]:
    """Seconds by part, ours and bare, of each repeat."""
    store = Store()
    with tempfile.TemporaryDirectory(prefix="camopd-bound-") as output:
        parameters = SETTINGS | {"method": method, "seed": seed, "output": output}
        plan = Plan.load(store, workflow.prepare("micro", parameters, store=store).uri)
        session, bare = Session(plan, 1, store), Bare(plan, store)
        clock = Clock()
        trained: list[Mapping[str, Any]] = []
        update = clock.wrap("train", session.trainer.step)

        def remembered(batch: Rows, rows: Rows) -> dict[str, Any]:
            trained[:] = [row for row in rows if row["kept"]]
            return update(batch, rows)

        session.trainer.step = remembered  # type: ignore[method-assign]
        sample, judge = rollout.sample_rows, score.score_rows
        rollout.sample_rows, score.score_rows = clock.wrap("rollout", sample), clock.wrap("score", judge)
        measured: list[Seconds] = []
        try:
            for repeat in range(-1, repeats):
                clock.seconds.clear()
                plain = Clock()
                for _ in range(warm_up if repeat < 0 else steps):
                    with clock("step"):
                        batch, _ = session.step()
                    bare.step(batch, trained, plain)
                plain.seconds["step"] = sum(plain.seconds.values())
                if repeat >= 0:
                    measured.append((dict(clock.seconds), plain.seconds))
        finally:
            rollout.sample_rows, score.score_rows = sample, judge
    return measured


def ratios(measured: Sequence[Seconds], steps: int) -> str:
    rows = []
    for part, title in PARTS.items():
        ours, bare = ([1000 * seconds[side][part] / steps for seconds in measured] for side in (0, 1))
        ratios = [a / b for a, b in zip(ours, bare, strict=True)]
        cells = [f"{statistics.median(column):.1f}" for column in (ours, bare)]
        cells += [f"{value:.2f}" for value in (statistics.median(ratios), min(ratios), max(ratios))]
        rows.append([title, *cells])
    return table(["part", "ours, ms a step", "bare, ms a step", "ratio", "lowest", "highest"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["alternating", "camopd"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of each repeat")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    before = machine(note=f"load {os.getloadavg()[0]:.1f} before it began")
    parts = [
        "# Ours against the bare model operations",
        f"`python benchmarks/bound.py --repeats {arguments.repeats} --steps {arguments.steps} --seed {arguments.seed}`, "
        f"{before}. Processor seconds, {arguments.repeats} repeats "
        f"of {arguments.steps} steps of 64 prompts after 8 to warm up; medians over the repeats, and the ratio's lowest and "
        "highest. What is compared stands at the head of the script.",
    ]
    for method in arguments.methods:
        measured = measure(method, seed=arguments.seed, repeats=arguments.repeats, steps=arguments.steps, warm_up=8)
        what = "trains on every sample" if method == "alternating" else "trains on what it selects, and so does the bare side"
        parts += [f"`{method}`, which {what}:", ratios(measured, arguments.steps)]
    text = "\n\n".join(parts) + "\n"
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
