"""Recipes: what a person may write, where it lands, and that every mistake is named at once."""

from __future__ import annotations

import contextlib
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camopd import config
from camopd.config import Branch, Recipe, cautions, load_recipe
from camopd.errors import InputError
from camopd.plan import run_id
from camopd.presets import presets
from camopd.recipe.parameters import dotted_keys
from tests.folders import CASES

MINIMAL = """
student = "/models/domain"

[[branches]]
name = "general"
role = "recover"
teacher = "/models/general"
prompts = "/data/general.jsonl"

[[branches]]
name = "domain"
role = "retain"
prompts = "/data/domain.jsonl"
"""


MINIMAL_BRANCHES = tomllib.loads(MINIMAL)["branches"]


def problems_of(source: str | Path, parameters: dict | None = None) -> dict[str, str]:
    """What is wrong, by place."""
    with pytest.raises(InputError) as caught:
        load_recipe(source, parameters)
    assert len({p.where for p in caught.value.problems}) == len(caught.value.problems)
    return {p.where: f"{p.what} -> {p.fix}" for p in caught.value.problems}


# --- Values ---------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    recipe = load_recipe(MINIMAL)
    assert (recipe.num_rounds, recipe.rollout.prompts_per_step, recipe.train.learning_rate) == (30, 512, 2e-6)
    assert [branch.score for branch in recipe.branches] == ["absolute", "positive"]
    assert recipe.teacher(recipe.branch("domain")) == "/models/domain"


@pytest.mark.parametrize(
    ("field", "typed", "key", "value"),
    [
        ("input_domain_model_uri", "s3://models/domain-a/latest/", "student", "s3://models/domain-a/latest"),
        ("method_learning_rate", "1e-6", "train.learning_rate", 1e-6),
        ("method_learning_rate", 1, "train.learning_rate", 1.0),
        ("method_num_rounds", "3", "num_rounds", 3),
        ("method_num_rounds", 3.0, "num_rounds", 3),
        ("method_num_rounds", "3.0", "num_rounds", 3),
        ("method_seed", 0, "seed", 0),
        ("method_seed", 2**53, "seed", 2**53),
        ("output_alias", "prod-eu", "promote.alias", "prod-eu"),
        ("output_model_name", "näme", "promote.model_name", "näme"),
        ("output_notes", "", "notes", ""),
        ("output_promote", False, "promote.enabled", False),
        ("output_promote", "false", "promote.enabled", False),
        ("output_promote", "True", "promote.enabled", True),
        ("output_uri", "/runs/", "output", "/runs"),
        ("train.weight_decay", "0", "train.weight_decay", 0.0),
        ("prompts.enable_thinking", "false", "prompts.enable_thinking", False),
        ("rollout.prompts_per_step", "64", "rollout.prompts_per_step", 64),
    ],
)
def test_a_parameter_lands_in_its_place(field: str, typed: object, key: str, value: object) -> None:
    found: object = load_recipe(MINIMAL, {field: typed})
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "typed", "branch", "key", "value"),
    [
        ("input_domain_prompts_uri", "s3://bucket/p.jsonl", "domain", "prompts", "s3://bucket/p.jsonl"),
        ("input_general_model_uri", "/models/other", "general", "teacher", "/models/other"),
        ("input_general_prompts_uri", "/p.jsonl", "general", "prompts", "/p.jsonl"),
        ("branches.general.mass", "0.5", "general", "mass", 0.5),
        ("branches.domain.tasks", '["a", "b"]', "domain", "tasks", ("a", "b")),
        ("branches.domain.tasks", ["a"], "domain", "tasks", ("a",)),
        ("branches.domain.tasks", "[]", "domain", "tasks", ()),
        ("branches.domain.steps", "2", "domain", "steps", 2),
    ],
)
def test_a_parameter_lands_in_its_branch(field: str, typed: object, branch: str, key: str, value: object) -> None:
    assert getattr(load_recipe(MINIMAL, {field: typed}).branch(branch), key) == value


@pytest.mark.parametrize(
    ("field", "typed", "words"),
    [
        ("method_num_rounds", 0.5, "whole number"),
        ("method_num_rounds", "0.5", "whole number"),
        ("method_num_rounds", 0, "nothing to evaluate"),
        ("method_num_rounds", "0", "nothing to evaluate"),
        ("method_num_rounds", -1, "ask for 1 or more"),
        ("method_num_rounds", True, "not true or false"),
        ("method_num_rounds", "", "whole number"),
        ("method_num_rounds", "many", "whole number"),
        ("method_num_rounds", None, "whole number"),
        ("method_seed", 9007199254740993, "2^53"),
        ("method_seed", "9007199254740993", "2^53"),
        ("method_seed", 9007199254740992.0, "2^53"),  # what JSON makes of 2^53 + 1
        ("method_seed", "1e400", "whole number"),
        ("method_seed", -1, "at least 0"),
        ("method_learning_rate", "fast", "a number is expected"),
        ("method_learning_rate", False, "not true or false"),
        ("method_learning_rate", "nan", "finite"),
        ("method_learning_rate", "inf", "finite"),
        ("method_learning_rate", "-1e-6", "above 0"),
        ("input_domain_model_uri", "   ", "empty"),
        ("input_domain_model_uri", "", "empty"),
        ("input_domain_model_uri", "models/a", "./models/a"),
        ("output_promote", "maybe", "true or false"),
        ("output_notes", 3, "text is expected"),
        ("branches.general.score", "absolut", "did you mean 'absolute'"),
        ("score.signal", "best-marginn", "not one of sampled, topk"),
        ("prompts.overlong", "truncate-left", "did you mean 'truncate_left'"),
        ("branches.general.tasks", "s3://t/a, s3://t/b,", '["s3://t/a", "s3://t/b"]'),
        ("branches.general.tasks", '{"a": 1}', "a list is expected"),
        ("branches.general.tasks", '["a", " "]', "does not match"),
        ("branches.general.mass", "1.5", "at most 1"),
        ("learning_rate", 1, "did you mean 'train.learning_rate'"),
        ("method_learning_rat", 1, "did you mean 'method_learning_rate'"),
        ("branches.generall.mass", 1, "did you mean 'branches.general.mass'"),
        ("selection", "x", "there is no such parameter"),
        ("tracking.uri", "https://me:secret@host", "carries a password"),
        ("tracking.uri", " ", "blank"),
    ],
)
def test_a_bad_parameter_is_refused_by_its_name(field: str, typed: object, words: str) -> None:
    found = problems_of(MINIMAL, {field: typed})
    assert words in found.pop(field)
    assert not {where for where in found if not where.startswith(field)}


def test_a_password_is_not_repeated() -> None:
    assert "secret" not in str(problems_of(MINIMAL, {"tracking.uri": "https://me:secret@host"}))


@pytest.mark.parametrize(
    ("parameters", "output"),
    [
        ({}, "s3://cluster/runs"),
        ({"output_uri": "recipe"}, "s3://cluster/runs"),
        ({"output_uri": "s3://mine/runs"}, "s3://mine/runs"),
    ],
)
def test_a_cluster_s_output_goes_before_the_recipe_s_and_after_the_run_form_s(monkeypatch, parameters, output):
    monkeypatch.setenv("CAMOPD_OUTPUT", "s3://cluster/runs/")
    assert load_recipe("recipes/medical-8b.toml", parameters).output == output
    monkeypatch.setenv("CAMOPD_OUTPUT", "")
    assert load_recipe("recipes/medical-8b.toml").output == "s3://runs/camopd"


def test_a_cluster_s_output_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("CAMOPD_OUTPUT", "bucket/runs")
    with pytest.raises(InputError, match=r"CAMOPD_OUTPUT: .*write s3://bucket/runs"):
        load_recipe("recipes/micro.toml")


@pytest.mark.parametrize("field", ["seed", "method_seed", "output_notes", "branches.general.mass"])
def test_the_word_recipe_leaves_the_recipes_value(field: str) -> None:
    assert load_recipe(MINIMAL, {field: "recipe"}) == load_recipe(MINIMAL)


def test_two_names_for_one_key_are_refused() -> None:
    assert "method_seed" in problems_of(MINIMAL, {"method_seed": 1, "seed": 2})["seed"]


def test_the_short_field_is_refused_when_two_branches_share_the_role() -> None:
    text = MINIMAL + '[[branches]]\nname = "law"\nrole = "retain"\nprompts = "/data/law.jsonl"\n'
    found = problems_of(text, {"input_domain_prompts_uri": "/x.jsonl"})
    assert "use branches.domain.prompts or branches.law.prompts" in found["input_domain_prompts_uri"]
    assert load_recipe(text, {"branches.law.prompts": "/x.jsonl"}).branch("law").prompts == "/x.jsonl"


@given(notes=st.text().filter(lambda text: text != config.AS_IN_RECIPE))
@settings(deadline=None)
def test_notes_arrive_unchanged(notes: str) -> None:
    assert load_recipe(MINIMAL, {"output_notes": notes}).notes == notes


@given(
    values=st.dictionaries(
        st.sampled_from([*dotted_keys(Recipe, Branch, ["general", "domain"]), "output_promote", "method_seed", "other"]),
        st.one_of(st.text(), st.floats(), st.integers(), st.booleans(), st.none(), st.lists(st.text()), st.builds(dict)),
    )
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_typed_is_accepted_or_explained(values: dict) -> None:
    with contextlib.suppress(InputError):
        load_recipe(MINIMAL, values)


PAYLOAD_NAMES = {  # of case 13, in this project's words
    "num_rounds": "method_num_rounds",
    "promote": "output_promote",
    "notes": "output_notes",
    "selection": "score.signal",
    "student_uri": "input_domain_model_uri",
    "learning_rate": "method_learning_rate",
    "seed": "method_seed",
}
PAYLOAD_LINES = (CASES / "13-kfp-ui-params" / "ui_payloads.jsonl").read_text(encoding="utf-8").splitlines()
PAYLOADS = {payload["case"]: payload["params"] for payload in map(json.loads, PAYLOAD_LINES)}


@pytest.mark.parametrize(
    ("case", "refused"),
    [
        ("defaults", set()),
        ("falsy", {"method_num_rounds"}),
        ("typo enum", {"score.signal"}),
        ("blank uri", {"input_domain_model_uri"}),
        ("string number", set()),
        ("big int", {"method_seed"}),
        ("negative", {"method_num_rounds"}),
        ("quote and newline", set()),
        ("list of ints", {"gpu_ids", "teacher_weights"}),
        ("teachers as csv", {"teachers"}),
    ],
)
def test_payloads_of_the_run_form(case: str, refused: set[str]) -> None:
    parameters = {PAYLOAD_NAMES.get(name, name): value for name, value in PAYLOADS[case].items()}
    if refused:
        assert problems_of(MINIMAL, parameters).keys() == refused
    else:
        recipe = load_recipe(MINIMAL, parameters)
        assert recipe.notes == PAYLOADS[case].get("notes", "")


def test_a_teacher_that_is_the_student_is_a_caution() -> None:
    (uri,) = PAYLOADS["teacher equals student"]["teachers"]
    recipe = load_recipe(MINIMAL, {"input_domain_model_uri": uri.rstrip("/"), "input_general_model_uri": uri})
    assert any("branches.general.teacher: the teacher is the student itself" in sentence for sentence in cautions(recipe))
    assert not cautions(load_recipe(MINIMAL))


# --- Methods --------------------------------------------------------------------------------------------------------------

MICRO = Path(__file__).parents[1] / "recipes" / "micro.toml"


def shape(recipe: Recipe) -> dict[str, object]:
    """What a preset decides, by dotted key."""
    own = {f"branches.{b.name}.{key}": getattr(b, key) for b in recipe.branches for key in ("steps", "scale", "mass")}
    return own | {"mixing": recipe.mixing, "rollout.sampler": recipe.rollout.sampler}


def expected_shape(general: tuple, domain: tuple, mixing: str) -> dict[str, object]:
    rows = {"general": general, "domain": domain}
    own = {
        f"branches.{name}.{key}": value
        for name, row in rows.items()
        for key, value in zip(("steps", "scale", "mass"), row, strict=True)
    }
    return own | {"mixing": mixing, "rollout.sampler": "student"}


def test_a_recipe_without_a_method_is_camopd() -> None:
    recipe = load_recipe(MINIMAL)
    assert (recipe.method, shape(recipe)) == ("camopd", expected_shape((3, 2.0, 0.8), (1, 1.0, 0.8), "alternating"))


@pytest.mark.parametrize("field", ["method", "method_name"])
def test_the_method_is_one_word_on_the_command_line(field: str) -> None:
    assert shape(load_recipe(MICRO, {field: "mopd"})) == expected_shape((1, 1.0, 1.0), (1, 1.0, 1.0), "mixed")


@pytest.mark.parametrize("method", presets())
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("branches.general.steps", 5),
        ("branches.domain.steps", 2),
        ("branches.domain.scale", 1.5),
        ("branches.general.mass", 0.5),
        ("mixing", "mixed"),
        ("mixing", "alternating"),
        ("rollout.sampler", "student"),
    ],
)
def test_a_preset_fills_only_what_the_recipe_leaves_out(method: str, key: str, value: object) -> None:
    plain, changed = (shape(load_recipe(MINIMAL, {"method": method, **more})) for more in ({}, {key: value}))
    assert changed == plain | {key: value}


@pytest.mark.parametrize("method", presets())
def test_a_recipe_that_was_written_down_is_read_back_the_same(method: str) -> None:
    """`prepare` writes every default out; no later preset may change a run that has begun."""
    recipe = load_recipe(MINIMAL, {"method": method, "branches.general.prompts": "teacher"})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_text_may_name_the_method_for_any_number_of_branches() -> None:
    text = 'method = "mopd-3to1"\n' + MINIMAL + '[[branches]]\nname = "law"\nrole = "retain"\nprompts = "/data/law.jsonl"\n'
    assert [branch.steps for branch in load_recipe(text).branches] == [3, 1, 1]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("mopdd", "did you mean 'mopd'"),
        ("mopd_3to1", "did you mean 'mopd-3to1'"),
        ("x", "known: alternating, alternating-scaled, camopd"),
        ("", "there is no method ''"),
        (3, "text is expected"),
        (["mopd"], "text is expected"),
    ],
)
def test_a_method_that_does_not_exist_is_refused(typed: object, words: str) -> None:
    assert words in problems_of(MINIMAL, {"method": typed})["method"]
    assert words in problems_of(f"method = {json.dumps(typed)}\n{MINIMAL}")["recipe:1 (method)"]


# --- Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"score.signal": "full"}, ["signal full needs student and teacher in one process", "camopd recover"]),
        ({"method": "off-policy-kd", "score.signal": "topk"}, ["off-policy-kd is defined for signal sampled, not topk"]),
        ({"rollout.sampler": "teacher", "score.top_k_of": "student"}, ["top_k_of student needs answers"]),
        ({"branches.general.score": "kl"}, ["score kl of branch general needs signal topk with top_k_of student"]),
        ({"branches.general.score": "kl", "score.signal": "topk"}, ["needs signal topk with top_k_of student"]),
        (
            {"method": "off-policy-kd", "score.signal": "full", "score.top_k_of": "student", "branches.domain.score": "kl"},
            ["for signal sampled, not full", "camopd recover", "top_k_of student needs"],  # no selection, so kl is not used
        ),
    ],
)
def test_signals_that_do_not_fit_are_all_named(parameters: dict, words: list[str]) -> None:
    found = problems_of(MINIMAL, parameters)
    assert found.keys() == {"recipe (score)"}
    assert all(part in found["recipe (score)"] for part in words)


def test_the_line_of_a_signal_that_does_not_fit_is_named() -> None:
    text = MINIMAL + '[score]\nsignal = "full"\n'
    assert "one process" in problems_of(text)[f"recipe:{text.splitlines().index('[score]') + 1} (score)"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"score.signal": "full", "execution": "colocated"},
        {"score.signal": "topk", "score.top_k_of": "student", "branches.general.score": "kl"},
        {"branches.general.score": "kl", "method": "mopd"},
        {"method": "off-policy-kd"},
    ],
)
def test_signals_that_fit(parameters: dict) -> None:
    score = load_recipe(MINIMAL, parameters).score
    assert score.signal == parameters.get("score.signal", "sampled")
    assert score.top_k_of == parameters.get("score.top_k_of", "teacher")


# --- Engines --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "place", "words"),
    [
        ({"rollout.engine": "vlm"}, "rollout.engine", "did you mean 'vllm'"),
        (
            {"rollout.engine": "vllm", "execution": "colocated", "method": "off-policy-kd"},
            "recipe (rollout)",
            "from the student alone",
        ),
        (
            {"rollout.engine": "vllm", "score.signal": "topk", "score.top_k_of": "student"},
            "recipe (score)",
            "engine vllm has not; use teacher",
        ),
        ({"vllm.tensor_parallel_size": 0}, "vllm.tensor_parallel_size", "at least 1"),
        ({"vllm.gpu_memory_utilization": 1.5}, "vllm.gpu_memory_utilization", "at most 1"),
        ({"vllm.dtype": "fp8"}, "vllm.dtype", "not one of bfloat16, float16, float32"),
        ({"vllm.gpu_memory": 0.5}, "vllm.gpu_memory", "did you mean 'vllm.gpu_memory_utilization'"),
    ],
)
def test_what_vllm_cannot_do_is_refused_with_the_recipe(parameters: dict, place: str, words: str) -> None:
    assert words in problems_of(MINIMAL, parameters)[place]


def test_vllm_may_sample_and_score_in_stages() -> None:
    for score in ({}, {"score.signal": "topk"}, {"score.top_k_of": "student"}):  # of a signal that has no top k
        recipe = load_recipe(MINIMAL, {"rollout.engine": "vllm", **score})
        assert (recipe.rollout.engine, recipe.execution) == ("vllm", "staged")


@pytest.mark.parametrize("score", [{}, {"score.signal": "topk", "score.top_k_of": "student"}, {"score.signal": "full"}])
def test_beside_the_trainer_vllm_samples_and_the_teachers_know_every_signal(score: dict) -> None:
    recipe = load_recipe(MINIMAL, {"rollout.engine": "vllm", "execution": "colocated", **score})
    assert recipe.score.signal == score.get("score.signal", "sampled")


@pytest.mark.parametrize(
    ("parameters", "place", "words"),
    [
        ({"rollout.replicas": 0}, "rollout.replicas", "at least 1"),
        ({"rollout.replicas": 2, "execution": "colocated"}, "recipe (rollout)", "need the stages: `camopd recover` samples"),
    ],
)
def test_replicas_that_cannot_be_are_refused_with_the_recipe(parameters: dict, place: str, words: str) -> None:
    assert words in problems_of(MINIMAL, parameters)[place]


def test_the_number_of_replicas_is_no_part_of_the_run() -> None:
    def run(**rollout: object) -> str:
        recipe = Recipe.model_validate(tomllib.loads(MINIMAL) | {"rollout": rollout})
        return run_id(recipe, {"student": "a", "teacher/general": "b", "teacher/domain": "a"})

    assert run() == run(replicas=8) != run(batch_size=8)


def test_of_vllm_s_settings_the_numbers_it_computes_in_name_the_run() -> None:
    def run(**settings: object) -> str:
        values = {"rollout": {"engine": "vllm"}, "vllm": settings}
        recipe = Recipe.model_validate(tomllib.loads(MINIMAL) | values)
        return run_id(recipe, {"student": "a", "teacher/general": "b", "teacher/domain": "a"})

    assert run() == run(gpu_memory_utilization=0.5, tensor_parallel_size=4) != run(dtype="float32")


# --- Prompts and batches --------------------------------------------------------------------------------------------------


def test_a_teacher_may_make_up_the_prompts() -> None:
    """All of them without a file, a share of them beside one."""
    branch = load_recipe(MINIMAL, {"branches.general.prompts": "teacher"}).branch("general")
    assert (branch.prompts, branch.teacher_prompts, branch.has_prompt_file) == ("teacher", 1.0, False)
    branch = load_recipe(MINIMAL, {"branches.general.teacher_prompts": "0.25"}).branch("general")
    assert (branch.prompts, branch.teacher_prompts, branch.has_prompt_file) == ("/data/general.jsonl", 0.25, True)
    in_text = MINIMAL.replace('prompts = "/data/domain.jsonl"', 'prompts = "teacher"')
    assert load_recipe(in_text).branch("domain").teacher_prompts == 1.0


@pytest.mark.parametrize(
    ("parameters", "where", "words"),
    [
        (
            {"branches.general.prompts": "teacher", "branches.general.teacher_prompts": 0.5},
            "branches.general.teacher_prompts",
            "needs a prompt file",
        ),
        ({"branches.general.teacher_prompts": 2}, "branches.general.teacher_prompts", "at most 1"),
        ({"branches.general.prompts": "teachers"}, "branches.general.prompts", "no scheme"),
        ({"branches.general.steps": 0}, "recipe:4 (branches)", "nothing would be recovered"),
        ({"method": "mopd-3to1", "rollout.prompts_per_step": 3}, "recipe (rollout)", "cannot be mixed 3:1; set at least 4"),
        ({"mixing": "mixd"}, "mixing", "did you mean 'mixed'"),
        ({"cycles_per_round": 2}, "cycles_per_round", "did you mean 'steps_per_round'"),
    ],
)
def test_prompts_and_batches_that_cannot_be_are_refused(parameters: dict, where: str, words: str) -> None:
    assert words in problems_of(MINIMAL, parameters)[where]


def test_small_batches_are_enough_in_turns() -> None:
    assert load_recipe(MINIMAL, {"rollout.prompts_per_step": 1}).rollout.prompts_per_step == 1
    assert load_recipe(MINIMAL, {"method": "mopd-3to1", "rollout.prompts_per_step": 4}).rollout.prompts_per_step == 4


def test_every_problem_comes_at_once_with_its_line() -> None:
    text = 'method = "mopdd"\ncycles_per_round = 2\n' + MINIMAL.replace('"/data/domain.jsonl"', '"teach"')
    found = problems_of(text + '[score]\nsignal = "full"\n[train]\nlogprob_chunk = 5\n', {"mixing": "no"})
    assert found.keys() == {
        "recipe:1 (method)",
        "recipe:2 (cycles_per_round)",
        "recipe:15 (branches.domain.prompts)",
        "recipe:16 (score)",
        "recipe:19 (train.logprob_chunk)",
        "mixing",
    }


# --- Registry names -------------------------------------------------------------------------------------------------------

REGISTRY = CASES / "09-mlflow-retry-and-bad-values"
NAMES, ALIASES = (
    (REGISTRY / file).read_text(encoding="utf-8").split("\n")[:-1] for file in ("registry_names.txt", "aliases.txt")
)


@pytest.mark.parametrize("name", [*NAMES, ".", "a\tb", ""])
def test_registered_model_names(name: str) -> None:
    if name in ("domain-a", "näme"):
        assert load_recipe(MINIMAL, {"output_model_name": name}).promote.model_name == name
    else:
        assert "registered model" in problems_of(MINIMAL, {"output_model_name": name})["output_model_name"]


@pytest.mark.parametrize("alias", [*ALIASES, "LATEST", "V12", "ä", "v3\n"])
def test_aliases(alias: str) -> None:
    if alias in ("champion", "candidate"):
        assert load_recipe(MINIMAL, {"output_alias": alias}).promote.alias == alias
    else:
        assert "alias" in problems_of(MINIMAL, {"output_alias": alias})["output_alias"]


def test_the_shipped_recipe_is_valid() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "micro.toml")
    assert [branch.name for branch in recipe.branches] == ["general", "domain"]


# --- Training on several processes ----------------------------------------------------------------------------------------


def test_updates_of_a_recovery_in_one_process_are_done_by_one() -> None:
    wish = {"execution": "colocated", "train.num_processes": 2}
    with pytest.raises(InputError, match=r"num_processes 2 needs the stages: `camopd recover` .*set it to 1") as caught:
        load_recipe(MINIMAL, wish)
    assert len(caught.value.problems) == 1
    assert load_recipe(MINIMAL, {"execution": "colocated", "train.precision": "bfloat16"}).train.precision == "bfloat16"
    adapter = {"execution": "colocated", "train.lora.rank": 8}
    assert load_recipe(MINIMAL, adapter).train.lora.rank == 8
    with pytest.raises(InputError, match="lora with execution colocated samples from the adapter in training"):
        load_recipe(MINIMAL, {**adapter, "rollout.engine": "vllm"})


def test_shards_without_a_batch_are_named() -> None:
    """A round of 4 x 32 samples is two batches of 64."""
    wish = {"steps_per_round": 4, "rollout.prompts_per_step": 32, "rollout.batch_size": 64}
    assert not cautions(load_recipe(MINIMAL, wish | {"shards": 2}))
    (sentence,) = cautions(load_recipe(MINIMAL, wish | {"shards": 3}))
    assert sentence.startswith("shards: a round has fewer batches")
    assert not cautions(load_recipe(MINIMAL, wish | {"shards": 3, "rollout.engine": "vllm"}))


def test_several_processes_compare_no_gradients_and_say_so() -> None:
    (sentence,) = cautions(load_recipe(MINIMAL, {"train.num_processes": 2}))
    assert sentence.startswith("train.diagnose_every: gradients are not compared")
    assert not cautions(load_recipe(MINIMAL, {"train.num_processes": 2, "train.diagnose_every": 0}))


# --- Served teachers ------------------------------------------------------------------------------------------------------


def with_teacher(location: str, **parameters: object) -> dict[str, object]:
    return {"branches.general.teacher": location, **parameters}


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("HTTPS://Models.Example/v1/", "https://models.example/v1"),
        ("http://host/openai/v1#Qwen/Qwen3-8B", "http://host/openai/v1#Qwen/Qwen3-8B"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_a_teacher_may_be_served(typed: str, kept: str) -> None:
    branch = load_recipe(MINIMAL, with_teacher(typed)).branch("general")
    assert (branch.teacher, branch.is_served) == (kept, True)
    assert not load_recipe(MINIMAL).branch("general").is_served


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("http://user:s3cr3t@host/v1", "carries a user or password; leave it out and set CAMOPD_TEACHER_API_KEY"),
        ("http://s3cr3t@host/v1", "carries a user or password"),
        ("http://host/v1?api_key=s3cr3t", "carries a query, which may be a key"),
        ("http://host:8000", "which ends in /v1"),
        ("http:///v1", "which ends in /v1"),
        ("http://host:port/v1", "is no web address"),
        ("http://host/v1 ", "holds blanks"),
    ],
)
def test_an_address_that_cannot_be_is_refused_without_showing_a_secret(typed: str, words: str) -> None:
    found = problems_of(MINIMAL, with_teacher(typed))["branches.general.teacher"]
    assert words in found
    assert "s3cr3t" not in found


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"execution": "colocated"}, "keeps teachers in its own process: use `camopd run`"),
        ({"score.signal": "topk", "score.top_k_of": "student"}, "which general's server has not"),
        ({"branches.general.teacher_prompts": 0.5}, "prompts of its own need its chat template"),
    ],
)
def test_what_a_served_teacher_cannot_do_is_refused_with_the_recipe(parameters: dict, words: str) -> None:
    assert any(words in problem for problem in problems_of(MINIMAL, with_teacher("http://h/v1", **parameters)).values())


def test_only_a_teacher_may_be_served() -> None:
    assert "is a web address" in problems_of(MINIMAL, {"student": "http://host/v1"})["student"]
