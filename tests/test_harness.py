"""What the adapter makes of lm-eval's tasks and samples."""

import json

import pytest

from camopd.errors import InputError
from camopd.evaluation.harness import Answer, open_tasks, to_answer

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: answer
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: {higher}}}, {{metric: ter}}]
"""
SAMPLE = {
    "exact_match": 1.0,
    "filtered_resps": ["four"],
    "arguments": [("<|user|>2 + 2<|assistant|>", {"until": ["\n"]})],
    "target": 4,
}


def write_task(folder, name, *, size, higher="true"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, higher=higher))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in range(size)))


@pytest.mark.slow
def test_data_files_lie_beside_their_yaml_and_groups_stand_together(tmp_path, monkeypatch):
    write_task(tmp_path / "a", "one", size=2)
    write_task(tmp_path / "a", "two", size=3)
    write_task(tmp_path / "b", "three", size=4)
    (tmp_path / "a" / "group.yaml").write_text("group: both\ntask: [one, two]\n")
    monkeypatch.chdir("/")
    with open_tasks(["both", "three"], tmp_path, seed=0) as tasks:
        sizes = {name: [len(task.eval_docs) for task in each] for name, each in tasks.items()}
    assert sizes == {"both": [2, 3], "three": [4]}


@pytest.mark.slow
def test_a_metric_that_is_better_when_lower_is_refused(tmp_path):
    write_task(tmp_path, "one", size=2, higher="false")
    message = "task one: its first metric exact_match is better when lower"
    with pytest.raises(InputError, match=message), open_tasks(["one"], tmp_path, seed=0):
        pass


def test_an_answer_is_the_filtered_text():
    assert to_answer(SAMPLE, item="3", question="2 + 2", metric="exact_match") == Answer(
        item="3", question="2 + 2", prompt="<|user|>2 + 2<|assistant|>", answer="four", target="4", score=1.0
    )


def test_the_answer_to_a_choice_is_the_likeliest():
    sample = SAMPLE | {"filtered_resps": [(-3.5, False), (-0.5, True), (-2.0, False)], "acc": 0.0}
    assert to_answer(sample, item="0", question="", metric="acc").answer == "1"


@pytest.mark.parametrize("value", [(1.0, 2), None])
def test_a_metric_of_the_whole_corpus_is_refused(value):
    with pytest.raises(InputError, match="item 0: its first metric f1 is not one number a sample"):
        to_answer(SAMPLE | {"f1": value}, item="0", question="", metric="f1")
