"""Which models are compared, the arithmetic by hand, and the whole stage against scores computed one token at a time."""

import json
import math
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from camopd import evaluate, rounds
from camopd.errors import InputError, StoreError, UnhealthyRunError
from camopd.evaluate import Contestant, contestants, curve_rounds, evaluation_uri, headline_table, summarise
from camopd.evaluation.intervals import exact_end
from camopd.plan import Plan, checkpoint_uri, plan_uri, rollout_uri, round_uri, score_uri, select_uri
from camopd.store import Store, join
from tests.evaluation import make_answers, make_plan, settings

TOKENIZER = Path(__file__).parent.parent / "examples" / "micro" / "general"


def finish(store: Store, uri: str, stage: str, **files: str) -> None:
    """A finished prefix with such files."""

    def write(folder: Path):
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)  # a keyword holds no dot
        return {}

    store.produce(uri, stage=stage, config={}, inputs={"uri": uri}, write=write)


def write_plan(store: Store, plan: Plan) -> None:
    store.write(join(plan.run_uri, "recipe.json"), plan.recipe.model_dump_json().encode())
    template = (TOKENIZER / "chat_template.jinja").read_text()
    finish(store, plan_uri(plan.run_uri), "prepare", plan__json=plan.to_json(), chat_template__jinja=template)


# --- Which models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rounds", "points", "expected"),
    [(30, 4, [6, 12, 18, 24]), (8, 4, [2, 3, 5, 6]), (3, 4, [1, 2]), (2, 1, [1]), (1, 4, []), (30, 0, [])],
)
def test_curve_rounds_are_spread_between_before_and_after(num_rounds, points, expected):
    assert curve_rounds(num_rounds, points) == expected


def test_each_model_is_evaluated_once(tmp_path):
    store = Store()
    plan = make_plan(f"{tmp_path}/demo-1", extra=True, num_rounds=4, evaluate={"curve_points": 1})
    for number in range(1, 5):
        finish(store, checkpoint_uri(round_uri(plan.run_uri, number)), "train", weights=f"{number}")
    found = contestants(plan, store)
    assert [(m.key, m.round) for m in found] == [
        ("before", 0),
        ("after", 4),
        ("teacher-general", None),
        ("teacher-drugs", None),
        ("round-0002", 2),
    ]
    assert found[1].uri == f"{plan.run_uri}/rounds/0004/train"
    assert evaluate.teachers(plan, found) == {"general": "teacher-general", "domain": "before", "drugs": "teacher-drugs"}


def test_without_a_last_checkpoint_the_reason_is_named(tmp_path):
    store, plan = Store(), make_plan(f"{tmp_path}/demo-1")
    finish(store, checkpoint_uri(round_uri(plan.run_uri, 1)), "train", weights="1")
    with pytest.raises(StoreError, match="rounds/0002/train"):
        contestants(plan, store)
    rounds.record_stop(plan.run_uri, stage="rollout", round_number=2, reason="responses are empty", store=store)
    with pytest.raises(UnhealthyRunError, match="round 2, rollout: responses are empty"):
        contestants(plan, store)


def test_the_id_follows_what_shapes_the_evaluation_and_nothing_else(tmp_path):
    store = Store()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "a.jsonl").write_text("1")

    def uri(seed=0, weights="2", **recipe):
        evaluation = {"curve_points": 0, "bootstrap": 200, "task_dir": f"{tmp_path}/tasks"} | recipe.pop("evaluate", {})
        plan = make_plan(f"{tmp_path}/{weights}/demo-1", evaluate=evaluation, **recipe)
        for number in (1, 2):
            finish(store, checkpoint_uri(round_uri(plan.run_uri, number)), "train", weights=weights * number)
        return evaluation_uri(plan, store).rpartition("/")[2]

    first = uri()
    assert len(first) == 8
    assert first == uri() == uri(promote={"alias": "other"}, notes="again")
    others = [uri(gate={"min_recovered": 0.1}), uri(evaluate={"limit": 3}), uri(weights="3"), uri(num_rounds=1)]
    (tmp_path / "tasks" / "a.jsonl").write_text("2")
    assert len({first, *others, uri()}) == 6


# --- Arithmetic -----------------------------------------------------------------------------------------------------------


def hand_made(*, extra=False):
    """tests/evaluation.py: general 0.25 before, 0.75 after, teacher 1; domain 1 and 1; drugs 0 before, 0.5 after, teacher 1."""
    plan = make_plan(extra=extra, gate={"min_recovered": 0.01, "min_retained": 0.6})
    models = [
        Contestant("before", "domain model before", "/d", "sha256:domain", 0),
        Contestant("after", "recovered model after", "/a", "sha256:after", 2),
        Contestant("teacher-general", "general teacher", "/g", "sha256:general"),
    ]
    if extra:
        models.append(Contestant("teacher-drugs", "drugs teacher", "/e", "sha256:drugs"))
    return summarise(make_answers(plan), models, plan, settings(plan))


def test_scores_and_shares_by_hand():
    found = hand_made()
    scores = {model: found["scores"][model]["branches"] for model in ("before", "after", "teacher-general")}
    assert {model: (s["general"]["value"], s["domain"]["value"]) for model, s in scores.items()} == {
        "before": (0.25, 1.0),
        "after": (0.75, 1.0),
        "teacher-general": (1.0, 0.0),
    }
    assert found["recovered"]["general"]["value"] == pytest.approx((0.75 - 0.25) / (1 - 0.25))
    # Eight of eight, whatever is drawn: the ends are the exact binomial's, 0.025 ** (1 / 8) and as far above.
    assert found["retained"]["domain"] == pytest.approx({"value": 1.0, "low": 0.6306, "high": 1.3694}, abs=1e-4)
    assert found["gain"]["branches"]["general"]["value"] == 0.5
    assert found["gain"]["tasks"]["unseen"]["value"] == 0.5
    assert [point["round"] for point in found["curve"]] == [0, 2]
    unseen = (exact_end(8) + exact_end(4)) / 2 / 0.75  # mean of the two tasks, over the teacher's lead
    assert found["recovered"]["general"]["low"] == pytest.approx(2 / 3 - unseen)


def test_headline_holds_finite_numbers_only():
    found = hand_made()
    assert found["headline"]["recovered_general"] == pytest.approx(2 / 3)
    assert found["headline"]["domain_teacher"] == found["headline"]["domain_before"] == 1.0
    assert found["headline"]["passed"] == float(found["decision"]["passed"]) == 1.0
    assert all(math.isfinite(value) for value in found["headline"].values())
    json.dumps(found, allow_nan=False)


def test_three_branches_are_judged_by_their_own_teachers():
    found = hand_made(extra=True)
    assert found["retained"]["drugs"]["value"] == 0.5
    assert found["retained"]["domain"]["value"] == 1.0
    assert 0 <= found["retained"]["drugs"]["low"] < 0.5
    assert not found["decision"]["passed"]
    assert [reason.split(",")[0] for reason in found["decision"]["reasons"]] == ["general: yes", "domain: yes", "drugs: no"]


def test_headline_table():
    rows = headline_table(hand_made(extra=True))
    assert rows[0] == ["", "general", "domain", "drugs"]
    assert [row[0] for row in rows[1:]] == [
        "general teacher",
        "drugs teacher",
        "domain model before",
        "recovered model after",
        "recovered share",
        "retained share",
    ]
    assert rows[3][2] == "1.000 (0.631 to 1.000)"
    assert rows[4][1].startswith("0.750 (")
    assert rows[5][1].startswith("0.667 (")
    assert rows[5][2:] == ["", ""]
    assert rows[6][1] == ""
    assert evaluate.format_interval({"value": None, "low": None, "high": 1.0}) == "n/a (n/a to 1.000)"


def test_an_undefined_share_is_a_no_with_a_reason():
    plan = make_plan()
    answers = make_answers(plan)
    answers["teacher-general"] = answers["before"]  # no better than the start
    models = [
        Contestant("before", "before", "/d", "sha256:domain", 0),
        Contestant("after", "after", "/a", "sha256:after", 2),
        Contestant("teacher-general", "general teacher", "/g", "sha256:general"),
    ]
    found = summarise(answers, models, plan, {})
    assert found["recovered"]["general"] == {"value": None, "low": None, "high": None}
    assert "recovered_general" not in found["headline"]
    assert not found["decision"]["passed"]
    assert "undefined" in found["decision"]["reasons"][0]


# --- The whole stage ------------------------------------------------------------------------------------------------------

QUESTIONS = [f"{word}: {n}" for word in ("copy", "add", "last") for n in range(8)]
CHOICES = ["a", "b", "c", "d", "e", "f"]
ECHO = """
task: echo
dataset_path: json
dataset_kwargs: {data_files: {test: echo.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["<|end|>"], do_sample: false, max_gen_toks: 5}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: choose.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_target: answer
doc_to_choice: ["a", "b", "c", "d", "e", "f"]
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def save_model(folder: Path, seed: int) -> Path:
    """A tiny random Qwen3 with the micro example's tokenizer."""
    from transformers import AutoTokenizer

    from tests.tiny import tiny_model

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = tiny_model(seed, vocab_size=264, spread=0.8)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the template is the plan's
        shutil.copy(TOKENIZER / name, folder)
    return folder


def reference(folder: Path) -> tuple[list[str], list[int]]:
    """Greedy answers and likeliest choices of a model: no batch, no padding, no cache, no harness."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    answers, chosen = [], []
    for question in QUESTIONS:
        prompt = tokenizer.encode(f"<|user|>{question}<|end|><|assistant|>")
        ids = list(prompt)
        while len(ids) < len(prompt) + 5 and tokenizer.eos_token_id not in ids[len(prompt) :]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
        totals = []
        for choice in CHOICES:
            tail = tokenizer.encode(choice)
            logp = model(torch.tensor([prompt + tail])).logits[0].log_softmax(-1)
            totals.append(sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(tail)))
        chosen.append(totals.index(max(totals)))
    return answers, chosen


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of tiny models, evaluated from another directory than the tasks', and what each model must have answered.

    `echo` holds the general teacher's answers to be right, `choose` the student's choices; a third of both are the
    recovered model's.
    """
    root, store = tmp_path_factory.mktemp("evaluate"), Store()
    models = {name: save_model(root / name, seed) for seed, name in enumerate(("domain", "general", "round1", "round2"))}
    truth = {name: reference(folder) for name, folder in models.items()}
    tasks = root / "tasks" / "nested"
    tasks.mkdir(parents=True)
    right = {
        "echo": [truth[("general", "general", "round2")[i % 3]][0][i] for i in range(len(QUESTIONS))],
        "choose": [truth[("domain", "domain", "round2")[i % 3]][1][i] for i in range(len(QUESTIONS))],
    }
    for name, text, answers in (("echo", ECHO, right["echo"]), ("choose", CHOOSE, right["choose"])):
        (tasks / f"{name}.yaml").write_text(text)
        rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    branches = [
        {"name": "general", "role": "recover", "teacher": str(models["general"]), "prompts": "/g.jsonl", "tasks": ["echo"]},
        {"name": "domain", "role": "retain", "prompts": "/d.jsonl", "tasks": ["choose"]},
    ]
    chosen = {"task_dir": str(root / "tasks"), "bootstrap": 200, "curve_points": 1, "batch_size": 7}
    plan = make_plan(str(root / "runs" / "demo-1"), student=str(models["domain"]), branches=branches, evaluate=chosen)
    write_plan(store, plan)
    for number, uri in enumerate(plan.rounds, 1):
        finish(store, rollout_uri(uri), "rollout", rollouts__parquet="")
        finish(store, select_uri(uri), "select", summary__json="{}")
        for branch in plan.recipe.branches:
            finish(store, score_uri(uri, branch.name), "score", scored__parquet="")

        def write(folder: Path, number=number):
            shutil.copytree(models[f"round{number}"], folder, dirs_exist_ok=True)
            steps = [{"step": number, "branches": {"general": {"gap": 0.5, "tokens": 10}}}]
            (folder / "steps.json").write_text(json.dumps(steps))
            return {}

        store.produce(checkpoint_uri(uri), stage="train", config={}, inputs={}, write=write)
    before = sorted(path for path in (root / "tasks").rglob("*"))
    manifest = evaluate.run(plan.run_uri, store=store)
    assert before == sorted(path for path in (root / "tasks").rglob("*")), "the stage wrote into the user's task folder"
    return store, plan, manifest, truth, right


def asked_again(store: Store, plan: Plan, *, evaluate=(), **recipe) -> Plan:
    """The same run with another recipe, as if asked for again."""
    values = plan.recipe.model_dump() | recipe
    again = make_plan(plan.run_uri, **values | {"evaluate": values["evaluate"] | dict(evaluate)})
    store.write(join(plan.run_uri, "recipe.json"), again.recipe.model_dump_json().encode())
    return again


@pytest.mark.slow
def test_scores_agree_with_a_plain_loop(finished):
    store, plan, manifest, truth, right = finished
    uri = evaluation_uri(plan, store)
    found = json.loads(store.read(join(uri, "evaluation.json")))
    names = {"before": "domain", "teacher-general": "general", "round-0001": "round1", "after": "round2"}
    assert set(found["scores"]) == set(names)
    for key, name in names.items():
        answers, chosen = truth[name]
        same = [
            sum(own == wanted for own, wanted in zip(mine, theirs, strict=True)) / len(QUESTIONS)
            for mine, theirs in ((answers, right["echo"]), (chosen, right["choose"]))
        ]
        assert [found["scores"][key]["tasks"][task]["value"] for task in ("echo", "choose")] == pytest.approx(same)
    rows = pq.read_table(store.fetch(join(uri, "samples.parquet"))).to_pylist()
    assert len(rows) == 4 * 2 * len(QUESTIONS)
    assert [row["answer"] for row in rows if (row["model"], row["task"]) == ("after", "echo")] == truth["round2"][0]
    assert [row["answer"] for row in rows if (row["model"], row["task"]) == ("after", "choose")] == [
        str(c) for c in truth["round2"][1]
    ]
    assert rows[0]["question"] == "copy: 0"
    assert rows[0]["prompt"] == "<|user|>copy: 0<|end|><|assistant|>"
    after = found["scores"]["after"]["tasks"]
    assert 0.2 < after["echo"]["value"] < 0.9, "scores that are all or nothing show little"
    assert 0.2 < after["choose"]["value"] < 0.9, "scores that are all or nothing show little"
    assert manifest.metrics == found["headline"]
    assert manifest.inputs.keys() == {"before", "after", "teacher-general", "round-0001", "tasks"}
    assert [file.name for file in manifest.files] == ["evaluation.json", "report.html", "samples.parquet"]


@pytest.mark.slow
def test_a_finished_evaluation_is_not_done_again(finished, capsys):
    store, plan, manifest, *_ = finished
    assert evaluate.run(plan.run_uri, store=store) == manifest
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_only_progress_is_said_and_nobody_is_called(finished, capsys):
    store, plan, *_ = finished
    lookups: list = []
    sys.addaudithook(lambda event, args: lookups.append(args) if event == "socket.getaddrinfo" else None)
    again = asked_again(store, plan, evaluate={"limit": 3, "curve_points": 0})
    manifest = evaluate.run(plan.run_uri, store=store)
    store.write(join(plan.run_uri, "recipe.json"), plan.recipe.model_dump_json().encode())
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("evaluate")]
    assert said == []
    assert lookups == []
    rows = pq.read_table(store.fetch(join(evaluation_uri(again, store), "samples.parquet"))).to_pylist()
    assert len(rows) == 3 * 2 * 3
    assert manifest.config["evaluate"]["limit"] == 3


@pytest.mark.slow
def test_unknown_tasks_are_named_with_those_that_exist(finished):
    store, plan, *_ = finished
    branches = [branch.model_dump() for branch in plan.recipe.branches]
    branches[0]["tasks"], branches[1]["tasks"] = ["ecco"], ["choose", "chose"]
    asked_again(store, plan, branches=branches)
    with pytest.raises(InputError) as caught:
        evaluate.run(plan.run_uri, store=store)
    store.write(join(plan.run_uri, "recipe.json"), plan.recipe.model_dump_json().encode())
    assert len(caught.value.problems) == 2
    assert "there is no task 'ecco'" in str(caught.value)
    assert "hold choose, echo" in str(caught.value)


def test_a_branch_that_nothing_measures_is_refused(tmp_path):
    branches = [
        {"name": "general", "role": "recover", "teacher": "/g", "prompts": "/g.jsonl", "tasks": ["echo"]},
        {"name": "domain", "role": "retain", "prompts": "/d.jsonl"},
    ]
    store, plan = Store(), make_plan(f"{tmp_path}/demo-1", branches=branches)
    write_plan(store, plan)
    with pytest.raises(InputError, match=r"branches\.domain\.tasks: is empty"):
        evaluate.run(plan.run_uri, store=store)
