"""Evaluation tasks, as far as they can be read without lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from camopd.inputs.tasks import check_tasks, evaluation_items, fingerprint, leaves, read_task_files


def task_folder(folder: Path, files: dict[str, dict[str, Any]], rows: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, config in files.items():
        (folder / name).write_text(yaml.safe_dump(config))
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or []))
    return folder


def local(task: str, **more: Any) -> dict[str, Any]:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "items.jsonl"}}, "test_split": "test"}
    return {"task": task, **data, "doc_to_text": "question", **more}


def names(files: list, name: str) -> list[str]:
    return [leaf.config["task"] for leaf in leaves(name, files)]


def test_tasks_groups_and_tags(tmp_path: Path) -> None:
    files, problems = read_task_files(
        task_folder(
            tmp_path,
            {
                "a.yaml": local("a", tag="short"),
                "b.yaml": local("b", tag=["short", "other"]),
                "g.yaml": {"group": "g", "task": ["a", {"task": "b", "num_fewshot": 2}]},
                "h.yaml": {"group": "h", "task": ["g", "h"]},  # a group that holds itself
            },
        )
    )
    assert not problems
    assert names(files, "a") == ["a"]
    assert names(files, "short") == ["a", "b"]
    assert names(files, "other") == ["b"]
    assert names(files, "g") == names(files, "h") == ["a", "b"]
    assert names(files, "none") == []
    (problem,) = check_tasks({"branches.general.tasks": ["a", "g", "c"]}, files)
    assert (problem.where, problem.what) == ("branches.general.tasks", "there is no task 'c'")
    assert "a, b, g, h" in problem.fix


def test_code_tags_are_not_run_and_bad_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a\ncustom_dataset: !function data.load\n")
    (tmp_path / "b.yaml").write_text("task: b\nfields: [1\n")
    (tmp_path / "c.yaml").write_text("- 1\n")
    (tmp_path / "d.yaml").write_bytes(b"task: \xff\n")
    files, problems = read_task_files(tmp_path)
    assert [file.config["task"] for file in files] == ["a"]
    assert [problem.where for problem in problems] == [f"{tmp_path}/b.yaml:3", f"{tmp_path}/c.yaml", f"{tmp_path}/d.yaml"]


def test_includes_are_followed_and_may_be_circular(tmp_path: Path) -> None:
    base = {key: value for key, value in local("base").items() if key != "task"}
    folder = task_folder(
        tmp_path,
        {
            "base.yaml": {**base, "include": "a.yaml"},
            "a.yaml": {"task": "a", "include": "base.yaml"},
            "b.yaml": {"include": "no.yaml"},
        },
        [{"question": "Which?"}],
    )
    files, problems = read_task_files(folder)
    assert [problem.where for problem in problems] == [f"{folder}/b.yaml"]
    assert evaluation_items(["a"], files)[0].keys() == {fingerprint("which?")}


@pytest.mark.parametrize(
    ("doc_to_text", "row", "asked"),
    [
        ("question", {"question": "What is  it?", "answer": "x"}, ["what is it?"]),
        ("Q: {{question}}\nA:", {"question": "What?"}, ["q: what? a:"]),
        (None, {"question": "What?", "answer": "That", "n": 3}, ["what?", "that"]),  # a function asks: any text may be it
        ("Always this.", {"question": "a"}, ["always this."]),
    ],
)
def test_what_is_asked(tmp_path: Path, doc_to_text: str | None, row: dict, asked: list[str]) -> None:
    files, _ = read_task_files(task_folder(tmp_path, {"a.yaml": local("a", doc_to_text=doc_to_text)}, [row]))
    items, problems = evaluation_items(["a"], files)
    assert not problems
    assert items == {fingerprint(text): "a" for text in asked}


@pytest.mark.parametrize(
    ("data_files", "rows"),
    [
        ("items.jsonl", 1),
        (["items.jsonl"], 1),
        ({"test": "items.jsonl"}, 1),
        ({"test": ["items.jsonl"], "train": "gone.jsonl"}, 1),
        ({"train": "items.jsonl"}, 0),
        ("https://example.org/items.jsonl", 0),
    ],
)
def test_which_data_is_local(tmp_path: Path, data_files: Any, rows: int) -> None:
    config = local("a", dataset_kwargs={"data_files": data_files})
    files, _ = read_task_files(task_folder(tmp_path, {"a.yaml": config}, [{"question": "Q"}]))
    items, problems = evaluation_items(["a"], files)
    assert (len(items), problems) == (rows, [])


@pytest.mark.parametrize(
    ("content", "doc_to_text", "words"),
    [
        (None, "question", "is missing"),
        ("{", "question", "does not fit"),
        ('{"a": 1}', "{{question}}", "does not fit"),
        ('{"a": 1}', "{{question", "does not fit"),
    ],
)
def test_data_that_does_not_fit_its_task(tmp_path: Path, content: str | None, doc_to_text: str, words: str) -> None:
    files, _ = read_task_files(task_folder(tmp_path, {"a.yaml": local("a", doc_to_text=doc_to_text)}))
    (tmp_path / "items.jsonl").unlink()
    if content is not None:
        (tmp_path / "items.jsonl").write_text(content)
    items, (problem,) = evaluation_items(["a"], files)
    assert not items
    assert problem.where == str(tmp_path / "a.yaml")
    assert words in problem.what


def test_a_json_array_is_data_too(tmp_path: Path) -> None:
    files, _ = read_task_files(task_folder(tmp_path, {"a.yaml": local("a")}))
    (tmp_path / "items.jsonl").write_text('[{"question": "A"}, {"question": "B"}]')
    assert len(evaluation_items(["a"], files)[0]) == 2


def test_the_example_tasks_are_read() -> None:
    files, problems = read_task_files(Path(__file__).parents[1] / "examples" / "micro" / "tasks")
    items, missing = evaluation_items(["micro_seen", "micro_unseen", "micro_domain"], files)
    assert (problems, missing) == ([], [])
    assert set(items.values()) == {"micro_seen", "micro_unseen", "micro_domain"}
