"""Recipes: what a person may write, where it lands, and that every mistake is named at once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camopd import config
from camopd.config import Branch, Recipe, cautions, load_recipe
from camopd.errors import InputError
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
