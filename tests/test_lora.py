"""Adapters as models and an adapter that learns, against merged weights in float64, and PEFT as the peer that reads them."""

from __future__ import annotations

import gc
import json
import math
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from camopd import plan as layout
from camopd.adapters import Weights, weights_at
from camopd.config import Branch, Recipe
from camopd.engines import load_engine
from camopd.engines.lora import TRAINED, fresh_adapter, merge, use
from camopd.engines.shared import open_engines
from camopd.engines.transformers import load_model
from camopd.errors import InputError
from camopd.estimate.shapes import read_shape
from camopd.estimate.storage import checkpoint_bytes
from camopd.group import current
from camopd.lora import load_weights
from camopd.plan import Plan, run_id
from camopd.recipe.sections import Lora
from camopd.store import Store
from camopd.student import Student, learning
from camopd.train import Trainer
from camopd.update import make_optimizer, update
from camopd.workers import run_workers
from tests.in_workers import STEPS, make_step, rounds
from tests.in_workers import make_plan as make_training_plan
from tests.reference import SHARED, step_loss
from tests.test_student import moments_of, tensors_of
from tests.tiny import EOS, merged, save_adapter, save_tiny, tiny_model

LIMITS = {"vocab_size": SHARED, "batch_size": 2, "batch_tokens": 20, "max_length": 64}
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [5, 4]]
RESPONSES = [[4, 5, 2], [6, 7, 8, 9, 2], [3], [2, 2]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A base and two adapters of it that have little in common."""
    return {
        "base": save_tiny(tmp_path / "base"),
        "a": save_adapter(tmp_path / "a", tiny_model(), 5),
        "b": save_adapter(tmp_path / "b", tiny_model(), 6, rank=5, use_rslora=True),
    }


def exact(name: str, folders: dict[str, Path]) -> Any:
    """The model in float64, the adapter in its weights by the formula."""
    model = tiny_model().double().requires_grad_(False)
    return model if name == "base" else merged(model, folders[name])


def logprobs(model: Any, prompt: Any, response: Any) -> np.ndarray:
    ids = torch.tensor([[*prompt, *response]])
    found = model(ids).logits[0, len(prompt) - 1 : -1, :SHARED].log_softmax(-1)
    return found.gather(1, ids[0, len(prompt) :, None]).squeeze(1).numpy()


# --- Adapters as models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_adapter_scores_and_samples_as_its_merged_weights_do(name, folders) -> None:
    with closing(load_engine("transformers", folders["base"], adapter=folders[name], **LIMITS)) as engine:
        scores = dict(engine.score(PROMPTS, RESPONSES))
        samples = dict(engine.sample(PROMPTS, [1, 2, 3, 4], max_new_tokens=6, eos_ids=(EOS,)))
    reference = exact(name, folders)
    for index, prompt in enumerate(PROMPTS):
        own = samples[index]
        assert scores[index].logprobs == pytest.approx(logprobs(reference, prompt, RESPONSES[index]), abs=2e-5)
        assert own.logprobs == pytest.approx(logprobs(reference, prompt, own.token_ids), abs=2e-5)
    base = logprobs(exact("base", folders), PROMPTS[0], RESPONSES[0])
    assert np.abs(scores[0].logprobs - base).max() > 0.1  # it would show if the adapter were off


def test_models_over_one_base_are_loaded_once_and_do_not_disturb_each_other(folders, monkeypatch) -> None:
    """Their batches take turns: results are generators, and which adapter speaks is a state of the weights."""
    loaded = []
    monkeypatch.setattr("camopd.engines.transformers.load_model", lambda path: loaded.append(path) or load_model(path))
    adapters = {"a": folders["a"], "base": None, "b": folders["b"]}
    with open_engines("transformers", folders["base"], adapters, **LIMITS) as engines:
        streams = {name: engine.score(PROMPTS, RESPONSES) for name, engine in engines.items()}
        results: dict[str, dict[int, Any]] = {name: {} for name in streams}
        for turn in zip(*streams.values(), strict=True):
            for name, (index, scores) in zip(streams, turn, strict=True):
                results[name][index] = scores.logprobs
    assert loaded == [folders["base"]]
    for name in adapters:
        reference = exact(name, folders)
        for index, prompt in enumerate(PROMPTS):
            assert results[name][index] == pytest.approx(logprobs(reference, prompt, RESPONSES[index]), abs=2e-5)


def test_closed_engines_let_go_of_their_base(folders, monkeypatch) -> None:
    """Who asked them still holds them: the next base comes while the variable has its old value."""
    models = []

    def loaded(path: Any) -> Any:
        model = load_model(path)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr("camopd.engines.transformers.load_model", loaded)
    with open_engines("transformers", folders["base"], {"a": folders["a"], "base": None}, **LIMITS) as engines:
        dict(engines["a"].score(PROMPTS, RESPONSES))
    gc.collect()
    assert len(engines) == 2
    assert models[0]() is None


def test_merged_it_is_a_model_like_others(folders, tmp_path) -> None:
    model = load_weights(Weights(str(folders["base"]), str(folders["a"])), Store())
    model.save_pretrained(tmp_path / "whole")
    saved = load_model(tmp_path / "whole")
    assert logprobs(saved.double().requires_grad_(False), PROMPTS[0], RESPONSES[0]) == pytest.approx(
        logprobs(exact("a", folders), PROMPTS[0], RESPONSES[0]), abs=2e-5
    )
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny_model().named_parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_of_another_base_is_refused(folders, tmp_path) -> None:
    other = load_model(save_tiny(tmp_path / "other", head_dim=16))
    with pytest.raises(InputError, match=r"does not fit the base: .*size mismatch"):
        merge(other, folders["a"])


def test_where_the_base_lies(folders, tmp_path) -> None:
    """As given, else as the adapter says, where that is a place; a name of a hub is none."""
    store, base = Store(), str(folders["base"])
    assert weights_at(base, store) == Weights(base)
    assert weights_at(str(folders["a"]), store, base) == Weights(base, str(folders["a"]))
    knows = save_adapter(tmp_path / "knows", tiny_model(), base_model_name_or_path=base)
    assert weights_at(str(knows), store) == Weights(base, str(knows))
    assert weights_at(str(knows), store, "/elsewhere") == Weights("/elsewhere", str(knows))
    hub = save_adapter(tmp_path / "hub", tiny_model(), base_model_name_or_path="Qwen/Qwen3-8B")
    with pytest.raises(
        InputError, match=r"student: .*hub is an adapter and names as its base 'Qwen/Qwen3-8B', which.*set base ="
    ):
        weights_at(str(hub), store, where="student")


# --- An adapter that learns -----------------------------------------------------------------------------------------------


def learner(**settings: Any) -> tuple[Student, Recipe]:
    """A student whose adapter is no longer zero, and its recipe."""
    recipe = make_training_plan("/runs/x", "/m", "topk", {"max_grad_norm": 1e9, "lora": {}, **settings}).recipe
    model = tiny_model()
    fresh_adapter(model, rank=3, alpha=4.0, targets=(), seed=7)
    return Student(model, recipe.train), recipe


def test_at_first_it_is_the_model_that_it_lies_over() -> None:
    (student, recipe), rows = learner(learning_rate=1e-12), make_step(0, STEPS[1])
    whole = tiny_model()
    numbers = [
        update(each, make_optimizer(each.model, recipe), rows, recipe=recipe, vocab_size=SHARED)
        for each in (student, Student(whole, recipe.train))
    ]
    assert numbers[0]["loss"] == numbers[1]["loss"]
    assert 0 < numbers[0]["grad_norm"] < numbers[1]["grad_norm"]


@pytest.mark.parametrize("signal", ["sampled", "topk"])
def test_its_gradient_is_that_of_the_formula(signal) -> None:
    """d loss / d A and d loss / d B of W + alpha / r B A, by autograd in float64."""
    student, recipe = learner(learning_rate=1e-12)
    recipe = recipe.model_copy(update={"score": recipe.score.model_copy(update={"signal": signal})})
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in learning(student.model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rows = make_step(0, STEPS[1])
    numbers = update(student, make_optimizer(student.model, recipe), rows, recipe=recipe, vocab_size=SHARED)

    reference = tiny_model().double().requires_grad_(False)
    own = {name: parameter.detach().double().requires_grad_() for name, parameter in learning(student.model).items()}
    changed = {}
    for name in (name.removesuffix(f".lora_A.{TRAINED}.weight") for name in own if ".lora_A." in name):
        low, high = (own[f"{name}.lora_{side}.{TRAINED}.weight"] for side in "AB")
        changed[f"{name}.weight"] = reference.get_parameter(f"{name}.weight") + 4 / 3 * (high @ low)
    loss = step_loss(
        lambda ids, **options: functional_call(reference, changed, (ids,), options),
        rows,
        signal=signal,
        advantage=lambda q, p: math.log(q / p),
        scale={"general": 2.0, "domain": 1.0},
        teachers={},
        limits=(0.2, 5.0),
    )
    loss.backward()
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert len(own) == 2 * 7 * 2
    for name, parameter in learning(student.model).items():
        torch.testing.assert_close(parameter.grad.double(), own[name].grad, atol=3e-5, rtol=2e-3, msg=name)


def test_only_the_adapter_has_moments_and_moves(folders) -> None:
    student, recipe = learner(learning_rate=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in student.model.named_parameters()}
    optimizer = make_optimizer(student.model, recipe)
    rows = make_step(0, STEPS[1])
    update(student, optimizer, rows, recipe=recipe, vocab_size=SHARED)
    moved = {name for name, parameter in student.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert moved <= set(learning(student.model))
    assert {id(parameter) for parameter in optimizer.state} <= {id(parameter) for parameter in learning(student.model).values()}


def test_looks_at_gradients_are_taken_on_the_adapter(tmp_path) -> None:
    train = {"lora": {"rank": 2}, "diagnose_every": 1}
    trainer = Trainer.load(make_training_plan("/runs/x", str(save_tiny(tmp_path / "s")), "topk", train), 1, Store())
    rows = make_step(0, {"general": 3, "domain": 3})
    found = trainer.step(rows, rows)["diagnostics"]
    assert found["domain/gradient_norm"] > 0
    frozen = [parameter for parameter in trainer.model.parameters() if not parameter.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)


def test_a_pause_for_another_voice_leaves_gradients_on(folders) -> None:
    student, _ = learner()
    before = set(learning(student.model))
    use(student.model, None)
    assert not learning(student.model)
    use(student.model, TRAINED)
    assert set(learning(student.model)) == before


# --- Checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoint(run_uri: Path, number: int) -> Path:
    return Path(layout.checkpoint_uri(layout.round_uri(str(run_uri), number)))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of the whole model where there is one, the adapter, and the moments, in however many files they lie."""
    parts = [tensors_of(folder, "model*.safetensors"), tensors_of(folder, "**/adapter_model.safetensors"), moments_of(folder)]
    return {f"{number}:{name}": tensor for number, part in enumerate(parts) for name, tensor in sorted(part.items())}


def train(run_uri: Path, student: Path, numbers: list[int], **lora: Any) -> list[dict[str, Any]]:
    return rounds(str(run_uri), str(student), "topk", {"lora": lora, "learning_rate": 1e-2}, numbers)


def test_a_checkpoint_is_an_adapter_that_peft_and_transformers_load(folders, tmp_path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    train(tmp_path / "run", folders["base"], [1], rank=3)
    saved = checkpoint(tmp_path / "run", 1)
    assert not (saved / "model.safetensors").exists()
    assert not (saved / "config.json").exists()
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(folders["base"]), 3, 6)
    reference = logprobs(merged(tiny_model().double().requires_grad_(False), saved), PROMPTS[2], RESPONSES[1])
    assert np.abs(reference - logprobs(exact("base", folders), PROMPTS[2], RESPONSES[1])).max() > 1e-3
    for kind in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        model = kind.from_pretrained(saved).requires_grad_(False)
        assert logprobs(model, PROMPTS[2], RESPONSES[1]) == pytest.approx(reference, abs=2e-5)
    assert len(moments_of(saved)) == 3 * 2 * 7 * 2


@pytest.mark.parametrize("output", ["adapter", "merged"])
def test_a_checkpoint_has_the_bytes_that_were_foreseen(output, folders, tmp_path) -> None:
    train(tmp_path / "run", folders["base"], [1], output=output, rank=3)
    held = sum(path.stat().st_size for path in checkpoint(tmp_path / "run", 1).rglob("*.safetensors"))
    shape = read_shape(json.loads((folders["base"] / "config.json").read_text()), "tiny")
    foreseen = checkpoint_bytes(shape, Lora(output=output, rank=3))
    assert foreseen < held < foreseen + 25_000  # names and shapes


@pytest.mark.parametrize("output", ["adapter", "merged"])
@pytest.mark.parametrize("start", ["base", "a"])
def test_a_round_goes_on_from_the_checkpoint_as_if_there_had_been_no_pause(start, output, folders, tmp_path) -> None:
    """Round by round, each by a trainer that loads it; and to the bit the same when round 2 is done again."""
    student = folders["base"]
    if start == "a":
        student = save_adapter(tmp_path / "student", tiny_model(), base_model_name_or_path=str(folders["base"]))
    once = train(tmp_path / "once", student, [1, 2], output=output)
    assert once == train(tmp_path / "again", student, [1], output=output) + train(
        tmp_path / "again", student, [2], output=output
    )
    for number in (1, 2):
        mine, other = (tensors(checkpoint(tmp_path / name, number)) for name in ("once", "again"))
        assert list(mine) == list(other)
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    if output == "merged":
        whole = load_model(checkpoint(tmp_path / "once", 2)).double().requires_grad_(False)
        apart = merged(tiny_model().double().requires_grad_(False), checkpoint(tmp_path / "once", 2) / "trainer/adapter")
        assert logprobs(whole, PROMPTS[0], RESPONSES[0]) == pytest.approx(logprobs(apart, PROMPTS[0], RESPONSES[0]), abs=2e-5)


def test_an_adapter_goes_on_learning_with_its_own_settings(folders, tmp_path) -> None:
    student = save_adapter(
        tmp_path / "student", tiny_model(), rank=5, alpha=7.0, use_rslora=True, base_model_name_or_path=str(folders["base"])
    )
    train(tmp_path / "run", student, [1])
    saved = json.loads((checkpoint(tmp_path / "run", 1) / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (5, 7, True)
    assert saved["base_model_name_or_path"] == str(folders["base"])
    before, after = (load_file(path / "adapter_model.safetensors") for path in (student, checkpoint(tmp_path / "run", 1)))
    steps = [(before[name] - after[name]).abs().max().item() for name in before]
    assert 0 < max(steps) < 0.05  # four steps of 1e-2: it began where the given one was


def test_all_weights_of_an_adapter_may_learn_and_the_output_is_a_whole_model(folders, tmp_path) -> None:
    student = save_adapter(tmp_path / "student", tiny_model(), base_model_name_or_path=str(folders["base"]))
    rounds(str(tmp_path / "run"), str(student), "topk", {"learning_rate": 1e-6}, [1])
    whole = load_model(checkpoint(tmp_path / "run", 1)).double().requires_grad_(False)
    start = merged(tiny_model().double().requires_grad_(False), student)
    assert logprobs(whole, PROMPTS[0], RESPONSES[0]) == pytest.approx(logprobs(start, PROMPTS[0], RESPONSES[0]), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"output": "adapter"}, {"output": "merged"}], ids=lambda settings: settings["output"])
def test_two_processes_do_what_one_does(settings, folders, tmp_path) -> None:
    lora = {"lora": {"rank": 3, **settings}, "learning_rate": 1e-2}
    common = {"student": str(folders["base"]), "signal": "topk", "numbers": [1, 2]}
    alone = rounds(str(tmp_path / "alone"), train=lora, **common)
    arguments = {"run_uri": str(tmp_path / "shared"), "train": lora | {"num_processes": 2}, **common}
    shared = run_workers("tests.in_workers:rounds", arguments, num_processes=2)
    assert [record["loss"] for record in shared] == pytest.approx([record["loss"] for record in alone], rel=2e-4)
    for number in (1, 2):
        mine, other = (tensors(checkpoint(tmp_path / name, number)) for name in ("alone", "shared"))
        assert mine.keys() == other.keys()
        for name in mine:
            torch.testing.assert_close(
                mine[name], other[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_bfloat16_is_for_the_passes_alone(tmp_path) -> None:
    student, recipe = learner(precision="bfloat16", learning_rate=1e-3)
    rows = make_step(0, STEPS[0])
    exactly, recipe32 = learner(learning_rate=1e-3)
    losses = [
        update(each, make_optimizer(each.model, own), rows, recipe=own, vocab_size=SHARED)["loss"]
        for each, own in ((student, recipe), (exactly, recipe32))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] != losses[1]
    assert {parameter.grad.dtype for parameter in learning(student.model).values()} == {torch.float32}


# --- Identity -------------------------------------------------------------------------------------------------------------


def recipe_with(**settings: Any) -> Recipe:
    branches = (
        Branch(name="general", role="recover", teacher="/models/general", prompts="/g.jsonl"),
        Branch(name="domain", role="retain", prompts="/d.jsonl"),
    )
    return Recipe(student="/models/domain", branches=branches, **settings)


def test_an_adapter_to_train_is_another_run_and_the_place_of_the_base_is_not() -> None:
    ids = dict.fromkeys(("student", "teacher/general", "teacher/domain"), "sha256:1")
    plain = run_id(recipe_with(), ids)
    assert run_id(recipe_with(base="/models/base"), ids) == plain
    assert run_id(recipe_with(train={"lora": None}), ids) == plain
    others = [run_id(recipe_with(train={"lora": lora}), ids) for lora in ({}, {"rank": 4}, {"output": "merged"})]
    assert len({plain, *others}) == 4


def test_a_checkpoint_belongs_to_the_domain_model_s_base(folders, tmp_path) -> None:
    """Wherever its adapter_config.json says that the base once lay."""
    run = tmp_path / "run"
    train(run, folders["base"], [1])
    recipe = recipe_with().model_copy(update={"student": str(folders["base"]), "base": None})
    plan = Plan(str(run), recipe, {}, SHARED, (2,), 0, {}, "t", 32)
    config = checkpoint(run, 1) / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folders["base"]), "/gone"))
    assert plan.weights(str(checkpoint(run, 1)), Store()) == Weights(str(folders["base"]), str(checkpoint(run, 1)))


@pytest.mark.parametrize("output", ["adapter", "merged"])
def test_it_goes_on_from_the_middle_of_a_round(output, folders, tmp_path) -> None:
    """From what was kept beside the updates: the weights and moments of that moment, not of later ones."""
    lora = {"lora": {"output": output}, "learning_rate": 1e-2}
    plan = make_training_plan(str(tmp_path / "run"), str(folders["base"]), "topk", lora)
    whole = Trainer.load(plan, 1, Store())
    for number, counts in enumerate(STEPS):
        rows = make_step(number, counts)
        whole.step(rows, rows)
        if number == 1:
            write = whole.frozen(Store(), copy=True)
    write(tmp_path / "within", current())
    rest = Trainer.load(plan, 1, Store(), within=str(tmp_path / "within"))
    for number in (2, 3):
        rows = make_step(number, STEPS[number])
        rest.step(rows, rows)
    for trainer, name in ((whole, "whole"), (rest, "rest")):
        trainer.save(tmp_path / name, Store())
    mine, other = tensors(tmp_path / "whole"), tensors(tmp_path / "rest")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
