"""One process against several: the same losses, weights, moments and files; bfloat16; layers that are computed again."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from camopd.checkpoint import SHARDING, STATE, _file, shared_out
from camopd.config import Train
from camopd.engines.transformers import load_model
from camopd.errors import InputError, UnhealthyRunError, WorkerError
from camopd.student import Student
from camopd.update import make_optimizer, rows_loss, update
from camopd.workers import run_workers
from tests.in_workers import STEPS, kinds_of_numbers, loaded, make_plan, make_step, moments, rounds
from tests.reference import SHARED
from tests.tiny import save_adapter, tiny_model


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


def tensors_of(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    """All tensors of a model's files by name."""
    return {key: tensor for path in sorted(folder.glob(pattern)) for key, tensor in load_file(path).items()}


def moments_of(folder: Path) -> dict[str, torch.Tensor]:
    """The optimiser's tensors, put together from the parts in which several processes wrote them, by the headers' offsets."""
    parts: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for path in sorted((folder / "trainer").glob("optimizer*.safetensors")):
        with safe_open(path, "pt") as file:
            offsets = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
            for key in file.keys():  # noqa: SIM118 (no mapping)
                begin = offsets[key]["saved_offsets"] if offsets else []
                parts.setdefault(key, []).append((begin, file.get_tensor(key)))
    return {
        key: torch.cat([part for _, part in sorted(own, key=lambda entry: entry[0])]) if len(own) > 1 else own[0][1]
        for key, own in parts.items()
    }


def assert_same(ours: Path, theirs: Path) -> None:
    """Two checkpoints have tensors of the same names and values close in float32, and all else byte for byte."""
    for mine, other in (
        (tensors_of(ours, "model*.safetensors"), tensors_of(theirs, "model*.safetensors")),
        (moments_of(ours), moments_of(theirs)),
    ):
        assert sorted(mine) == sorted(other)
        for key in mine:
            torch.testing.assert_close(mine[key], other[key], atol=2e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    for name in ("config.json", "generation_config.json", STATE):
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
@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 3), (3, 1), (2, 2)])
def test_a_checkpoint_loads_to_the_bit_on_any_number_of_processes(writers, readers, tmp_path) -> None:
    student = save_student(tmp_path / "student", tied=False)
    common = {"run_uri": str(tmp_path / "run"), "student": student, "signal": "topk", "numbers": [1], "train": {}}
    if writers == 1:
        rounds(**common)
    else:
        in_workers(writers, **common)
    folder = checkpoint(tmp_path / "run", 1)
    written = sorted(path.name for path in folder.glob("model*.safetensors"))
    assert written == [_file("model", rank, writers) for rank in range(writers)]
    model = load_model(folder)  # as anyone loads it
    state = moments_of(folder)
    expected = [parameter.detach() for parameter in model.parameters()]
    expected += [state[f"{name}.{key}"] for name, _ in model.named_parameters() for key in ("exp_avg", "exp_avg_sq", "step")]
    exact = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in expected)).hexdigest()
    arguments = {"folders": [str(folder)], "student": student}
    if readers == 1:
        assert moments(**arguments) == [exact]
    else:
        assert run_workers("tests.in_workers:moments", arguments, num_processes=readers) == [exact]


@pytest.mark.slow
def test_the_first_process_reads_and_all_have_to_the_bit_what_one_alone_has(tmp_path) -> None:
    """Tied and not, an adapter merged, one that goes on learning and a new one; rotary frequencies are in no file."""
    tied, untied = (save_student(tmp_path / f"tied-{tied}", tied=tied) for tied in (True, False))
    adapter = str(save_adapter(tmp_path / "adapter", tiny_model(), base_model_name_or_path=tied))
    cases = [(tied, {}), (untied, {}), (adapter, {}), (adapter, {"lora": {}}), (untied, {"lora": {"rank": 3}})]
    shared = run_workers("tests.in_workers:loaded", {"cases": cases}, num_processes=3)
    for [[size, exact]], processes in zip(loaded(cases), shared, strict=True):
        assert processes == [[size, exact], [0, exact], [0, exact]]


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["nan", "missing", "tied"])
def test_weights_that_cannot_be_used_end_all_processes_with_one_sentence(broken, tmp_path) -> None:
    """The others wait for tensors meanwhile, and would for a quarter of an hour."""
    student = Path(save_student(tmp_path / "student", tied=False))
    weights, config = load_file(student / "model.safetensors"), json.loads((student / "config.json").read_text())
    if broken == "nan":
        weights["model.norm.weight"][3] = float("nan")
    elif broken == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    (student / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": broken == "tied"}))
    sentence = {
        "nan": f"{student}: model.norm.weight holds NaN or infinity -> export the checkpoint again",
        "missing": f"{student}: model.layers.1.mlp.up_proj.weight is in none of the files, and would be random -> export",
        "tied": f"{student} has other tensors on process 2 than on the first; if config.json ties some",
    }
    begun = time.monotonic()
    with pytest.raises((InputError, WorkerError), match=re.escape(sentence[broken])):
        run_workers("tests.in_workers:loaded", {"cases": [(str(student), {})]}, num_processes=2)
    assert time.monotonic() - begun < 120


@pytest.mark.slow
def test_no_process_writes_or_holds_more_than_its_part(tmp_path) -> None:
    """Of one large layer and three small ones by two processes: moments in equal parts, weights by layers."""
    student = save_student(tmp_path / "student", tied=False)
    in_workers(2, run_uri=str(tmp_path / "run"), student=student, signal="topk", numbers=[1], train={})
    folder = checkpoint(tmp_path / "run", 1)
    sizes = [path.stat().st_size for path in sorted((folder / "trainer").glob("optimizer-*"))]
    assert max(sizes) < 0.6 * sum(sizes)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    by_file = {path.name: sorted(load_file(path)) for path in folder.glob("model-*")}
    assert {name: sorted(k for k, v in index["weight_map"].items() if v == name) for name in by_file} == by_file
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(folder, "model-*").values())


def test_layers_are_shared_out_whole_and_alike_in_size() -> None:
    sizes = {"embed": 50, "layers.0.a": 30, "layers.0.b": 30, "layers.1.a": 30, "layers.1.b": 30, "norm": 2}
    parts = shared_out(sizes, 2)
    assert parts == {"layers.0.a": 0, "layers.0.b": 0, "layers.1.a": 1, "layers.1.b": 1, "embed": 0, "norm": 1}
    assert set(shared_out(sizes, 1).values()) == {0}
    assert len(set(shared_out(sizes, 9).values())) == 4


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
    weights = tensors_of(checkpoint(tmp_path / "shared", 1), "model-*.safetensors")
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
