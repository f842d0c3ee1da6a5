"""Estimates: counts that others have published or that can be worked out by hand, the compiled graph, the verb."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from camopd import workflow
from camopd.config import Recipe, load_recipe
from camopd.errors import InputError, StoreError
from camopd.estimate.assumptions import Assumptions, Lengths, most_kept, typical_lengths
from camopd.estimate.colocated import colocated_advice, colocated_memory, phases, sampling_memory
from camopd.estimate.memory import fitted, largest_batch, rollout_memory, score_memory, train_memory
from camopd.estimate.pods import OBJECT_LIMIT, check_pods, pods
from camopd.estimate.shapes import ModelShape, causal_pairs, read_shape
from camopd.estimate.sources import SHIPPED, LengthOptions, lengths_given, mean_lengths, model_shapes
from camopd.estimate.total import Estimate, at_limits, estimate
from camopd.estimate.work import samples_of, scored_branches, sequences_together, train_flops, train_work
from camopd.presets import presets
from camopd.recipe.sections import Lora
from camopd.select import select_by_mass
from camopd.store import Store
from pipelines.pods import pods_of

ROOT = Path(__file__).parents[1]
RECIPES = ("medical-8b", "roleplay-4b")


def shape_of(name: str) -> ModelShape:
    return read_shape(json.loads((SHIPPED / f"{name}.json").read_text()), name)


def recipe_of(name: str = "medical-8b", **settings) -> Recipe:
    if settings.get("execution") == "colocated":
        settings |= {"train.num_processes": 1, "rollout.engine": "transformers"}
    return load_recipe(ROOT / "recipes" / f"{name}.toml", settings)


# --- Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "without_embeddings"),
    [("Qwen3-8B", 8_190_735_360, 6.95e9), ("Qwen3-4B-Instruct-2507", 4_022_468_096, 3.6e9)],
)
def test_public_models_have_the_published_number_of_parameters(name: str, parameters: int, without_embeddings: float) -> None:
    """The totals that Hugging Face counts in the checkpoints, and the model cards' rounded numbers without embeddings."""
    shape = shape_of(name)
    assert shape.parameters == parameters
    embeddings = shape.head * (1 if shape.tied else 2)
    assert shape.parameters - embeddings == pytest.approx(without_embeddings, rel=0.01)


@pytest.mark.parametrize(("lengths", "expected"), [([512, 1024, 2048], 180997438046208), ([4096] * 3, 648394032807936)])
def test_operations_agree_with_verl_s_count_for_qwen3_8b(lengths: list[int], expected: int) -> None:
    """verl's tests/utils/test_flops_counter.py: forward and backward pass, three times the forward in all parts. It counts the
    embedding's look-up as a product, and half of S^2 pairs; we count neither and the diagonal as well."""
    shape = shape_of("Qwen3-8B")
    forward = sum(lengths) * (shape.token_flops + shape.head_flops) + sum(causal_pairs(s) for s in lengths) * shape.pair_flops
    diagonal = sum(lengths) / 2 * shape.pair_flops
    assert 3 * (forward - diagonal + sum(lengths) * shape.head_flops) == expected


def test_a_cache_of_qwen3_8b_takes_144_kib_a_token() -> None:
    """36 layers x (key and value) x 8 heads x 128 x 2 bytes."""
    assert shape_of("Qwen3-8B").cache_bytes(2) == 144 * 1024


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is none of llama, mistral, qwen2, qwen3"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"hidden_size": 0}, "hidden_size is 0"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(change: dict, said: str) -> None:
    config = json.loads((SHIPPED / "Qwen3-8B.json").read_text()) | change
    with pytest.raises(InputError, match=said):
        read_shape(config, "config.json")


def test_config_files_are_found_where_they_are_given_then_beside_the_model_then_by_name(tmp_path) -> None:
    config = json.loads((SHIPPED / "Qwen3-8B.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config | {"num_hidden_layers": 3}))

    recipe = recipe_of(student=str(tmp_path))
    shapes, origins = model_shapes(recipe, {})
    assert [shapes[name].layers for name in ("student", "general", "domain")] == [2, 36, 2]
    assert origins["general"] == "shipped for Qwen3-8B"
    shapes, _ = model_shapes(recipe, {"student": str(other)})
    assert [shapes[name].layers for name in ("student", "general", "domain")] == [3, 36, 3]

    elsewhere = recipe_of(student="s3://models/mine")
    shapes, origins = model_shapes(elsewhere, {})
    assert shapes["student"].layers == 36
    assert origins["student"] == "not on this machine: taken as Qwen3-8B"


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"medical": "x"}, "'medical' is neither student nor a branch"),
        ({"student": "/nowhere"}, "/nowhere: cannot be read as JSON"),
        ({}, "neither s3://models/a nor a teacher has a config.json .* --config student=PATH"),
    ],
)
def test_a_model_without_a_config_is_an_error_that_says_what_to_give(given_: dict, said: str) -> None:
    recipe = recipe_of(**{"student": "s3://models/a", "branches.general.teacher": "s3://models/b"})
    with pytest.raises(InputError, match=said):
        model_shapes(recipe, given_)


# --- Tokens and time ------------------------------------------------------------------------------------------------------


def test_the_paper_s_schedule_is_90_general_and_30_domain_steps() -> None:
    recipe = recipe_of()
    assert samples_of(recipe, 120) == {"general": 90 * 512, "domain": 30 * 512}
    assert scored_branches(recipe) == 60
    mixed = recipe_of(**{"method": "mopd-3to1", "rollout.samples_per_prompt": "2"})
    assert samples_of(mixed, 120) == {"general": 120 * 384 * 2, "domain": 120 * 128 * 2}


@given(scores=st.lists(st.floats(0, 10), min_size=1, max_size=30), mass=st.floats(0.05, 0.99))
def test_selection_keeps_no_more_than_its_mass(scores: list[float], mass: float) -> None:
    """What stands for the share of samples that are trained on."""
    chosen = select_by_mass({(str(i), 0): score for i, score in enumerate(scores)}, mass)
    branch = recipe_of(**{"branches.general.mass": mass}).branch("general")
    if sum(scores):
        assert sum(choice.kept for choice in chosen.values()) <= math.ceil(most_kept(branch) * len(scores) + 1e-6)


def test_an_update_by_hand() -> None:
    """10 samples, half kept, 3 tokens of prompt and 4 of response: 6 positions, 21 pairs, 4 predictions each."""
    shape = ModelShape("llama", 11, 6, 8, 2, 3, 1, 2, False)
    stage = train_work(shape, "general", 10, Lengths(3, 4, 0.5), Assumptions(checkpointing=False))
    a_layer = 6 * 6 + 6 * 2 * 2 + 6 * 6 + 3 * 6 * 8
    matrices, attention, head = 2 * 2 * a_layer * 6, 2 * 2 * 2 * 6 * 21, 2 * 11 * 6 * 4
    assert stage.flops == 5 * (3 * matrices + 3.5 * attention + 3 * head)
    assert stage.tokens == 5 * 6
    assert stage.gpu_seconds == pytest.approx(stage.flops / (989e12 * 0.3))
    again = train_work(shape, "general", 10, Lengths(3, 4, 0.5), Assumptions(checkpointing=True))
    assert again.flops == 5 * (4 * matrices + 4.5 * attention + 3 * head)


def test_the_assumed_share_of_peak_is_torchtitan_s_without_compilation() -> None:
    """5,762 tokens a second and H100, Llama 3.1 8B at 8,192 tokens, FSDP, selective checkpointing; 6,667 with torch.compile."""
    llama = ModelShape("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, False)
    assert llama.parameters == 8_030_261_248
    flops = train_flops(llama, 8192, causal_pairs(8192), 8192, checkpointing=False) / 8192
    assert [round(tokens * flops / 989e12, 2) for tokens in (5_762, 6_667)] == [0.31, 0.35]
    assert Assumptions.peak_share == pytest.approx(0.31, abs=0.02)


def test_decoding_waits_for_memory_and_an_engine_that_refills_takes_fewer_steps() -> None:
    recipe, shape = recipe_of(**{"rollout.batch_size": "4"}), shape_of("Qwen3-8B")
    lengths = typical_lengths(recipe)
    shapes = dict.fromkeys(("student", "general", "domain"), shape)
    seconds = {}
    for engine in ("transformers", "vllm"):
        found = estimate(recipe, shapes, lengths, Assumptions(engine=engine))
        seconds[engine] = sum(stage.gpu_seconds for stage in found.work if stage.name == "rollout")
    reading = shape.parameters * 2 / (3.35e12 * 0.6)  # the weights, once a step
    tokens = 120 * 512 * lengths["general"].response
    cache = tokens * (512 + 2048) * shape.cache_bytes(2) / (3.35e12 * 0.6)
    fill = 120 * 512 * (shape.token_flops * 512 + shape.pair_flops * 512 * 513 / 2 + shape.head_flops) / (989e12 * 0.3)
    assert seconds["vllm"] == pytest.approx(tokens / 4 * reading + cache + fill, rel=1e-6)
    assert seconds["transformers"] == pytest.approx(120 * 512 / 4 * 32768 * reading + cache + fill, rel=1e-6)


def test_more_of_anything_takes_more_time() -> None:
    shapes = dict.fromkeys(("student", "general", "domain"), shape_of("Qwen3-8B"))

    def hours(given_: Assumptions | None = None, **settings) -> float:
        recipe = recipe_of(**settings)
        return estimate(recipe, shapes, typical_lengths(recipe), given_ or Assumptions()).gpu_hours

    base = hours()
    assert hours(**{"rollout.prompts_per_step": "1024"}) > base
    assert hours(**{"rollout.max_new_tokens": "40000"}) > base
    assert hours(num_rounds="60") == pytest.approx(2 * base)
    assert hours(Assumptions(gpu="A100")) > base
    assert hours(Assumptions(checkpointing=False)) < base


def test_the_share_of_peak_that_explains_known_hours_does_so() -> None:
    recipe, shapes = recipe_of(), dict.fromkeys(("student", "general", "domain"), shape_of("Qwen3-8B"))
    lengths = typical_lengths(recipe)
    found = estimate(recipe, shapes, lengths, Assumptions(engine="vllm"))
    share = found.peak_share_for(40, Assumptions(engine="vllm"))
    assert share is not None
    # Prompts are filled at the peak share, too, which is taken as assumed: a percent of the whole.
    assert estimate(recipe, shapes, lengths, Assumptions(engine="vllm", peak_share=share)).gpu_hours == pytest.approx(
        40, rel=0.01
    )
    assert found.peak_share_for(1, Assumptions(engine="vllm")) is None


@pytest.mark.parametrize("method", sorted(presets()))
@pytest.mark.parametrize("execution", ["staged", "colocated"])
def test_every_preset_can_be_planned(method: str, execution: str) -> None:
    recipe = recipe_of(method=method, execution=execution)
    shapes = dict.fromkeys(("student", "general", "domain"), shape_of("Qwen3-8B"))
    given = Assumptions(engine="vllm", gpu_memory=320 if execution == "colocated" else None)  # one GPU has to hold it all
    found = estimate(recipe, shapes, typical_lengths(recipe), given)
    assert set(found.tokens) == ({"general"} if method == "general-only" else {"general", "domain"})
    assert sum(own.samples for own in found.tokens.values()) == 120 * 512
    assert found.hours is not None
    assert found.hours <= found.gpu_hours
    *stages, starts = found.work
    alone = sum(stage.gpu_seconds / (stage.gpus or 0) for stage in stages) / 3600
    pods_in_turn = 1 if execution == "colocated" else 60 + scored_branches(recipe)
    assert found.hours == pytest.approx(alone + pods_in_turn * 3 / 60)
    assert starts.gpu_seconds >= pods_in_turn * 180
    assert bool(found.tables) == (execution == "staged")


def test_three_branches_and_a_larger_teacher() -> None:
    extra = {"name": "law", "role": "retain", "prompts": "s3://prompts/law.jsonl", "teacher": "s3://models/law"}
    values = recipe_of().model_dump()
    recipe = Recipe.model_validate({**values, "branches": [*values["branches"], extra]})
    shapes = dict.fromkeys(("student", "general", "domain"), shape_of("Qwen3-4B-Instruct-2507")) | {"law": shape_of("Qwen3-8B")}
    found = estimate(recipe, shapes, typical_lengths(recipe), Assumptions())
    assert set(found.tokens) == {"general", "domain", "law"}
    assert found.memory["score"].sharded["weights"] == 2 * 8_190_735_360
    assert found.memory["train"].sharded["state"] == 16 * 4_022_468_096


# --- Memory ---------------------------------------------------------------------------------------------------------------


def test_the_least_number_of_gpus_is_the_first_that_fits() -> None:
    assert fitted({"a": 100.0}, {"b": 10.0}, 60.0).gpus == 2
    assert fitted({"a": 100.1}, {"b": 10.0}, 60.0).gpus == 3
    assert fitted({}, {"b": 10.0}, 10.0).gpus is None
    assert fitted({"a": 100.0}, {"b": 10.0}, 50.0, divisible=32).gpus == 4  # 3 would do, and does not divide the heads
    assert fitted({"a": 100.0}, {"b": 10.0}, 50.0, divisible=1).gpus is None


def test_an_8b_model_trains_on_longest_responses_on_80_gb_cards_only_with_checkpointing() -> None:
    recipe, shape = recipe_of(), shape_of("Qwen3-8B")
    held = train_memory(shape, recipe, Assumptions())
    assert held.gpus is not None
    assert held.on_each(held.gpus) <= 72e9 < held.on_each(held.gpus - 1)
    assert train_memory(shape, recipe, Assumptions(checkpointing=False)).gpus is None


def test_one_gpu_alone_holds_a_whole_copy_in_bfloat16() -> None:
    """Where that no longer fits, two GPUs share the work, and each gathers a few layers at a time."""
    recipe = recipe_of(**{"prompts.max_prompt_tokens": "512", "rollout.max_new_tokens": "512"})
    shape = shape_of("Qwen3-4B-Instruct-2507")
    large = train_memory(shape, recipe, Assumptions(gpu_memory=141))
    assert large.gpus == 1
    assert large.whole == {
        "rounded weights": 2 * shape.parameters,
        "their gradients": 2 * shape.parameters,
        "last gradient": 4 * shape.head,
    }
    needed = large.on_each(1) / 0.9e9
    assert train_memory(shape, recipe, Assumptions(gpu_memory=needed + 0.1)).gpus == 1
    tight = train_memory(shape, recipe, Assumptions(gpu_memory=needed - 0.1))
    assert tight.gpus == 2
    assert sum(tight.whole.values()) < 4 * shape.parameters
    assert train_memory(shape, recipe, Assumptions(gpu_memory=141, dtype="float32")).whole.keys() == {
        "activations",
        "working",
        "head gradient",
    }


def test_an_adapter_of_qwen3_8b_has_the_parameters_that_peft_counts() -> None:
    """43,646,976 of rank 16 on all linear layers; on queries alone 16 x (4,096 + 4,096) x 36."""
    shape = shape_of("Qwen3-8B")
    assert shape.adapter(Lora()) == shape.adapter(Lora(rank=16, output="merged")) == 43_646_976
    assert shape.adapter(Lora(rank=8, targets=["self_attn.q_proj"])) == 8 * (4096 + 4096) * 36
    assert shape.adapter(None) == 0


def test_an_adapter_needs_state_for_itself_alone() -> None:
    shape, adapter = shape_of("Qwen3-8B"), 43_646_976
    whole, small = (train_memory(shape, recipe_of(**more), Assumptions()) for more in ({}, {"train.lora.rank": "16"}))
    assert small.sharded["state"] == 4 * shape.parameters + 16 * adapter
    assert "head gradient" in whole.whole.keys() - small.whole.keys()
    assert small.gpus < whole.gpus
    full, lora, merged = (
        estimate(recipe, dict.fromkeys(("student", "general", "domain"), shape), typical_lengths(recipe), Assumptions())
        for recipe in (recipe_of(), recipe_of(**{"train.lora.rank": 16}), recipe_of(**{"train.lora.output": "merged"}))
    )
    rounds = recipe_of().num_rounds
    assert (full.checkpoints, lora.checkpoints) == (12 * shape.parameters * rounds, 12 * adapter * rounds)
    assert merged.checkpoints == lora.checkpoints + 4 * shape.parameters * rounds
    training = [sum(stage.flops for stage in found.work if stage.name == "train") for found in (full, lora)]
    assert 0.7 < training[1] / training[0] < 0.8  # with checkpointing 3 of 4 passes over the matrices, attention as before


def test_teachers_that_are_the_student_s_base_take_no_memory_of_their_own() -> None:
    shapes = dict.fromkeys(("student", "general", "domain"), shape_of("Qwen3-4B-Instruct-2507"))

    def held(**more) -> dict[str, float]:
        recipe = recipe_of(execution="colocated", **{"rollout.engine": "transformers", **more})
        return estimate(recipe, shapes, typical_lengths(recipe), Assumptions()).memory["recover"].whole

    shape = shapes["student"]
    assert held()["teachers"] == 2 * 4 * shape.parameters
    assert held(**{"train.lora.rank": 16})["teachers"] == 4 * shape.parameters
    base = recipe_of().teacher(recipe_of().branch("general"))
    assert held(**{"train.lora.rank": 16, "base": base})["teachers"] == 0


def test_an_adapter_has_the_shape_of_the_base(tmp_path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir(), base.mkdir()
    (base / "config.json").write_text((SHIPPED / "Qwen3-8B.json").read_text())
    recipe = recipe_of(student=str(adapter), base=str(base))
    shapes, origins = model_shapes(recipe, {})
    assert (shapes["student"], origins["student"]) == (shape_of("Qwen3-8B"), str(base / "config.json"))


def test_the_advised_batch_fits_and_one_more_does_not() -> None:
    shape, given_ = shape_of("Qwen3-8B"), Assumptions(engine="transformers")
    batch = largest_batch(shape, recipe_of(), given_)
    assert batch > 1
    assert rollout_memory(shape, recipe_of(**{"rollout.batch_size": batch}), given_).gpus == 1
    assert rollout_memory(shape, recipe_of(**{"rollout.batch_size": batch + 1}), given_).gpus is None
    assert largest_batch(shape, recipe_of(), Assumptions(gpu_memory=16, engine="transformers")) == 0


def test_a_teacher_that_is_too_large_is_divided_by_vllm_alone() -> None:
    shape, small = shape_of("Qwen3-8B"), Assumptions(gpu_memory=20, engine="transformers")
    assert score_memory(shape, recipe_of(), small).gpus is None
    assert score_memory(shape, recipe_of(), Assumptions(gpu_memory=20, engine="vllm")).gpus == 2


def test_one_process_holds_everything_on_one_gpu_and_never_all_of_it_at_once() -> None:
    """4B in bfloat16 with two teachers of its size: 20 P always, 4 P of gradients in training, 2 P of vLLM's in sampling."""
    recipe = recipe_of(
        "roleplay-4b", execution="colocated", **{"rollout.max_new_tokens": 4096, "prompts.max_prompt_tokens": 1024}
    )
    shape, given = shape_of("Qwen3-4B-Instruct-2507"), Assumptions(engine="vllm")
    shapes, billions = dict.fromkeys(("student", "general", "domain"), shape), 4_022_468_096
    held = phases(recipe, shapes, given)
    assert [parts["state"] / billions for parts in held.values()] == [12, 12, 16]
    assert {parts["teachers"] / billions for parts in held.values()} == {8}
    assert (held["sample"]["sampling copy"] / billions, held["train"]["rounded weights"] / billions) == (2, 2)
    assert "sampling copy" not in held["score"] | held["train"] | phases(recipe, shapes, Assumptions())["sample"]

    largest = max(sum(parts.values()) for parts in held.values())
    assert colocated_memory(recipe, shapes, replace(given, gpu_memory=largest / 0.9e9 + 0.01)).gpus == 1
    assert colocated_memory(recipe, shapes, replace(given, gpu_memory=largest / 0.9e9 - 0.01)).gpus is None
    roomy = replace(given, gpu_memory=200, reserve=0.1)  # 20 P of 200 GB stay taken, a tenth is left free
    assert colocated_advice(recipe, shapes, roomy) == (
        "set vllm.gpu_memory_utilization to 0.49 at most: student and teachers keep 80 GB meanwhile"
    )
    assert (1 - 0.1) - 20 * billions / 200e9 == pytest.approx(0.498, abs=1e-3)
    assert colocated_advice(recipe, shapes, replace(roomy, engine="transformers", gpu_memory=600)) is None
    assert "to train; take a larger one" in str(colocated_advice(recipe, shapes, given))


def test_a_cache_beside_the_trainer_has_what_is_left_over() -> None:
    recipe = recipe_of("roleplay-4b", execution="colocated")
    shapes, lengths = (
        dict.fromkeys(("student", "general", "domain"), shape_of("Qwen3-4B-Instruct-2507")),
        typical_lengths(recipe),
    )
    given = Assumptions(engine="vllm", gpu_memory=140)
    few, many = (
        sequences_together(shapes["student"], recipe, 10**6, lengths["general"], sampling_memory(recipe, shapes, own), own)
        for own in (given, replace(given, gpu_memory=200))
    )
    assert 1 < few < many


# --- Store and control plane ----------------------------------------------------------------------------------------------


def compiled() -> dict:
    return next(yaml.safe_load_all((ROOT / "pipelines" / "recovery.yaml").read_text()))


def started(spec: dict, component: str, turns: dict[str, int], taken: set[str]) -> int:
    """Pods of a compiled component, one by one, as KFP's Argo compiler starts them.

    Args:
        spec: the compiled pipeline.
        component: its name.
        turns: of each loop, by the name that people see.
        taken: names of the conditions that are met.
    """
    dag = spec["components"][component].get("dag")
    if dag is None:
        return 2  # driver, executor
    total = 1
    for task in dag["tasks"].values():
        name, own = task["taskInfo"]["name"], task["componentRef"]["name"]
        if task.get("triggerPolicy", {}).get("condition") and name not in taken:
            total += 1
        elif task.get("parameterIterator"):
            total += 1 + sum(started(spec, own, turns, taken) for _ in range(turns[name]))
        else:
            total += started(spec, own, turns, taken)
    return total


@pytest.mark.parametrize(("rounds", "branches", "shards"), [(1, 1, 1), (30, 2, 1), (7, 3, 1), (1, 2, 2), (5, 3, 4)])
def test_pods_are_those_of_the_compiled_graph(rounds: int, branches: int, shards: int) -> None:
    spec = compiled()
    spec["components"]["root"] = {"dag": spec["root"]["dag"]}
    turns = {"rounds": rounds, "branches": branches, "rollout shards": shards, "score shards": shards * branches}
    way = "go" if shards == 1 else "shards"
    recipe = recipe_of(num_rounds=rounds, shards=shards)
    assert pods(recipe, rounds * branches) == started(spec, "root", turns, {"new", way, "passed"})
    colocated = recipe_of(num_rounds=rounds, execution="colocated")
    assert pods(colocated, rounds * branches) == started(spec, "root", turns | {"rounds": 1}, {"new", "colocated", "passed"})


def test_the_count_beside_the_plan_is_that_of_the_committed_graph() -> None:
    assert json.loads((ROOT / "src/camopd/estimate/pods.json").read_text()) == pods_of(compiled()), "run `make compile`"


def test_a_round_by_one_pod_starts_no_more_pods_for_the_sake_of_shards() -> None:
    """19 with two branches: turn, begin 2, three conditions, rollout 2, the loop of branches, 2 x 3, select 2, train 2."""
    assert pods(recipe_of(num_rounds=2), 4) - pods(recipe_of(num_rounds=1), 2) == 19


def test_rounds_that_the_control_plane_cannot_hold_are_refused_with_the_number_that_it_can() -> None:
    recipe = recipe_of(num_rounds=400)
    with pytest.raises(InputError, match=r"num_rounds: 400 rounds are 7,615 pods.*num_rounds = 97 at most") as raised:
        check_pods(recipe, 800)
    assert len(raised.value.problems) == 1
    assert check_pods(recipe_of(num_rounds=97), 194) <= OBJECT_LIMIT
    with pytest.raises(InputError):
        check_pods(recipe_of(num_rounds=98), 196)
    assert check_pods(recipe_of(num_rounds=400, execution="colocated"), 800) < 20_000


def test_shards_that_the_control_plane_cannot_hold_are_refused_with_what_to_lower() -> None:
    recipe = recipe_of(shards=8)
    with pytest.raises(InputError, match=r"num_rounds, shards: 30 rounds of 8 shards are") as raised:
        check_pods(recipe, 60)
    (problem,) = raised.value.problems
    found = re.search(r"num_rounds = (\d+) at most and raise steps_per_round.*lower shards to (\d+) at most", problem.fix)
    assert found
    rounds, shards = map(int, found.groups())
    for most, more in (
        ({"num_rounds": rounds, "shards": 8}, {"num_rounds": rounds + 1, "shards": 8}),
        ({"num_rounds": 30, "shards": shards}, {"num_rounds": 30, "shards": shards + 1}),
    ):
        assert check_pods(recipe_of(**most), 2 * most["num_rounds"]) <= OBJECT_LIMIT
        with pytest.raises(InputError):
            check_pods(recipe_of(**more), 2 * more["num_rounds"])


def test_what_a_cluster_cannot_hold_is_refused_where_a_pipeline_is_prepared_and_nowhere_else(tmp_path) -> None:
    """`camopd run` starts no pods. Its other problems are those of inputs that are not there."""
    values = {"shards": 8, "output": str(tmp_path)}
    with pytest.raises(InputError, match="num_rounds, shards: 30 rounds of 8 shards"):
        workflow.prepare(str(ROOT / "recipes" / "medical-8b.toml"), values, job="job-1")


def test_shards_share_the_hours_and_cost_pod_starts() -> None:
    shapes = dict.fromkeys(("student", "general", "domain"), shape_of("Qwen3-8B"))

    def found(shards: int) -> Estimate:
        recipe = recipe_of(shards=shards)
        return estimate(recipe, shapes, typical_lengths(recipe), Assumptions(start_minutes=0))

    one, four = found(1), found(4)
    assert four.gpu_hours == pytest.approx(one.gpu_hours)
    assert one.hours is not None
    assert four.hours is not None
    shared = sum(stage.gpu_seconds / (stage.gpus or 0) for stage in one.work if stage.name in ("rollout", "score")) / 3600
    assert one.hours - four.hours == pytest.approx(shared * 3 / 4)


# --- Lengths --------------------------------------------------------------------------------------------------------------


def test_lengths_that_are_given_go_before_guesses() -> None:
    recipe = recipe_of()
    options = LengthOptions(prompt=["300", "domain=900"], response=["general=2000"])
    found, said = mean_lengths(recipe, options, Store())
    assert found == {"general": Lengths(300, 2000, 0.8), "domain": Lengths(900, 4096, 0.8)}
    assert said["domain"].startswith("prompt given, guessed")
    assert at_limits(recipe, found)["domain"] == Lengths(4096, 32768, 0.8)


@pytest.mark.parametrize("text", ["0", "-1", "40000", "x", "law=100", "general=", "nan"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--response-tokens"):
        lengths_given([text], "--response-tokens", recipe_of(), 32768)


def test_a_run_without_a_round_cannot_be_measured(tmp_path) -> None:
    with pytest.raises(StoreError, match="is not finished"):
        mean_lengths(recipe_of(), LengthOptions(run_uri=str(tmp_path)), Store())


# --- The verb -------------------------------------------------------------------------------------------------------------

DOCUMENT = ROOT / "docs" / "scale.md"
ALONE = """
import socket, sys
def refuse(*a, **k): raise AssertionError("no network")
socket.socket.connect = refuse
from camopd.cli import main
try:
    main()
finally:
    assert not {"torch", "transformers", "boto3", "kfp"} & sys.modules.keys(), "plan needs none of them"
"""


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE, "plan", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False, env={**os.environ, "COLUMNS": "100"}
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_paper_s_recipes_are_planned_without_torch_and_network(name: str) -> None:
    done = plan(f"recipes/{name}.toml", "--json", "--engine", "vllm", "--price", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    mean = found["mean"]
    assert mean["tokens"]["general"]["samples"] == 46080
    assert mean["memory"]["train"]["gpus"] >= 2
    assert mean["cost"] == pytest.approx(2 * mean["gpu_hours"])
    assert mean["gpu_hours"] == pytest.approx(sum(stage["gpu_seconds"] for stage in mean["work"]) / 3600)
    assert found["limits"]["gpu_hours"] > mean["gpu_hours"]
    assert found["assumptions"]["peak_share"] == Assumptions.peak_share


def test_the_tables_name_every_assumption_and_what_does_not_fit() -> None:
    done = plan("recipes/medical-8b.toml", "--gpu-hours", "224", "--engine", "transformers")
    assert done.returncode == 0, done.stderr
    for option in ("gpu-memory", "peak", "bandwidth", "peak-share", "bandwidth-share", "reserve", "dtype", "engine"):
        assert f"(--{option})" in done.stdout
    assert "does not fit" in done.stdout
    assert "224 GPU-hours" in done.stdout
    assert "128 longest sequences do not fit one GPU" in done.stdout


def test_a_refusal_is_one_message() -> None:
    done = plan("recipes/medical-8b.toml", "-s", "num_rounds=400")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: 1 problem found")
    assert "Traceback" not in done.stderr


def test_the_page_shows_what_the_command_prints_now() -> None:
    """When it does not, put the new output there; figures in the text beside it may have changed, too."""
    blocks = re.findall(r"```console\n\$ COLUMNS=100 camopd plan ([^\n]*)\n(.*?)\n```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for command, shown in blocks:
        assert plan(*command.split()).stdout.rstrip() == shown, f"camopd plan {command}"


# --- Copies and servers ---------------------------------------------------------------------------------------------------


def estimated(**settings):
    recipe = recipe_of(**settings)
    shapes = dict.fromkeys(("student", "general", "domain"), shape_of("Qwen3-8B"))
    return estimate(recipe, shapes, typical_lengths(recipe), Assumptions())


def test_copies_of_a_model_take_their_gpus_and_divide_the_hours() -> None:
    one, four = estimated(), estimated(**{"rollout.replicas": 4})
    for before, after in zip(one.work, four.work, strict=True):
        if before.name in ("rollout", "score"):
            assert after.gpus == 4 * before.gpus
            assert after.gpu_seconds == pytest.approx(before.gpu_seconds)
        elif before.name == "train":
            assert after == before
    recipe = recipe_of()
    extra = 3 * (recipe.num_rounds * one.memory["rollout"].gpus + scored_branches(recipe) * one.memory["score"].gpus)
    assert four.work[-1].gpu_seconds - one.work[-1].gpu_seconds == pytest.approx(extra * 180)
    assert four.hours < one.hours


def test_a_served_teacher_scores_on_no_gpu_of_ours() -> None:
    one = estimated()
    half = estimated(**{"branches.general.teacher": "http://h:8000/v1"})
    none = estimated(**{"branches.general.teacher": "http://h:8000/v1", "branches.domain.teacher": "http://h:8000/v1#d"})
    assert [stage.branch for stage in half.work if stage.name == "score"] == ["domain"]
    assert [stage for stage in half.work if stage.name in ("rollout", "train")] == [
        stage for stage in one.work if stage.name in ("rollout", "train")
    ]
    assert "score" not in none.memory
    assert none.gpu_hours < half.gpu_hours < one.gpu_hours
