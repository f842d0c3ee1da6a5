"""Estimates beside what is measured: weights on disk, operators counted by torch, tensors alive, files of a real run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from camopd import plan as layout
from camopd import workflow
from camopd.checkpoint import snapshot
from camopd.config import Recipe, load_recipe
from camopd.engines.packing import use_packing
from camopd.engines.transformers import TransformersEngine, load_model, response_hidden
from camopd.estimate.assumptions import Assumptions
from camopd.estimate.memory import STATE, alone_parts, score_memory
from camopd.estimate.shapes import ModelShape, read_shape
from camopd.estimate.sources import SHIPPED, LengthOptions, mean_lengths, measured_lengths
from camopd.estimate.storage import checkpoint_bytes, row_bytes, table_bytes
from camopd.estimate.total import estimate
from camopd.estimate.work import forward_flops, num_steps, samples_of, train_flops
from camopd.group import current
from camopd.plan import Plan
from camopd.records import write_table
from camopd.schedule import Schedule
from camopd.store import Store
from camopd.student import Student
from camopd.update import make_optimizer, rows_loss, update

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from cost import LiveStorage  # noqa: E402

MICRO = ROOT / "examples" / "micro" / "general"
KINDS = ("llama", "mistral", "qwen2", "qwen3")
PROMPT, RESPONSE = 40, 60


def config_of(kind: str, **settings: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": 304,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
    }
    if kind == "qwen2":
        sizes.pop("head_dim")
    return {"model_type": kind, **sizes, **settings}


def model_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], sliding_window=None, **options)
    return use_packing(AutoModelForCausalLM.from_config(made).to(dtype).eval())


def row(response: int = RESPONSE) -> dict[str, Any]:
    rng = np.random.default_rng(response)
    return {
        "branch": "general",
        "prompt_ids": rng.integers(0, 200, PROMPT, np.int32),
        "response_ids": rng.integers(0, 200, response, np.int32),
        "logprobs": np.full(response, -5.0, np.float32),
        "teacher_logprobs": np.full(response, -4.0, np.float32),
    }


def sampled_recipe(**settings: Any) -> Recipe:
    return load_recipe("micro", {"score.signal": "sampled", **settings})


# --- Parameters -----------------------------------------------------------------------------------------------------------


def test_parameters_are_the_numbers_in_the_micro_example_s_safetensors_header() -> None:
    with (MICRO / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    held = sum(int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")
    assert read_shape(json.loads((MICRO / "config.json").read_text()), "micro").parameters == held


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_every_kind_are_those_of_the_model_that_transformers_makes(kind: str, tied: bool) -> None:
    config = config_of(kind, tie_word_embeddings=tied)
    biases = {"llama": ({}, {"attention_bias": True}, {"mlp_bias": True}), "qwen3": ({}, {"attention_bias": True})}
    for extra in biases.get(kind, ({},)):
        with torch.device("meta"):
            made = model_of_meta(config | extra)
        assert read_shape(config | extra, kind).parameters == sum(p.numel() for p in made.parameters())


def model_of_meta(config: dict[str, Any]) -> PreTrainedModel:
    options = {key: value for key, value in config.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **options))


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-4B-Instruct-2507"])
def test_parameters_of_the_shipped_configs_are_those_of_the_models(name: str) -> None:
    config = json.loads((SHIPPED / f"{name}.json").read_text())
    with torch.device("meta"):
        made = model_of_meta({key: value for key, value in config.items() if key != "architectures"})
    assert read_shape(config, name).parameters == made.num_parameters()


# --- Operations -----------------------------------------------------------------------------------------------------------


def counter() -> FlopCounterMode:
    """torch's, with its own formulas for what it does not know: the attention kernel of the CPU, products added in place."""
    ops = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            ops.addmm_: lambda _, a, b, **__: addmm_flop(None, a, b),
            ops._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **_: sdpa_flop_count(q, k, v),
            ops._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *a, **_: sdpa_backward_flop_count(
                g, q, k, v
            ),
        },
    )


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(kind: str) -> None:
    """One sequence of S positions. torch counts S^2 pairs, for it does not look at the causal half that kernels skip."""
    config = config_of(kind)
    shape, model = read_shape(config, kind), model_of(config)
    length = PROMPT + RESPONSE - 1
    engine = TransformersEngine(model, vocab_size=shape.vocab_size, batch_size=1, batch_tokens=10_000)
    with counter() as counts:
        list(engine.score([row()["prompt_ids"]], [row()["response_ids"]]))
    assert counts.get_total_flops() == forward_flops(shape, length, length**2, RESPONSE)

    with counter() as counts:
        loss, _ = rows_loss(model, [row()], recipe=sampled_recipe(), vocab_size=shape.vocab_size, num_selected=1)
        loss.backward()
    assert counts.get_total_flops() == train_flops(shape, length, length**2, RESPONSE, checkpointing=False)


# --- Memory ---------------------------------------------------------------------------------------------------------------


def saved(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the storages that autograd keeps of a forward pass, parameters left out."""
    kept: dict[int, torch.Tensor] = {}
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_hidden(model, [np.arange(tokens // 2)], [np.arange(tokens - tokens // 2 + 1)])
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in owned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_saves_what_the_formula_says_to_the_byte(kind: str, dtype: torch.dtype) -> None:
    found = [saved(model_of(config_of(kind, num_hidden_layers=layers), dtype), 256) for layers in (2, 3)]
    shape, width = read_shape(config_of(kind), kind), dtype.itemsize
    assert (found[1] - found[0]) / 256 == shape.saved_bytes(width)
    outside = found[0] / 256 - 2 * shape.saved_bytes(width)
    assert outside == pytest.approx(shape.outer_bytes(width), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("layers", "tokens"), [(2, 400), (4, 600)])
def test_the_peak_of_an_update_is_foreseen(layers: int, tokens: int, checkpointing: bool) -> None:
    """In float32 on one device, with gradients kept from the first micro-batch to the second."""
    config = config_of("qwen3", vocab_size=2000, num_hidden_layers=layers)
    shape, model = read_shape(config, "qwen3"), model_of(config)
    settings = {"prompts.max_prompt_tokens": PROMPT, "rollout.max_new_tokens": tokens, "train.batch_tokens": 1}
    recipe = sampled_recipe(**settings, **{"train.logits_mib": 1, "train.activation_checkpointing": checkpointing})
    student, optimizer = Student(model, recipe.train), make_optimizer(model, recipe)
    rows = [row(tokens), row(tokens - 1)]
    update(student, optimizer, rows, recipe=recipe, vocab_size=2000)  # makes the moments
    optimizer.zero_grad(set_to_none=True)
    resident = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    with LiveStorage(resident) as live:
        update(student, optimizer, rows, recipe=recipe, vocab_size=2000)
    beside = alone_parts(shape, recipe, Assumptions(dtype="float32", checkpointing=checkpointing))
    foreseen = (STATE - 12) * shape.parameters + sum(beside.values())  # weights and moments are resident
    assert live.peak == pytest.approx(foreseen, rel=0.15)  # seen: 0.89 to 1.06


@pytest.mark.parametrize("tokens", [400, 800])
def test_the_peak_of_scoring_is_foreseen(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few logits at once, so that the layers are what is seen."""
    monkeypatch.setattr("camopd.engines.transformers.LOGITS_MIB", 1)
    config = config_of("qwen3", vocab_size=304)
    shape, model = read_shape(config, "qwen3"), model_of(config)
    engine = TransformersEngine(model, vocab_size=304, batch_size=1, batch_tokens=1)
    with LiveStorage(list(model.parameters())) as live:
        list(engine.score([row(tokens)["prompt_ids"]], [row(tokens)["response_ids"]]))
    recipe = sampled_recipe(**{"prompts.max_prompt_tokens": PROMPT, "rollout.max_new_tokens": tokens, "score.batch_tokens": 1})
    held = score_memory(shape, recipe, Assumptions(dtype="float32"))
    assert live.peak == pytest.approx(held.whole["activations"], rel=0.15)


# --- The store ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_bytes_that_were_foreseen(tmp_path) -> None:
    recipe, model = sampled_recipe(), load_model(MICRO)
    optimizer = make_optimizer(model, recipe)
    update(Student(model, recipe.train), optimizer, [row()], recipe=recipe, vocab_size=264)
    snapshot(model, optimizer, Schedule.of(recipe), seed=0).write(tmp_path, current(), student=MICRO)
    shape = read_shape(json.loads((MICRO / "config.json").read_text()), "micro")
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    headers = held - checkpoint_bytes(shape)
    assert 0 < headers < 30_000  # names and shapes, of 2.9 MB


def rollout_rows(count: int, response: int) -> list[dict[str, Any]]:
    """Numbers that cannot be compressed: ids of a large vocabulary, log-probabilities."""
    rng = np.random.default_rng(0)
    return [
        {
            "prompt_id": f"general-{number:08d}",
            "sample_index": 0,
            "branch": "general",
            "step": number // 10,
            "prompt_ids": rng.integers(0, 151_936, PROMPT, np.int32),
            "response_ids": rng.integers(0, 151_936, response, np.int32),
            "logprobs": rng.normal(size=response).astype(np.float32),
            "topk_ids": np.empty((response, 0), np.int32),
            "student_topk_logprobs": np.empty((response, 0), np.float32),
            "entropy": 0.5,
            "finish_reason": "stop",
            "text": "".join(map(chr, rng.integers(97, 123, 4 * response))),
        }
        for number in range(count)
    ]


def test_a_table_of_numbers_without_pattern_is_nearly_as_large_as_foreseen(tmp_path) -> None:
    """Large enough that Parquet gives up its dictionaries."""
    write_table(tmp_path / "t.parquet", "rollouts", rollout_rows(1000, 800))
    sizes = {"prompt_ids": PROMPT, "response_ids": 800, "logprobs": 800, "text": 3200}
    foreseen = 1000 * row_bytes("rollouts", sizes | {"topk_ids": 0, "student_topk_logprobs": 0})
    assert 0.6 * foreseen < (tmp_path / "t.parquet").stat().st_size < foreseen


@pytest.fixture(scope="module")
def micro_run(tmp_path_factory) -> Plan:
    """Two rounds of the micro example."""
    settings = {
        "num_rounds": 2,
        "steps_per_round": 4,
        "rollout.prompts_per_step": 32,
        "output": str(tmp_path_factory.mktemp("runs")),
    }
    plan = Plan.load(Store(), workflow.prepare("micro", settings).uri)
    for uri in plan.rounds:
        workflow.one_round(uri)
    return plan


@pytest.mark.slow
def test_a_real_run_writes_what_was_foreseen_from_its_lengths(micro_run: Plan) -> None:
    recipe, store = micro_run.recipe, Store()
    lengths = measured_lengths(micro_run.run_uri, store)
    samples = samples_of(recipe, num_steps(recipe))
    foreseen = table_bytes(recipe, samples, lengths)

    def written(suffix: str, prefixes: Sequence[str]) -> int:
        files = (file for uri in prefixes for file in store.require(uri).files)
        return sum(file.size for file in files if file.name.endswith(suffix))

    held = {
        "rollout": written(".parquet", [layout.rollout_uri(uri) for uri in micro_run.rounds]),
        "score": written(".parquet", [layout.score_uri(uri, name) for uri in micro_run.rounds for name in samples]),
        "select": written(".parquet", [layout.select_uri(uri) for uri in micro_run.rounds]),
    }
    footers = 2 * 8_000  # bytes of a Parquet file whatever it holds, one or two of each kind a round
    for stage, size in held.items():
        assert 0.2 * foreseen[stage] < size < foreseen[stage] + footers, stage
    shapes = micro_shapes()
    checkpoints = written(".safetensors", [layout.checkpoint_uri(uri) for uri in micro_run.rounds])
    assert checkpoints == pytest.approx(estimate(recipe, shapes, lengths, Assumptions()).checkpoints, rel=0.02)


def micro_shapes() -> dict[str, ModelShape]:
    return dict.fromkeys(("student", "general", "domain"), read_shape(json.loads((MICRO / "config.json").read_text()), "micro"))


@pytest.mark.slow
def test_lengths_measured_from_manifests_are_those_of_the_tables(micro_run: Plan) -> None:
    lengths = measured_lengths(micro_run.run_uri, Store())
    for name in ("general", "domain"):
        tables = [pq.read_table(Path(layout.rollout_uri(uri)) / "rollouts.parquet").to_pylist() for uri in micro_run.rounds]
        chosen = [pq.read_table(Path(layout.select_uri(uri)) / "selection.parquet").to_pylist() for uri in micro_run.rounds]
        own = [row for table in tables for row in table if row["branch"] == name]
        kept = [row["kept"] for table in chosen for row in table if row["branch"] == name]
        assert lengths[name].response == pytest.approx(np.mean([len(row["response_ids"]) for row in own]))
        assert lengths[name].kept == pytest.approx(np.sum(kept) / len(own))
        assert lengths[name].prompt == pytest.approx(np.mean([len(row["prompt_ids"]) for row in own]), rel=0.2)
    options = LengthOptions(run_uri=micro_run.run_uri, response=["domain=3"])
    found, said = mean_lengths(micro_run.recipe, options, Store())
    assert found == {**lengths, "domain": replace(lengths["domain"], response=3)}
    assert said["general"] == f"measured in {micro_run.run_uri}"
    assert said["domain"] == f"response given, measured in {micro_run.run_uri}"
