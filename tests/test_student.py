"""One process against several: the same losses, weights, moments and files; bfloat16; layers that are computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from camopd.checkpoint import OPTIMIZER, STATE
from camopd.config import Train
from camopd.engines.transformers import load_model
from camopd.errors import InputError, UnhealthyRunError
from camopd.student import Student
from camopd.update import make_optimizer, rows_loss, update
from camopd.workers import run_workers
from tests.in_workers import STEPS, kinds_of_numbers, make_plan, make_step, rounds
from tests.reference import SHARED
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def save_student(folder: Path, *, tied: bool = True) -> str:
    tiny_model(tied=tied).save_pretrained(folder)
    return str(folder)


def in_workers(num_processes: int, **arguments: Any) -> list[dict[str, Any]]:
    """``rounds`` by several processes."""
    arguments["train"] = arguments["train"] | {"num_processes": num_processes}
    return run_workers("tests.in_workers:rounds", arguments, num_processes=num_processes)


def checkpoint(run_uri: Path, number: int) -> Path:
    return run_uri / f"rounds/{number:04d}/train"


def assert_same(ours: Path, theirs: Path) -> None:
    """Two checkpoints have the same files, tensors of the same names and values close in float32, and the same state."""
    names = [sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) for folder in (ours, theirs)]
    assert names[0] == names[1]
    for name in ("model.safetensors", OPTIMIZER):
        mine, other = load_file(ours / name), load_file(theirs / name)
        assert list(mine) == list(other)
        for key in mine:
            torch.testing.assert_close(mine[key], other[key], atol=2e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    for name in ("config.json", STATE):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def assert_same_records(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    def flat(record: dict[str, Any]) -> dict[str, float]:
        own = {f"{name}/{key}": value for name, values in record["branches"].items() for key, value in values.items()}
        return {key: value for key, value in record.items() if key != "branches"} | own

    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert flat(mine) == pytest.approx(flat(other), rel=2e-4, abs=2e-5)


# --- Several processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "tied", "num_processes", "settings"),
    [("topk", True, 2, {}), ("sampled", False, 3, {"activation_checkpointing": True})],
    ids=["topk, tied, 2", "sampled, untied, checkpointed, 3"],
)
def test_processes_that_share_the_updates_do_what_one_does(signal, tied, num_processes, settings, tmp_path) -> None:
    """Over two rounds, the second from the first's checkpoint; then each way of going on with the other's."""
    student = save_student(tmp_path / "student", tied=tied)
    common = {"student": student, "signal": signal}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    one = rounds(str(alone), **common, train={}, numbers=[1, 2])
    several = in_workers(num_processes, run_uri=str(shared), **common, train=settings, numbers=[1, 2])
    assert all(record["grad_norm"] > 0 for record in one)  # every step has something to tell
    assert_same_records(one, several)
    for number in (1, 2):
        assert_same(checkpoint(alone, number), checkpoint(shared, number))
    assert json.loads((checkpoint(shared, 2) / "steps.json").read_text()) == several[len(STEPS) :]

    for run, first in (("fewer", shared), ("more", alone)):
        checkpoint(tmp_path / run, 1).parent.mkdir(parents=True)
        checkpoint(tmp_path / run, 1).symlink_to(checkpoint(first, 1))
    rounds(str(tmp_path / "fewer"), **common, train={}, numbers=[2])
    in_workers(num_processes, run_uri=str(tmp_path / "more"), **common, train=settings, numbers=[2])
    for run in ("fewer", "more"):
        assert_same(checkpoint(tmp_path / run, 2), checkpoint(alone, 2))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_process_stops_all_with_the_same_sentence(tmp_path) -> None:
    given = {"student": save_student(tmp_path / "student"), "signal": "sampled", "numbers": [1], "broken": 1}
    with pytest.raises(UnhealthyRunError) as alone:
        rounds(str(tmp_path / "alone"), train={}, **given)
    with pytest.raises(UnhealthyRunError) as shared:
        in_workers(2, run_uri=str(tmp_path / "shared"), train={}, **given)
    assert str(shared.value) == str(alone.value)
    assert "not finite" in str(shared.value)
    assert not list((tmp_path / "shared").rglob("*.safetensors"))


# --- bfloat16 -------------------------------------------------------------------------------------------------------------

HALF = {"precision": "bfloat16"}


def test_bfloat16_is_for_the_passes_alone(tmp_path) -> None:
    found = kinds_of_numbers(save_student(tmp_path / "student"), HALF)
    assert found.pop("computed") == ["torch.bfloat16"]
    assert found == {name: ["torch.float32"] for name in ("weights", "gradients", "moments")}


@pytest.mark.slow
def test_bfloat16_is_the_same_arithmetic_on_several_processes(tmp_path) -> None:
    """Rounding aside: samples meet others in a pass, so their rounded gradients are summed in another order."""
    student = save_student(tmp_path / "student")
    given = {"student": student, "signal": "topk", "numbers": [1]}
    exact = rounds(str(tmp_path / "exact"), train={}, **given)
    alone = rounds(str(tmp_path / "alone"), train=HALF, **given)
    shared = in_workers(2, run_uri=str(tmp_path / "shared"), train=HALF, **given)
    for name in ("loss", "grad_norm"):
        exactly, by_one, by_two = ([record[name] for record in records] for records in (exact, alone, shared))
        assert by_two == pytest.approx(by_one, rel=5e-3)
        assert by_one == pytest.approx(exactly, rel=0.1)
        assert by_one != pytest.approx(exactly, rel=5e-3)
    weights = load_file(checkpoint(tmp_path / "shared", 1) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())


def test_small_steps_are_not_lost_to_bfloat16(tmp_path) -> None:
    """A step is below bfloat16's spacing at most weights; the float32 weight moves, and after enough steps so does the pass."""
    plan = make_plan("/runs/x", "/models/domain", "topk", HALF | {"learning_rate": 1e-4, "batch_tokens": 1000})
    model = tiny_model()
    student, optimizer = Student(model, plan.recipe.train), make_optimizer(model, plan.recipe)
    before, rows = {name: p.detach().clone() for name, p in model.named_parameters()}, make_step(0, STEPS[1])
    losses = [update(student, optimizer, rows, recipe=plan.recipe, vocab_size=SHARED)["loss"] for _ in range(20)]
    weight, old = model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"]
    assert 1e-4 < (weight - old).abs().max() < 21e-4
    assert losses[-1] < losses[0]


# --- Activation checkpointing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layers_computed_again_have_the_same_gradients(precision) -> None:
    """To the bit, and every layer twice: dropout stays off, nothing is drawn."""
    recipe = make_plan("/runs/x", "/models/domain", "topk", {"precision": precision}).recipe
    rows, gradients, passes = make_step(0, STEPS[0]), [], []
    for again in (False, True):
        model, count = tiny_model(), []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        student = Student(model, recipe.train.model_copy(update={"activation_checkpointing": again}))
        student.backward(lambda model: rows_loss(model, rows, recipe=recipe, vocab_size=SHARED, num_selected=5))
        gradients.append([p.grad for p in model.parameters()])
        passes.append(len(count))
    assert passes == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_layers_that_are_not_known_are_refused(tmp_path) -> None:
    model = load_model(Path(save_student(tmp_path / "student")))
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(InputError, match=r"train\.activation_checkpointing: the layers of Qwen3ForCausalLM are not known"):
        Student(model, Train(activation_checkpointing=True))
