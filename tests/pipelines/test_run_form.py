"""Values as people type them into the run form (tests/cases/13-kfp-ui-params), brought to this pipeline's field names."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from camopd.config import Recipe, load_recipe
from camopd.errors import InputError
from pipelines.compile import COMMITTED

PAYLOADS = Path("tests/cases/13-kfp-ui-params/ui_payloads.jsonl")
CASES = {case["case"]: case["params"] for case in map(json.loads, PAYLOADS.read_text(encoding="utf-8").splitlines())}
FIELDS = {
    "num_rounds": "method_num_rounds",
    "seed": "method_seed",
    "learning_rate": "method_learning_rate",
    "notes": "output_notes",
    "promote": "output_promote",
    "student_uri": "input_domain_model_uri",
}
RECIPE = """
student = "./domain"
num_rounds = 3
branches = [
  {name = "general", role = "recover", teacher = "./general", prompts = "./general.jsonl"},
  {name = "domain", role = "retain", prompts = "./domain.jsonl"},
]
"""


def form(**typed: Any) -> dict[str, Any]:
    """The fields of the compiled pipeline that are about the recipe: their defaults, and what was typed."""
    parameters = yaml.safe_load(COMMITTED.read_text(encoding="utf-8"))["root"]["inputDefinitions"]["parameters"]
    values = {name: parameter["defaultValue"] for name, parameter in parameters.items()} | typed
    return {name: value for name, value in values.items() if name != "input_recipe" and not name.startswith("schedule_")}


def loaded(case: str) -> Recipe:
    return load_recipe(RECIPE, form(**{FIELDS[name]: value for name, value in CASES[case].items()}))


def refusal(case: str) -> InputError:
    with pytest.raises(InputError) as caught:
        loaded(case)
    return caught.value


def test_the_form_s_defaults_leave_the_recipe_as_it_is():
    assert loaded("defaults") == load_recipe(RECIPE)


def test_false_and_empty_are_meant_and_no_rounds_is_refused():
    (problem,) = refusal("falsy").problems
    assert problem.where == "method_num_rounds"
    recipe = load_recipe(RECIPE, form(output_promote=False, output_notes=""))
    assert (recipe.promote.policy, recipe.notes) == ("never", "")


def test_numbers_may_be_typed_as_text():
    assert loaded("string number").train.learning_rate == 1e-6
    assert load_recipe(RECIPE, form(method_num_rounds="7", method_seed="0")).num_rounds == 7


@pytest.mark.parametrize(
    ("case", "field"), [("blank uri", "input_domain_model_uri"), ("big int", "method_seed"), ("negative", "method_num_rounds")]
)
def test_a_bad_value_is_named_by_its_field(case, field):
    (problem,) = refusal(case).problems
    assert problem.where == field


def test_a_method_is_chosen_by_its_name():
    recipe = load_recipe(RECIPE, form(method_name="mopd-3to1"))
    assert (recipe.method, recipe.mixing, [branch.steps for branch in recipe.branches]) == ("mopd-3to1", "mixed", [3, 1])
    with pytest.raises(InputError, match=r"method_name: .*did you mean 'camopd'"):
        load_recipe(RECIPE, form(method_name="camodp"))


def test_text_arrives_unchanged():
    assert loaded("quote and newline").notes == CASES["quote and newline"]["notes"]


def test_a_teacher_equal_to_the_student_is_a_caution_not_an_error():
    from camopd.config import cautions

    recipe = load_recipe(
        RECIPE, form(input_domain_model_uri="s3://models/domain-a", input_general_model_uri="s3://models/domain-a/")
    )
    assert any("the teacher is the student" in sentence for sentence in cautions(recipe))


def test_a_typo_in_a_choice_lists_what_is_allowed():
    with pytest.raises(InputError, match="absolute"):
        load_recipe(RECIPE, form(**{"branches.general.score": CASES["typo enum"]["selection"]}))


def test_lists_and_tables_survive_the_journey_through_kfp():
    """KFP turns [0, 1] into [0.0, 1.0]; text in place of a list is refused with the form that is right."""
    ids = [float(i) for i in CASES["list of ints"]["gpu_ids"]]
    assert load_recipe(RECIPE, form(**{"branches.general.steps": ids[1]})).branches[0].steps == 1
    with pytest.raises(InputError, match=r'\["s3://t/a", "s3://t/b"\]'):
        load_recipe(RECIPE, form(**{"branches.general.tasks": CASES["teachers as csv"]["teachers"]}))


def test_all_problems_come_at_once():
    with pytest.raises(InputError) as caught:
        load_recipe(RECIPE, form(method_seed="0.5", method_num_rounds="-1", input_domain_model_uri="  ", output_alias="v3"))
    assert {p.where for p in caught.value.problems} == {
        "method_seed",
        "method_num_rounds",
        "input_domain_model_uri",
        "output_alias",
    }
