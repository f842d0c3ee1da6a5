"""benchmarks/gpu.py: what it counts, that all hands compute the same loss, and the whole of it at toy size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camopd.engines.packing import PACKED
from camopd.estimate.shapes import causal_pairs, read_shape
from camopd.student import Student
from camopd.update import make_optimizer, update
from tests.test_estimate_measured import counter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
from gpu_losses import SIGNALS, hands, make_inputs, trl_version  # noqa: E402


@pytest.mark.parametrize("again", [False, True])
def test_operations_are_those_that_torch_counts_of_an_update(again: bool) -> None:
    """torch counts all pairs of a rectangle, and stops computing a layer again before its last product: nobody asks for it."""
    config = gpu.LARGEST | gpu.TINY | {"vocab_size": 304}
    shape = read_shape(config, "tiny")
    settings = {"train.activation_checkpointing": again, "score.signal": "sampled", "train.batch_tokens": 1}
    recipe = gpu.load_recipe("micro", settings)
    model = gpu.make_model(config, torch.device("cpu"))
    assert model.config._attn_implementation == PACKED
    rows = [*gpu.make_rows(1, 5, 20, 304, 0), *gpu.make_rows(1, 5, 31, 304, 1)]
    student, optimizer = Student(model, recipe.train), make_optimizer(model, recipe)
    with counter() as counts:
        update(student, optimizer, rows, recipe=recipe, vocab_size=304)
    tokens = [5 + 20 - 1, 5 + 31 - 1]
    unseen = sum(length**2 - causal_pairs(length) for length in tokens)
    expected = gpu.operations(shape, [(5, 20), (5, 31)], again=again) + (3.5 + again) * shape.pair_flops * unseen
    assert counts.get_total_flops() == expected - again * shape.layers * 2 * shape.intermediate * shape.hidden * sum(tokens)


@pytest.mark.parametrize("signal", SIGNALS)
def test_all_hands_compute_the_same_loss_and_gradients(signal: str) -> None:
    """In bfloat16; TRL where it is installed."""
    given = make_inputs(50, 32, 600, signal, seed=1, where=torch.device("cpu"))
    values, gradients = [], []
    for hand in hands({"": 1}).values():
        given.hidden_TD.grad = given.weight_VD.grad = None
        loss = hand(given)
        loss.backward()
        values.append(loss.item())
        gradients.append(torch.cat([part.grad.flatten().float() for part in (given.hidden_TD, given.weight_VD)]))
    assert len(values) == 2 + (trl_version() is not None)
    assert values == pytest.approx([values[0]] * len(values), rel=1e-3)
    assert abs(values[0]) > 0.1
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 0.02 * gradients[0].norm()


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312), ("some card", None)]
)
def test_a_card_s_peak_comes_from_its_name_unless_it_is_given(name: str, peak: float | None) -> None:
    assert gpu.peak_of_card(name, None) == peak
    assert gpu.peak_of_card(name, 100) == 100


@pytest.mark.slow
def test_the_script_runs_at_toy_size_and_says_what_its_page_is(tmp_path) -> None:
    page = tmp_path / "page.md"
    command = [sys.executable, "benchmarks/gpu.py", "--toy", "--repeats", "1", "--output", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("# The GPU benchmark at toy size: no figure here is a GPU's")
    assert text.count("\n| toy |") == 2 * len(gpu.TOY.samples)
    assert text.count("| camopd, in chunks") == 2 * len(SIGNALS) * len(gpu.TOY.loss_tokens)


def test_what_does_not_fit_is_said_on_the_page(tmp_path) -> None:
    options = gpu.argparse.Namespace(minutes=5, repeats=1, seed=1, peak=None)
    bench = gpu.Bench(torch.device("cpu"), gpu.TOY, options, tmp_path / "page.md", until=float("inf"))
    assert bench.fits("a case", 1e6)
    assert not bench.fits("a model", 1e15)
    bench.until = 0.0
    assert not bench.fits("a loss", 1e6)
    assert "- a model: some 1000000 GB are needed, " in bench.text()
    assert "- a loss: the 5 minutes were over" in bench.text()
