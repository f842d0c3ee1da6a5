"""The first stage: everything that is wrong at once, and a plan that is made once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camopd import prepare
from camopd.config import Recipe
from camopd.errors import InputError
from camopd.inputs.encoding import NUM_SHOWN
from camopd.plan import Plan, plan_uri
from camopd.records import read_table
from camopd.store import Store
from tests.folders import CASES, MESSAGES_TEMPLATE, model_folder, prompt_file
from tests.test_tasks import local, task_folder

WORDS = ["pump seal", "leak heat", "oil check", "replace drain"]


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A recipe that has nothing wrong, as nested values; tests change one thing."""
    general = [{"id": f"g-{i}", "prompt": text} for i, text in enumerate(WORDS)]
    domain = [{"id": f"d-{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(WORDS)]
    tasks = task_folder(tmp_path / "tasks", {"a.yaml": local("a")}, [{"question": "heat pump"}])
    return {
        "name": "test",
        "student": str(model_folder(tmp_path / "student", template=MESSAGES_TEMPLATE)),
        "output": str(tmp_path / "runs"),
        "branches": [
            {
                "name": "general",
                "role": "recover",
                "teacher": str(model_folder(tmp_path / "teacher", "teacher-same-tokenizer-wider-head")),
                "prompts": str(prompt_file(tmp_path / "general.jsonl", general)),
                "tasks": ["a"],
            },
            {
                "name": "domain",
                "role": "retain",
                "prompts": str(prompt_file(tmp_path / "domain.jsonl", domain)),
                "tasks": ["a"],
            },
        ],
        "prompts": {"max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 2, "max_new_tokens": 64},
        "evaluate": {"task_dir": str(tasks)},
    }


def run(values: dict[str, Any]) -> Plan:
    return prepare.run(Recipe.model_validate(values), store=Store())


def problems_of(values: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        run(values)
    return [str(problem) for problem in caught.value.problems]


def table(plan: Plan, branch: str) -> list[dict[str, Any]]:
    return read_table(Path(plan_uri(plan.run_uri)) / f"prompts-{branch}.parquet", "prompts")


def preflight(plan: Plan) -> dict[str, Any]:
    return json.loads((Path(plan_uri(plan.run_uri)) / "preflight.json").read_bytes())


# --- The plan -------------------------------------------------------------------------------------------------------------


def test_the_plan(values: dict[str, Any]) -> None:
    plan = run(values)
    assert (plan.vocab_size, plan.eos_ids, plan.pad_id) == (14, (2,), 0)
    assert plan.num_prompts == {"general": 4, "domain": 4}
    assert plan.content_ids.keys() == {"student", "teacher/general", "teacher/domain", "prompts/general", "prompts/domain"}
    assert plan.content_ids["student"] == plan.content_ids["teacher/domain"]
    assert plan.warnings == ()
    row = table(plan, "general")[1]
    assert (row["prompt_id"], row["line"], row["text"], row["token_ids"].tolist()) == ("g-1", 2, "leak heat", [6, 7])
    assert table(plan, "domain")[0]["text"] == "user pump seal "
    assert table(plan, "domain")[0]["token_ids"].tolist() == [3, 4, 5]
    assert preflight(plan)["branches"]["general"]["accepted"] == 4
    assert Plan.load(Store(), plan.run_uri) == plan


def test_the_same_wish_finds_the_same_run_and_writes_no_plan_again(values: dict[str, Any]) -> None:
    first = run(values)
    manifest = Path(plan_uri(first.run_uri)) / "manifest.json"
    before = manifest.read_bytes()
    second = run(values | {"num_rounds": 3, "notes": "line 1\nline | 2"})
    assert second.run_uri == first.run_uri
    assert manifest.read_bytes() == before
    assert Plan.load(Store(), first.run_uri).recipe.num_rounds == 3
    settings = (Path(first.run_uri) / "settings.md").read_text(encoding="utf-8")
    assert "| num_rounds | 3 |" in settings
    assert "| notes | line 1<br>line \\| 2 |" in settings


def test_the_run_is_named_by_content_and_not_by_place(values: dict[str, Any], tmp_path: Path) -> None:
    first = run(values)
    shutil.copytree(tmp_path / "student", tmp_path / "copy")
    moved = run(values | {"student": str(tmp_path / "copy")})
    assert moved.run_uri == first.run_uri
    with (tmp_path / "general.jsonl").open("a") as handle:
        handle.write('{"prompt": "oil"}\n')
    assert run(values).run_uri != first.run_uri


def test_a_chat_template_is_part_of_the_identity_by_its_content(values: dict[str, Any], tmp_path: Path) -> None:
    uris = []
    for folder, text in (("a", "{{ messages[0].content }}"), ("b", "{{ messages[0].content }}"), ("c", "x")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.jinja").write_text(text)
        plan = run(values | {"prompts": values["prompts"] | {"chat_template": str(tmp_path / folder / "t.jinja")}})
        assert (Path(plan_uri(plan.run_uri)) / "chat_template.jinja").read_text() == text
        uris.append(plan.run_uri)
    assert uris[0] == uris[1] != uris[2]


def test_end_tokens_of_three_places_are_joined(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "student" / "generation_config.json").write_text('{"eos_token_id": [0, 2, 15]}')
    assert run(values).eos_ids == (0, 2)  # 15 is no id of the tokenizer


# --- Everything at once ---------------------------------------------------------------------------------------------------


def test_every_problem_is_told_at_once(values: dict[str, Any], tmp_path: Path) -> None:
    general, domain = values["branches"]
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"")
    (tmp_path / "file").write_text("x")
    prompt_file(tmp_path / "general.jsonl", [{"prompt": "pump"}, {"prompt": None}, {"prompt": "heat pump"}])
    found = problems_of(
        values
        | {
            "output": str(tmp_path / "file" / "runs"),
            "branches": [general | {"tasks": ["b"]}, domain | {"prompts": str(tmp_path / "none.jsonl"), "tasks": []}],
        }
    )
    for words in (
        "branches.domain.prompts: ",
        f"output: {tmp_path}/file/runs cannot be written",
        "branches.domain.tasks: is empty",
        "branches.general.tasks: there is no task 'b'",
        f"{tmp_path}/teacher/model.safetensors: has 0 bytes",
        "branches.general.prompts: 1 of 3 rows",
        f"{tmp_path}/general.jsonl:2: null prompt",
    ):
        assert any(problem.startswith(words) for problem in found), words
    assert len(found) == 7
    assert any("cannot be written" in problem and "output_uri in a run form" in problem for problem in found)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("missing", ["student", "teacher", "general.jsonl", "tasks"])
def test_an_input_that_is_not_there_is_named_once(values: dict[str, Any], tmp_path: Path, missing: str) -> None:
    os.rename(tmp_path / missing, tmp_path / "elsewhere")
    where = {
        "student": "student",
        "teacher": "branches.general.teacher",
        "general.jsonl": "branches.general.prompts",
        "tasks": "evaluate.task_dir",
    }
    (problem,) = problems_of(values)
    assert problem.startswith(where[missing] + ": ")


def test_a_folder_in_place_of_a_prompt_file(values: dict[str, Any], tmp_path: Path) -> None:
    values["branches"][0]["prompts"] = str(tmp_path / "tasks")
    (problem,) = problems_of(values)
    assert "is a folder" in problem


def test_an_evaluation_item_must_not_be_a_prompt(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": " Heat  PUMP"}]}, {"prompt": "oil"}]
    prompt_file(tmp_path / "domain.jsonl", rows)
    (problem,) = problems_of(values)
    assert problem.startswith(f"{tmp_path}/domain.jsonl:1: this prompt is also an item of the evaluation task a")
    prompt_file(tmp_path / "domain.jsonl", [{"id": i, "prompt": "heat pump"} for i in range(30)])
    assert len(problems_of(values)) == NUM_SHOWN + 1


def test_overlap_is_looked_for_also_when_the_plan_is_made(values: dict[str, Any], tmp_path: Path) -> None:
    run(values)
    (tmp_path / "tasks" / "items.jsonl").write_text('{"question": "Pump seal"}\n')
    assert len(problems_of(values)) == 2  # it is in both files


# --- Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("teacher-same-size-other-order", "token 'pump' has id 4 in the student and has id 13"),
        ("teacher-tokenizer-larger-than-head", "tokenizer has 20 ids, embedding has 16 rows"),
    ],
)
def test_a_teacher_with_another_tokenizer_is_rejected(values: dict[str, Any], tmp_path: Path, teacher: str, words: str) -> None:
    values["branches"][0]["teacher"] = str(model_folder(tmp_path / "other", teacher))
    (problem,) = problems_of(values)
    assert problem.startswith("branches.general.teacher: ")
    assert words in problem


def test_a_teacher_with_one_more_token_is_a_warning(values: dict[str, Any], tmp_path: Path) -> None:
    values["branches"][0]["teacher"] = str(model_folder(tmp_path / "other", "teacher-one-added-token"))
    plan = run(values)
    assert plan.vocab_size == 14
    assert any("'<think>' (id 14)" in warning for warning in plan.warnings)


def test_a_teacher_that_is_a_copy_of_the_student_is_a_warning(values: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "student", tmp_path / "copy")
    values["branches"][0]["teacher"] = str(tmp_path / "copy")
    assert any("holds the same files as the student" in warning for warning in run(values).warnings)


def test_a_model_without_an_end_token(values: dict[str, Any], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "student")
    folder = model_folder(tmp_path / "student", template=MESSAGES_TEMPLATE, eos_token_id=None)
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (problem,) = problems_of(values)
    assert "no end token" in problem


def test_a_response_that_leaves_no_room(values: dict[str, Any]) -> None:
    (problem,) = problems_of(values | {"rollout": {"max_new_tokens": 256}})
    assert problem.startswith("rollout.max_new_tokens: 256 response tokens leave 0")


def test_conversations_need_a_template(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "student" / "chat_template.jinja").unlink()
    (problem,) = problems_of(values)
    assert f"tokenizer of {tmp_path}/student has no chat_template, which 4 rows" in problem
    assert "set prompts.chat_template or use `prompt` rows" in problem


@pytest.mark.parametrize("content", [b"{% if %}", b"\xff\xfe", None])
def test_a_template_that_cannot_be_used(values: dict[str, Any], tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "t.jinja").write_bytes(content)
    (problem,) = problems_of(values | {"prompts": {"chat_template": str(tmp_path / "t.jinja")}})
    assert problem.startswith("prompts.chat_template: ")


def test_a_teacher_that_cannot_be_asked_for_prompts_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    values["branches"][0] |= {"prompts": "teacher", "teacher": str(model_folder(tmp_path / "bare", template=MESSAGES_TEMPLATE))}
    (problem,) = problems_of(values)
    assert problem.startswith("branches.general.teacher: its chat template puts no special token after the user's message")
    turns = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    values["branches"][0]["teacher"] = str(model_folder(tmp_path / "able", template=turns))
    plan = run(values)
    assert plan.num_prompts == {"domain": 4}
    assert "prompts/general" not in plan.content_ids
    assert "teacher" in (Path(plan.run_uri) / "settings.md").read_text()


# --- Prompts --------------------------------------------------------------------------------------------------------------


def test_bad_rows_fail_the_stage_unless_they_are_tolerated(values: dict[str, Any]) -> None:
    values["branches"][0]["prompts"] = str(CASES / "01-jsonl-messy" / "prompts.jsonl")
    problems = problems_of(values)
    assert problems[0].startswith("branches.general.prompts: 11 of 19 rows")
    assert len(problems) == 12
    plan = run(values | {"prompts": {"max_prompt_tokens": 64, "max_bad_row_fraction": 0.6}})
    record = preflight(plan)["branches"]["general"]
    assert (record["read"], record["accepted"], sum(record["rejected"].values())) == (19, 8, 11)
    assert plan.num_prompts["general"] == len(table(plan, "general")) == 8
    assert any("11 of 19 rows could not be used" in warning for warning in plan.warnings)
    assert any("1 rows have prompt and messages" in warning for warning in plan.warnings)


def test_at_most_twenty_reasons_are_shown(values: dict[str, Any], tmp_path: Path) -> None:
    prompt_file(tmp_path / "general.jsonl", [{"prompt": None}] * 50)
    problems = problems_of(values)
    assert len(problems) == NUM_SHOWN + 1
    assert "the first 20 follow" in problems[0]


def case_02(values: dict[str, Any], path: Path, overlong: str = "skip") -> dict[str, Any]:
    settings = json.loads((CASES / "02-prompt-too-long-and-empty" / "run.json").read_bytes())
    values["branches"][0]["prompts"] = str(path)
    prompts = {"max_prompt_tokens": 4096, "overlong": overlong}  # the model's 256 positions are the limit
    return values | {"prompts": prompts, "rollout": {"max_new_tokens": settings["max_new_tokens"], "prompts_per_step": 1}}


def test_one_long_prompt_is_skipped_and_counted(values: dict[str, Any]) -> None:
    plan = run(case_02(values, CASES / "02-prompt-too-long-and-empty" / "prompts.jsonl"))
    assert [row["prompt_id"] for row in table(plan, "general")] == ["s-1", "s-3"]
    record = preflight(plan)["branches"]["general"]
    assert record["overlong"] == 1
    assert record["rejected"] == {}
    assert ":2: id 's-2': prompt has 4" in record["first_overlong"][0]
    assert "192 are allowed" in record["first_overlong"][0]
    assert any("fewer than prompts.max_prompt_tokens 4096" in warning for warning in plan.warnings)


@pytest.mark.parametrize(("overlong", "kept"), [("skip", [192]), ("truncate_left", [192, 192, 192, 192])])
def test_the_boundary(values: dict[str, Any], tmp_path: Path, overlong: str, kept: list[int]) -> None:
    counts = json.loads((CASES / "02-prompt-too-long-and-empty" / "boundary.json").read_bytes())["prompt_token_counts"]
    path = prompt_file(tmp_path / "b.jsonl", [{"id": n, "prompt": "pump " * (n - 1) + "seal"} for n in counts])
    plan = run(case_02(values, path, overlong))
    rows = table(plan, "general")
    assert [len(row["token_ids"]) for row in rows] == kept
    assert all(row["token_ids"][-1] == 5 for row in rows)  # the end is kept


def test_a_long_prompt_can_fail_the_stage(values: dict[str, Any]) -> None:
    path = CASES / "02-prompt-too-long-and-empty" / "prompts.jsonl"
    summary, row = problems_of(case_02(values, path, "fail"))
    assert summary.startswith("branches.general.prompts: 1 of 3 prompts")
    assert row.startswith(f"{path}:2: id 's-2'")


def test_nothing_left_fails_the_stage(values: dict[str, Any], tmp_path: Path) -> None:
    path = prompt_file(tmp_path / "b.jsonl", [{"prompt": "pump " * 300}])
    (problem,) = problems_of(case_02(values, path))
    assert "no prompt of" in problem


def test_few_prompts_are_used_again_and_that_is_said(values: dict[str, Any]) -> None:
    plan = run(values | {"rollout": {"prompts_per_step": 5, "max_new_tokens": 8}})
    assert sum("fewer than rollout.prompts_per_step 5" in warning for warning in plan.warnings) == 2


def test_batches_do_not_change_the_result(values: dict[str, Any], tmp_path: Path) -> None:
    prompt_file(tmp_path / "general.jsonl", [{"id": i, "prompt": WORDS[i % 4]} for i in range(2500)])
    rows = table(run(values), "general")
    assert [row["prompt_id"] for row in rows] == [str(i) for i in range(2500)]
    assert np.array_equal([row["token_ids"] for row in rows[:4]], [row["token_ids"] for row in rows[2496:]])


# --- Stores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_in_s3(values: dict[str, Any], tmp_path: Path, s3_prefix: str) -> None:
    store = Store()
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        store.write(f"{s3_prefix}/{path.relative_to(tmp_path)}", path.read_bytes())
    text = json.dumps(values).replace(str(tmp_path), s3_prefix)
    plan = prepare.run(Recipe.model_validate_json(text), store=store)
    assert plan.run_uri.startswith(f"{s3_prefix}/runs/test-")
    assert plan.num_prompts == {"general": 4, "domain": 4}
    assert prepare.run(Recipe.model_validate_json(text), store=store) == plan
    store.write(f"{s3_prefix}/teacher/model.safetensors", b"")
    with pytest.raises(InputError, match="has 0 bytes"):
        prepare.run(Recipe.model_validate_json(text), store=store)
