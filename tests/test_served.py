"""The micro example with its general teacher behind a server: prepared, scored and evaluated as with the teacher's folder."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoTokenizer

from camopd import plan as layout
from camopd import prepare, rollout, score, workflow
from camopd.config import load_recipe
from camopd.engines import served
from camopd.engines.remote import RemoteEngine
from camopd.engines.served import Server
from camopd.engines.transformers import TransformersEngine, load_model
from camopd.errors import EngineError, InputError
from camopd.evaluation.harness import Harness, open_tasks, quiet
from camopd.evaluation.served import ServedLM, ServedTeacher
from camopd.inputs.served import other_head
from camopd.outcome import result_of
from camopd.plan import Plan
from camopd.records import read_table
from camopd.store import Store
from tests.fixtures.completions import Completions, Refused, serve
from tests.tiny import save_adapter

ROOT = Path(__file__).parents[1]
MICRO = ROOT / "examples" / "micro"
SMALL = {"num_rounds": 1, "rollout.prompts_per_step": 8, "steps_per_round": 4}


@pytest.fixture(scope="module")
def general() -> Any:
    return load_model(MICRO / "general")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MICRO / "general")


@pytest.fixture
def teacher(general, tokenizer, monkeypatch) -> Iterator[Completions]:
    monkeypatch.setattr(served, "BACKOFF", 0.01)
    monkeypatch.setattr(served, "ATTEMPTS", 3)
    with serve(Completions(general, tokenizer, max_model_len=128)) as found:
        yield found


def prepared(tmp_path: Path, location: str, **settings: Any) -> Plan:
    wish = SMALL | {"output": str(tmp_path / "runs"), "branches.general.teacher": location} | settings
    return prepare.run(load_recipe(ROOT / "recipes" / "micro.toml", wish), store=Store())


def problems(tmp_path: Path, location: str, **settings: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        prepared(tmp_path, location, **settings)
    return [str(problem) for problem in caught.value.problems]


def disturbed() -> Any:
    """Another model of the same shape."""
    other = load_model(MICRO / "general")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    return other


# --- In prepare -----------------------------------------------------------------------------------------------------------


def test_the_plan_keeps_what_the_teacher_said_and_its_name_is_its_identity(teacher, general, tokenizer, tmp_path) -> None:
    plan = prepared(tmp_path, teacher.url)
    (probe,) = plan.served.values()
    ids = torch.tensor([probe["token_ids"]])
    exact = general(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    assert probe["logprobs"] == pytest.approx(exact.tolist(), abs=1e-4)
    assert Plan.load(Store(), plan.run_uri) == plan
    assert plan.max_prompt_tokens == 128 - 1 - 16  # the server wants a position for a token after a sequence
    assert any(teacher.url in warning and "fewer than prompts.max_prompt_tokens 112" in warning for warning in plan.warnings)
    with serve(Completions(general, tokenizer, max_model_len=128)) as elsewhere:
        assert prepared(tmp_path, f"{elsewhere.url}#teacher").run_uri == plan.run_uri
    teacher.names = ("another-name",)
    assert prepared(tmp_path, teacher.url).run_uri != plan.run_uri


@pytest.mark.parametrize(
    ("wrong", "model", "sentence"),
    [
        ({"names": ("a", "b")}, "", r"serves a, b; say which is meant, as in http://127.0.0.1:\d+/v1#NAME"),
        ({"names": ("a", "b")}, "#c", r"serves no model 'c'; it serves a, b"),
        (
            {"max_logprobs": 5},
            "",
            r"the 8 most likely tokens cannot be had, .* max allowed: 5 -> .*--max-logprobs 8",
        ),
        (
            {"heat": True},
            "",
            "change with the request's temperature.* -> serve it with raw log-probabilities",
        ),
        ({"tokenize_shift": 1}, "", "makes other ids of the same text than the student's tokenizer -> give a teacher of"),
        ({"without": ("prompt_logprobs",)}, "", "gives no prompt_logprobs; a served teacher needs them, as vLLM"),
        ({"shift": 1}, "", "did not take the token ids as they are"),
        ({"key": "k"}, "", r"/v1/models refuses the key \(status 401\); set CAMOPD_TEACHER_API_KEY in the environment"),
        (
            {"max_model_len": 16},
            "",
            r"rollout\.max_new_tokens: 16 response tokens leave 0 for a prompt in the 15 positions",
        ),
    ],
    ids=str,
)
def test_a_server_that_cannot_teach_is_one_problem_before_anything_is_started(
    teacher, tmp_path, wrong, model, sentence
) -> None:
    for name, value in wrong.items():
        setattr(teacher, name, value)
    found = problems(tmp_path, teacher.url + model)
    assert len(found) == 1
    assert re.search(sentence, found[0])


def test_what_is_wrong_with_server_and_prompts_is_said_together(teacher, tmp_path) -> None:
    teacher.names = ()
    found = problems(tmp_path, teacher.url, **{"branches.domain.prompts": str(tmp_path / "nothing.jsonl")})
    assert len(found) == 2
    assert any("branches.general.teacher" in problem and "serves none" in problem for problem in found)


def test_a_server_without_tokenize_is_asked_to_read_ids_back(teacher, tmp_path) -> None:
    teacher.tokenize_shift = None
    assert prepared(tmp_path, teacher.url).served
    other = SimpleNamespace(decode=lambda ids: "".join(chr(65 + i % 26) for i in ids))
    teacher.tokenizer = other
    (problem,) = problems(tmp_path, teacher.url)
    assert "reads the student's token ids as other text" in problem


def test_a_head_that_believes_in_its_padding_is_refused(teacher) -> None:
    """Rows beyond the tokenizer's ids, as heads have that are padded to a round number; here with half of the probability."""
    likely = load_model(MICRO / "general")
    likely.resize_token_embeddings(280, mean_resizing=True)
    teacher.model = likely
    rows = likely.config.vocab_size
    engine = RemoteEngine(Server(teacher.url), "teacher", vocab_size=261, batch_size=1, batch_tokens=99, max_length=127)
    ids = [5, 6, 7, 8]
    logprobs = likely(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(-1)
    share = logprobs[261:].exp().sum().item()
    faults = list(other_head(engine, ids, 261, rows))
    assert (share > 1e-3) == bool(faults)
    with torch.no_grad():
        likely.get_output_embeddings().weight[261:] = likely.get_output_embeddings().weight[:261][logprobs[:261].argmax()]
    ((what, _),) = other_head(engine, ids, 261, rows)
    assert "of the probability to ids that no token has" in what
    assert list(other_head(engine, ids, 261, 261)) == []
    ((what, _),) = other_head(engine, ids, 281, 281)
    assert "the student's last token, id 280, is not known there" in what


def test_a_student_that_is_an_adapter_is_read_with_its_base(teacher, general, tmp_path) -> None:
    """Its tokenizer and the rows of its head are the base's."""
    adapter = str(save_adapter(tmp_path / "adapter", load_model(MICRO / "domain"), rank=2, alpha=1.0))
    student = {"student": adapter, "base": str(MICRO / "domain")}
    plan = prepared(tmp_path, teacher.url, **student)
    assert plan.content_ids["student/base"] == Store().content_id(student["base"])
    assert plan.served == prepared(tmp_path, teacher.url).served
    (problem,) = problems(tmp_path, teacher.url, student=adapter)
    assert "does not name its base -> set base" in problem


def test_two_models_under_one_name_are_told_apart(teacher, general, tokenizer, tmp_path) -> None:
    with serve(Completions(disturbed(), tokenizer, max_model_len=128)) as other:
        (problem,) = problems(tmp_path, teacher.url, **{"branches.domain.teacher": other.url})
    assert "serves another model under the same name as http://127.0.0.1" in problem


# --- In the stages --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_round_scored_by_a_server_is_that_of_the_teachers_folder(teacher, tmp_path) -> None:
    tables = {}
    for kind, location in (("served", teacher.url), ("local", str(MICRO / "general"))):
        plan = prepared(tmp_path / kind, location, **{"prompts.max_prompt_tokens": 100})
        uri = layout.round_uri(plan.run_uri, 1)
        rollout.run(uri)
        teacher.faults = deque([None, None, Refused(503), Refused(429)])
        score.run(uri, "general")
        tables[kind] = read_table(Path(layout.score_uri(uri, "general")) / "scored.parquet", "scored")
    assert len(tables["served"]) == len(tables["local"]) == 24
    for ours, theirs in zip(tables["served"], tables["local"], strict=True):
        assert ours["prompt_id"] == theirs["prompt_id"]
        assert ours["teacher_logprobs"] == pytest.approx(theirs["teacher_logprobs"], abs=1e-4)
        np.testing.assert_allclose(np.exp(ours["topk_logprobs"]), np.exp(theirs["topk_logprobs"]), atol=1e-5)


@pytest.mark.slow
def test_a_server_that_serves_something_else_by_now_is_noticed(teacher, general, tmp_path) -> None:
    plan = prepared(tmp_path, teacher.url)
    uri = layout.round_uri(plan.run_uri, 1)
    rollout.run(uri)
    teacher.scale = 1.5  # restarted with processed log-probabilities
    with pytest.raises(EngineError, match="serves another model than when the run was prepared"):
        score.run(uri, "general")
    teacher.scale, teacher.model = 1, disturbed()
    with pytest.raises(EngineError, match=r"serves another model than when the run was prepared: .* nats a token away"):
        score.run(uri, "general")
    (problem,) = problems(tmp_path, teacher.url)
    assert "branches.general.teacher" in problem
    assert "serves another model than when" in problem
    teacher.model, teacher.max_model_len = general, 100
    with pytest.raises(EngineError, match=r"takes 99 tokens, the run's sequences have up to 127; serve it longer"):
        score.run(uri, "general")
    teacher.max_model_len = None
    assert score.run(uri, "general").metrics["num_samples"] == 24


@pytest.mark.slow
def test_a_whole_recovery_with_a_served_teacher(teacher, tmp_path) -> None:
    """To the gate's decision, with the evaluation that the teacher's folder has."""
    wish = SMALL | {"evaluate.limit": 12, "evaluate.curve_points": 0, "evaluate.bootstrap": 200, "promote.policy": "never"}
    scores = {}
    for kind, location in (("served", teacher.url), ("local", str(MICRO / "general"))):
        settings = wish | {
            "output": str(tmp_path / kind),
            "branches.general.teacher": location,
            "prompts.max_prompt_tokens": 100,
        }
        done = workflow.run(str(ROOT / "recipes" / "micro.toml"), settings, store=Store())
        result = result_of(Plan.load(Store(), done.uri), Store())
        assert result is not None
        scores[kind] = result.evaluation["scores"]
    assert scores["served"].keys() == scores["local"].keys() == {"before", "after", "teacher-general"}
    assert scores["served"] == scores["local"]


@pytest.mark.slow
def test_a_served_teacher_may_answer_in_place_of_the_student(teacher, general, tmp_path) -> None:
    plan = prepared(tmp_path, teacher.url, method="off-policy-kd", **{"score.signal": "sampled"})
    uri = layout.round_uri(plan.run_uri, 1)
    rollout.run(uri)
    rows = read_table(Path(layout.rollout_uri(uri)) / "rollouts.parquet", "rollouts")
    own = [row for row in rows if row["branch"] == "general"]
    assert own
    engine = TransformersEngine(general, vocab_size=plan.vocab_size, batch_size=8, batch_tokens=999)
    for index, scores in engine.score([row["prompt_ids"] for row in own], [row["response_ids"] for row in own]):
        assert own[index]["logprobs"] == pytest.approx(scores.logprobs, abs=1e-3)


def remote(teacher: Completions) -> RemoteEngine:
    return RemoteEngine(Server(teacher.url), "teacher", vocab_size=261, batch_size=8, batch_tokens=999, max_length=127)


@pytest.mark.slow
def test_a_served_teacher_is_evaluated_as_the_folder_is(teacher, general, tokenizer) -> None:
    config = AutoConfig.from_pretrained(MICRO / "general")
    with open_tasks(["micro_seen", "micro_domain"], MICRO / "tasks", seed=0) as tasks:
        harness = Harness(tasks=tasks, tokenizer=tokenizer, batch_size=8, limit=12)
        here = dict(harness.evaluate(general))
        there = dict(harness.evaluate(ServedTeacher(remote(teacher), config, (tokenizer.eos_token_id,))))
    assert here == there
    assert sum(answer.score for answer in there["micro_seen"]) > 6


def test_choices_are_as_likely_as_with_the_folder(teacher, general, tokenizer) -> None:
    requests = [
        SimpleNamespace(args=pair) for pair in (("2 + 2 =", " 4"), ("The sky is ", "blue"), ("", "hello"), ("a" * 150, "b"))
    ]
    options = {"tokenizer": tokenizer, "batch_size": 2}
    with quiet():
        here = HFLM(pretrained=general, max_length=126, **options).loglikelihood(requests)
        there = ServedLM(ServedTeacher(remote(teacher), general.config, ()), **options).loglikelihood(requests)
    for ours, theirs in zip(there, here, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-3)
        assert ours[1] == theirs[1]
