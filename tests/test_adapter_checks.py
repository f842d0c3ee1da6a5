"""What `prepare` finds wrong with adapters, all of it at once and before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from camopd import prepare
from camopd.adapters import weights_at
from camopd.config import Recipe
from camopd.errors import InputError
from camopd.inputs.adapter_checks import check_adapter, check_lora
from camopd.inputs.checks import check_weights
from camopd.recipe.sections import Lora
from camopd.store import Store
from tests.test_prepare import problems_of, run, values  # noqa: F401  # a fixture
from tests.tiny import save_adapter, save_tiny, tiny_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


def found(adapter: Path, base: Path, *, vllm: bool = False) -> list[str]:
    store = Store()
    weights = weights_at(str(adapter), store, str(base))
    shapes, _ = check_weights(store, str(base), tied=True)
    return [str(problem) for problem in check_adapter("student", weights, store, shapes, vllm=vllm)]


def change(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **tensors}, path)
    return folder


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def test_a_plain_one_has_nothing_wrong(base, tmp_path) -> None:
    """With everything that PEFT writes into its settings."""
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, init_lora_weights="gaussian", use_rslora=True).to_dict()
    shaping = ("r", "lora_alpha", "target_modules", "peft_type")
    written = {key: value for key, value in config.items() if key not in shaping}
    assert found(save_adapter(tmp_path / "a", tiny_model(), rank=9, **written), base, vllm=True) == []
    halves = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "a/adapter_model.safetensors").items()}
    assert found(change(tmp_path / "a", halves), base) == []


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "LOHA"},
        {"task_type": "SEQ_CLS"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 1]]},
        {"init_lora_weights": "pissa"},
        {"auto_mapping": {"base_model_class": "Mine", "parent_library": "mine.modeling"}},
        {"trust_remote_code": True},
        {"something_of_next_year": 1},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_not_every_engine_follows_is_named(setting, base, tmp_path) -> None:
    (key,) = setting
    (problem,) = found(save_adapter(tmp_path / "a", tiny_model(), **setting), base)
    assert f"has {key} = " in problem
    assert "merge" in problem


def test_tensors_that_are_no_pairs_of_matrices(base, tmp_path) -> None:
    odd = change(save_adapter(tmp_path / "a", tiny_model()), {"base_model.model.model.norm.weight": torch.ones(16)})
    assert "holds base_model.model.model.norm.weight: it is not made of pairs" in found(odd, base)[0]


def test_another_base_is_seen_by_its_shapes(tmp_path) -> None:
    adapter = save_adapter(tmp_path / "a", tiny_model())
    (problem,) = found(adapter, save_tiny(tmp_path / "wider", head_dim=16))
    assert "does not fit its base" in problem
    assert "in 8 of 14 layers: model.layers.0.self_attn.k_proj is (16, 16) there" in problem


def test_a_layer_that_the_base_has_not_and_one_that_must_stay(base, tmp_path) -> None:
    pair = {"A": torch.zeros(3, 16), "B": torch.zeros(24, 3)}
    for layer, words in (("model.layers.7.mlp.up_proj", "is no layer of it"), ("lm_head", "must stay as it is")):
        name = f"base_model.model.{layer}.lora_{{}}.weight"
        more = {name.format(side): tensor for side, tensor in pair.items()}
        (problem,) = found(change(save_adapter(tmp_path / layer, tiny_model()), more), base)
        assert f"in 1 of 15 layers: {layer} {words}" in problem or f"{layer} is an embedding" in problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_and_infinity_are_seen_in_every_float_format(dtype, value, base, tmp_path) -> None:
    tensor = torch.full((3, 16), 65504.0 if dtype == torch.float16 else 3e38).to(dtype)  # the largest numbers are none
    adapter = change(save_adapter(tmp_path / "a", tiny_model()), {Q_PROJ.format("A"): tensor})
    assert found(adapter, base) == []
    tensor[1, 2] = value
    (problem,) = found(change(adapter, {Q_PROJ.format("A"): tensor}), base)
    assert "1 tensors hold NaN or infinity, base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight first" in problem


def test_integers_are_no_weights(base, tmp_path) -> None:
    adapter = change(save_adapter(tmp_path / "a", tiny_model()), {Q_PROJ.format("A"): torch.zeros(3, 16, dtype=torch.int8)})
    assert "q_proj.lora_A.weight is I8, not a float" in found(adapter, base)[0]


def test_files(base, tmp_path) -> None:
    adapter = save_adapter(tmp_path / "a", tiny_model())
    tensors = (adapter / "adapter_model.safetensors").rename(tmp_path / "kept")
    assert "has no adapter_model.safetensors" in found(adapter, base)[0]
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert "has adapter_model.bin but no adapter_model.safetensors; pickle files can run code" in found(adapter, base)[0]
    (adapter / "adapter_model.safetensors").write_bytes(tensors.read_bytes()[:-5])
    assert "its header asks for" in found(adapter, base)[0]
    (adapter / "adapter_config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"adapter_config\.json: is not a JSON table"):
        found(adapter, base)


def test_ranks(base, tmp_path) -> None:
    large = save_adapter(tmp_path / "large", tiny_model(), rank=513)
    assert found(large, base) == []
    assert "rank 513 is above 512, the largest that vLLM takes" in found(large, base, vllm=True)[0]
    config = json.loads((large / "adapter_config.json").read_text())
    (large / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    assert "has tensors of rank 513, its adapter_config.json says r = 8" in found(large, base)[0]
    (large / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": None}))
    assert "lora_alpha = None" in found(large, base)[0]


def lora_problems(lora: Lora, student: Path, base: Path, *, vllm: bool = False) -> list[str]:
    store = Store()
    shapes, _ = check_weights(store, str(base), tied=True)
    weights = weights_at(str(student), store, str(base))
    return [str(problem) for problem in check_lora(lora, weights, store, shapes, vllm=vllm)]


def test_what_an_adapter_to_be_trained_may_ask_for(base, tmp_path) -> None:
    assert lora_problems(Lora(rank=4, targets=["q_proj", "layers.1.mlp.up_proj"]), base, base) == []
    (problem,) = lora_problems(Lora(targets=["q_proj", "query"]), base, base)
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert problem == f"train.lora.targets: {base} has no layer 'query' -> it has {layers}"
    assert lora_problems(Lora(targets=["embed_tokens"]), base, base)
    assert "above 512" in lora_problems(Lora(rank=600), base, base, vllm=True)[0]
    assert lora_problems(Lora(rank=600, output="merged"), base, base, vllm=True) == []


def test_an_adapter_that_goes_on_keeps_its_rank(base, tmp_path) -> None:
    student = save_adapter(tmp_path / "a", tiny_model())
    assert lora_problems(Lora(rank=3, alpha=4), student, base) == []
    first, second = lora_problems(Lora(rank=8, targets=["q_proj"]), student, base)
    assert first.startswith(f"train.lora.rank: 8 is not the 3 of {student}, which goes on learning -> leave it out")
    assert second.startswith("train.lora.targets")


# --- In a recipe ----------------------------------------------------------------------------------------------------------


def whole(folder: Path) -> PreTrainedModel:
    """Give a folder all the weights that its config.json announces."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def adapted(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    """A recipe whose domain model is an adapter of what was the domain model, which teaches, too."""
    base = values["student"]
    model = whole(Path(base))
    general, domain = values["branches"]
    branches = [{**general, "teacher": base}, domain]
    return {**values, "base": base, "student": str(save_adapter(tmp_path / "adapter", model)), "branches": branches}


def test_a_plan_of_adapters(adapted) -> None:
    """Base and adapter make the identity; where they lie does not."""
    store, plan = Store(), run(adapted)
    base = store.content_id(adapted["base"])
    assert plan.content_ids["student"] == plan.content_ids["teacher/domain"]
    assert plan.content_ids["student"] not in (base, store.content_id(adapted["student"]))
    assert (
        plan.content_ids["student/base"]
        == plan.content_ids["teacher/domain/base"]
        == plan.content_ids["teacher/general"]
        == base
    )
    assert plan.tokenizer_uri(adapted["student"], store) == adapted["base"]
    assert plan.warnings == run({**adapted, "base": adapted["base"]}).warnings

    path = Path(adapted["student"]) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 5.0}))
    assert run(adapted).run_uri != plan.run_uri


def test_a_base_that_nobody_needs_is_mentioned(values) -> None:  # noqa: F811
    plan = run({**values, "base": values["student"]})
    assert any(warning.startswith("base: no model of the recipe is an adapter") for warning in plan.warnings)


def test_a_base_that_is_not_there_is_found_with_all_the_rest(adapted) -> None:
    adapted["rollout"]["max_new_tokens"] = 10**6
    del adapted["base"]
    text = "\n".join(problems_of(adapted))
    assert "student: " in text
    assert "is an adapter and does not name its base -> set base = " in text
    adapted["base"] = "/nowhere"
    assert "/nowhere: nothing is there" in "\n".join(problems_of(adapted))


def test_a_base_that_is_an_adapter_itself(adapted) -> None:
    adapted["base"] = adapted["student"]
    assert any("is an adapter without its base" in problem for problem in problems_of(adapted))


def test_problems_of_several_adapters_come_together(adapted, tmp_path) -> None:
    dora = save_adapter(tmp_path / "dora", whole(Path(adapted["base"])), use_dora=True)
    adapted["branches"][0]["teacher"] = str(dora)
    broken = change(Path(adapted["student"]), {})
    (broken / "adapter_model.safetensors").unlink()
    adapted["train"] = {"lora": {"rank": 99}}
    problems = problems_of(adapted)
    assert any(problem.startswith("branches.general.teacher") and "use_dora" in problem for problem in problems)
    assert any(problem.startswith("student") and "has no adapter_model.safetensors" in problem for problem in problems)
    assert any(problem.startswith("train.lora.rank") for problem in problems)


def test_the_default_rate_is_the_one_for_all_weights(adapted) -> None:
    adapted["train"] = {"lora": {}}
    assert any(warning.startswith("train.learning_rate: an adapter usually wants") for warning in run(adapted).warnings)
    adapted["train"] = {"lora": {}, "learning_rate": 1e-4}
    assert not any(warning.startswith("train.learning_rate") for warning in run(adapted).warnings)
    assert prepare.resolve(Recipe.model_validate(adapted), Store())[1] == []
