"""A schedule's ticks: new, known, busy, tried again, given up. Models, runs and registries are real; no stage computes."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from camopd import claims, promote, workflow
from camopd.errors import InputError, ScheduleError, TrackingError
from camopd.outcome import Recorded, job_place
from camopd.plan import Plan, checkpoint_uri
from camopd.rounds import record_stop
from camopd.store import Store, join
from camopd.ticks import Schedule
from camopd.tracking import NullTracker
from tests.finished import make_evaluation, make_round
from tests.fixtures.mlflow_server import Proxy
from tests.test_export import finish
from tests.test_registered import client, register

MICRO = Path("examples/micro").absolute()
SCHEDULE = {"schedule_name": "nightly", "schedule_max_attempts": 3, "schedule_again_for_new_teachers": False}


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "KFP_RUN_ID", "CAMOPD_SCHEDULE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "x")  # so that what prepare sets for its process goes away with the test
        monkeypatch.delenv(name)


class Cluster:
    """Pipeline runs of the micro recipe on copies of its models, as far as a schedule sees them."""

    def __init__(self, output: str, models: Path, **settings: Any) -> None:
        self.store, self.models = Store(), models
        for name in ("domain", "general"):
            shutil.copytree(MICRO / name, models / name)
        self.form = {
            "output_uri": output,
            "student": str(models / "domain"),
            "branches.general.teacher": str(models / "general"),
        }
        for name in ("general", "domain"):  # a few prompts, for speed
            lines = (MICRO / "prompts" / f"{name}.jsonl").read_text().splitlines()[:20]
            (models / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
            self.form[f"branches.{name}.prompts"] = str(models / f"{name}.jsonl")
        self.form |= {"num_rounds": 2, "evaluate.curve_points": 0, **settings}
        self.output = output

    def tick(self, job: str, **schedule: Any) -> str:
        return workflow.resolve("micro", self.form, {**SCHEDULE, **schedule}, job=job, store=self.store)

    def prepare(self, job: str, schedule: str = "nightly") -> Plan:
        done = workflow.prepare("micro", self.form, job=job, schedule=schedule, store=self.store)
        return Plan.load(self.store, done.uri)

    def page(self, job: str, *, succeeded: bool = True) -> str:
        """What the exit handler says."""
        return workflow.outcome("micro", self.output, job=job, succeeded=succeeded, store=self.store)

    def recover(self, job: str, *, passed: bool = False) -> Plan:
        """A pipeline run, from its first task to its last."""
        assert self.tick(job) == "go"
        plan = self.prepare(job)
        self.finish(plan, passed=passed)
        self.page(job)
        return plan

    def finish(self, plan: Plan, *, passed: bool = False) -> None:
        for number in (1, 2):
            make_round(plan, self.store, number)
        make_evaluation(plan, self.store, passed=passed)
        if passed:
            promote.run(plan.run_uri, store=self.store, tracker=NullTracker())

    def fail(self, job: str, reason: str = "the card fell off the bus") -> None:
        """A pipeline run that goes on and fails in its first training."""
        assert self.tick(job) == "go"
        plan = self.prepare(job)
        with pytest.raises(TrackingError), self._training(plan):
            raise TrackingError(reason)
        self.page(job, succeeded=False)

    def _training(self, plan: Plan) -> Recorded:
        uri = checkpoint_uri(plan.rounds[0])
        return Recorded(plan.run_uri, stage="train", output_uri=uri, store=self.store, round_number=1)

    def change(self, name: str) -> None:
        """Another model in the same place."""
        path = self.models / name / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": uuid4().hex}))


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(str(tmp_path / "runs"), tmp_path / "models")


# --- Without a schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", ""])
def test_a_run_that_somebody_starts_always_goes_on(name: str) -> None:
    """Also with a recipe that is wrong: prepare says all of it."""
    assert workflow.resolve("no-such-recipe", {}, {**SCHEDULE, "schedule_name": name}, job="job-1") == "go"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "Nightly run"}, "schedule_name: 'Nightly run' cannot name"),
        ({"name": "a", "max_attempts": 0}, "set 1 or more"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Schedule(**values)


# --- New and known --------------------------------------------------------------------------------------------------------


def test_a_model_is_recovered_once_and_its_successor_again(cluster: Cluster) -> None:
    plan = cluster.recover("job-1", passed=True)
    assert cluster.tick("job-2") == "skip"
    page = cluster.page("job-2")
    assert page.startswith("## The recovery was not started")
    assert (
        f"skipped: nothing new since {cluster.models}/domain (content id {plan.content_ids['student']}, recovered on 20" in page
    )
    assert f"by run job-1 in {plan.run_uri}, registered as nothing (disabled" in page
    cluster.change("domain")
    assert cluster.tick("job-3") == "go"


def test_a_model_that_the_gate_refused_is_known_too(cluster: Cluster) -> None:
    cluster.recover("job-1", passed=False)
    assert cluster.tick("job-2") == "skip"
    assert "registered as nothing, for the gate said no" in cluster.page("job-2")


def test_other_settings_are_no_reason_to_recover_a_known_model_again(cluster: Cluster) -> None:
    cluster.recover("job-1")
    cluster.form["train.learning_rate"] = "3e-4"
    assert cluster.tick("job-2") == "skip"
    assert cluster.tick("job-3", schedule_name="weekly") == "go", "another schedule is another question"


def test_a_newer_teacher_is_a_reason_only_where_somebody_says_so(cluster: Cluster) -> None:
    assert cluster.tick("job-1", schedule_again_for_new_teachers=True) == "go"
    cluster.finish(cluster.prepare("job-1"))
    cluster.page("job-1")
    assert cluster.tick("job-2", schedule_again_for_new_teachers=True) == "skip"
    cluster.change("general")
    assert cluster.tick("job-3", schedule_again_for_new_teachers=True) == "go"
    assert cluster.tick("job-4") == "skip", "its model is at work"


def test_a_task_that_is_started_again_gets_the_same_answer(cluster: Cluster) -> None:
    assert cluster.tick("job-1") == "go"
    assert cluster.tick("job-1") == "go"
    cluster.finish(cluster.prepare("job-1"))
    cluster.page("job-1")
    assert cluster.tick("job-2") == "skip"
    assert cluster.tick("job-2") == "skip"


def test_what_cannot_be_found_fails_the_tick_and_costs_no_attempt(cluster: Cluster) -> None:
    shutil.move(cluster.models / "domain", cluster.models / "elsewhere")
    for number in range(5):
        with pytest.raises(InputError, match=r"nothing is there"):
            cluster.tick(f"job-{number}")
    page = cluster.page("job-4", succeeded=False)
    assert "failed in resolve" in page
    assert "nothing is there" in page
    shutil.move(cluster.models / "elsewhere", cluster.models / "domain")
    assert cluster.tick("job-9", schedule_max_attempts=1) == "go"


# --- Failed ---------------------------------------------------------------------------------------------------------------


def test_a_failed_model_is_tried_three_times_then_reported_once_and_left_alone(cluster: Cluster) -> None:
    for number in (1, 2, 3):
        cluster.fail(f"job-{number}")
    sentence = r"given up after 3 attempts on .*domain \(content id sha256:\w+\): train: the card fell off the bus"
    for _ in range(2):  # the task may be retried, which must not make it look well
        with pytest.raises(ScheduleError, match=sentence):
            cluster.tick("job-4")
    assert "given up after 3 attempts" in cluster.page("job-4", succeeded=False)
    for number in (5, 6):
        assert cluster.tick(f"job-{number}") == "skip"
        assert "given up after 3 attempts" in cluster.page(f"job-{number}")
    cluster.change("domain")
    assert cluster.tick("job-7") == "go"


def test_a_changed_wish_is_another_try(cluster: Cluster) -> None:
    """A setting that shapes no weights, as after a lack of memory: the run is the same, the attempts are new ones."""
    cluster.fail("job-1")
    with pytest.raises(ScheduleError, match="given up after 1 attempt on"):
        cluster.tick("job-2", schedule_max_attempts=1)
    cluster.form["rollout.batch_size"] = 2
    assert cluster.tick("job-3", schedule_max_attempts=1) == "go"


def test_the_more_attempts_are_allowed_later_the_more_are_made(cluster: Cluster) -> None:
    cluster.fail("job-1")
    with pytest.raises(ScheduleError):
        cluster.tick("job-2", schedule_max_attempts=1)
    assert cluster.tick("job-3", schedule_max_attempts=2) == "go"


def test_a_run_that_stopped_itself_is_not_tried_again(cluster: Cluster) -> None:
    """Seeds are the run's: it would stop at the same place, after the same hours."""
    assert cluster.tick("job-1") == "go"
    plan = cluster.prepare("job-1")
    record_stop(plan.run_uri, stage="train", round_number=1, reason="the loss is nan", store=cluster.store)
    cluster.page("job-1", succeeded=False)
    with pytest.raises(ScheduleError, match=r"given up after 1 attempt .*it stopped itself in round 1, train: the loss is nan"):
        cluster.tick("job-2")


def test_a_run_that_was_killed_before_its_first_word_counts(cluster: Cluster) -> None:
    assert cluster.tick("job-1") == "go"
    claims.release(claims_of(cluster), "job-1", cluster.store)
    with pytest.raises(ScheduleError, match="prepare left no word"):
        cluster.tick("job-2", schedule_max_attempts=1)
    assert cluster.tick("job-3") == "go"
    plan = cluster.prepare("job-3")
    cluster.page("job-3", succeeded=False)
    with pytest.raises(ScheduleError, match="run job-3 was cut off"):
        cluster.tick("job-4", schedule_max_attempts=2)
    cluster.finish(plan)
    assert cluster.tick("job-5") == "skip", "somebody has finished it by hand"
    assert "nothing new since" in cluster.page("job-5")


def claims_of(cluster: Cluster) -> str:
    (file,) = (file for file in cluster.store.list(f"{cluster.output}/claims") if file.name.endswith("000001.json"))
    return f"{cluster.output}/claims/{file.name.partition('/')[0]}"


# --- One model, one run ---------------------------------------------------------------------------------------------------


def test_while_a_run_is_at_work_others_are_told_so(cluster: Cluster) -> None:
    cluster.tick("job-1")
    plan = cluster.prepare("job-1")
    for schedule in ("nightly", "weekly"):
        assert cluster.tick("job-2", schedule_name=schedule) == "skip"
        assert "skipped: run job-1 has been at work on this model since 20" in cluster.page("job-2")
    assert workflow.begin(plan.rounds[0], job="job-1", store=cluster.store) == "go"
    assert "was at work" not in cluster.page("job-1", succeeded=False)
    assert cluster.tick("job-3") == "go", "the exit handler has given it back"


def test_who_starts_a_run_by_hand_takes_over_and_reads_so(cluster: Cluster) -> None:
    cluster.tick("job-1")
    cluster.prepare("job-1")
    plan = cluster.prepare("job-2", schedule="none")
    assert cluster.tick("job-3") == "skip"
    assert "run job-2 has been at work" in cluster.page("job-3")
    cluster.finish(plan)
    assert "**Beside it:** run job-1 was at work on this model, and goes on" in cluster.page("job-2")
    assert workflow.begin(plan.rounds[1], job="job-1", store=cluster.store) == "done"
    assert "run job-1 has been at work" in (cluster.tick("job-4"), cluster.page("job-4"))[1]


def test_a_run_without_an_exit_handler_keeps_the_model_until_its_claim_dies(cluster: Cluster, monkeypatch) -> None:
    cluster.tick("job-1")
    cluster.prepare("job-1")
    assert cluster.tick("job-2") == "skip"
    monkeypatch.setattr(claims, "CLAIM_HOURS", 0.0)
    assert cluster.tick("job-3") == "go"


def _tick(output: str, student: str, name: str, job: str, start: Any, told: Any) -> None:
    form = {"output_uri": output, "student": student, "num_rounds": 2, "evaluate.curve_points": 0}
    start.wait()
    told.put((job, workflow.resolve("micro", form, {**SCHEDULE, "schedule_name": name}, job=job)))


@pytest.mark.slow
def test_of_the_ticks_of_several_schedules_at_once_one_goes_on(s3_prefix: str, s3_server) -> None:
    """Six processes, an S3 server, one model by six schedules; then again, with what the first has left behind."""
    student = f"{s3_prefix}/models/domain"
    for path in (MICRO / "domain").iterdir():
        bucket, _, key = student.removeprefix("s3://").partition("/")
        s3_server.client().upload_file(str(path), bucket, f"{key}/{path.name}")
    spawn = multiprocessing.get_context("spawn")
    for turn in range(2):
        start, told = spawn.Barrier(6), spawn.Queue()
        names = [f"schedule-{number}" for number in range(6)]
        processes = [
            spawn.Process(target=_tick, args=(f"{s3_prefix}/runs", student, name, f"job-{turn}-{name}", start, told))
            for name in names
        ]
        for process in processes:
            process.start()
        answers = dict(told.get(timeout=120) for _ in processes)
        for process in processes:
            process.join()
        (winner,) = (job for job, answer in answers.items() if answer == "go")
        for job in answers.keys() - {winner}:
            assert winner in json.loads(Store().read(job_place(f"{s3_prefix}/runs", job)))["skipped"]
        attempts = [file.name for file in Store().list(f"{s3_prefix}/runs/schedules") if "/attempts/" in file.name]
        assert len(attempts) == turn + 1
        workflow.outcome("micro", f"{s3_prefix}/runs", job=winner, succeeded=False, store=Store())


# --- A registry and its tracking ------------------------------------------------------------------------------------------


Registered = Callable[[str], int]


@pytest.mark.slow
def test_a_schedule_follows_an_alias_and_has_one_run_in_mlflow(
    cluster: Cluster, mlflow_server: str, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"icd-{uuid4().hex[:8]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    store = cluster.store

    def add(name: str) -> None:
        place = join(s3_prefix, name)
        write = lambda folder: shutil.copytree(cluster.models / "domain", folder, dirs_exist_ok=True) and {}  # noqa: E731
        store.produce(place, stage="train", config={}, inputs={}, write=write)
        version = register(mlflow_server, model, place)
        client(mlflow_server).set_registered_model_alias(model, "latest-tuned", str(version))

    cluster.form |= {"student": f"models:/{model}@latest-tuned", "tracking.experiment": model}
    add("one")
    plan = cluster.recover("job-1")
    assert plan.recipe.sources == {"student": f"models:/{model}/1"}
    add("same")  # version 2 holds what version 1 does
    assert cluster.tick("job-2") == "skip"
    assert "nothing new since version 1 (content id" in cluster.page("job-2")
    cluster.change("domain")
    add("two")
    cluster.fail("job-3")
    with pytest.raises(ScheduleError, match="given up after 1 attempt on version 3"):
        cluster.tick("job-4", schedule_max_attempts=1)

    experiment = client(mlflow_server).get_experiment_by_name(model).experiment_id
    runs = client(mlflow_server).search_runs([experiment])
    (schedule,) = (run for run in runs if run.info.run_name == "schedule nightly")
    assert len(runs) == 3, "the schedule's run, and one a recovery"
    assert schedule.data.tags["camopd.version"] == "version 3"
    assert schedule.data.tags["camopd.status"].startswith("given up after 1 attempt")
    assert schedule.data.tags["camopd.content_id"].startswith("sha256:")
    assert "T" in schedule.data.tags["camopd.last_tick"]
    assert schedule.info.status == "FAILED"
    series = {name: len(client(mlflow_server).get_metric_history(schedule.info.run_id, name)) for name in schedule.data.metrics}
    assert series == {"ticks/new": 2, "ticks/skipped": 1, "ticks/gave-up": 1}
    assert {run.data.tags.get("camopd.schedule") for run in runs} == {"nightly"}


def test_what_a_recovery_has_promoted_is_not_recovered_again(cluster: Cluster, mlflow_sqlite: str, tmp_path: Path) -> None:
    """The alias that a schedule follows may be the one that recoveries move: it would go round for ever."""
    earlier, model = finish(str(tmp_path / "earlier"), cluster.store, mlflow_sqlite, MICRO / "domain")
    cluster.form |= {"student": f"models:/{model}@champion", "tracking.uri": mlflow_sqlite}
    assert cluster.tick("job-1") == "skip"
    assert f"is what the recovery {earlier.run_uri.rpartition('/')[2]} made" in cluster.page("job-1")
    plan = cluster.prepare("job-2", schedule="none")  # who wants it all the same starts it by hand
    assert plan.recipe.sources == {"student": f"models:/{model}/1"}
    assert plan.recipe.student.endswith("/model"), "the export, whose files MLflow loads as well"


@pytest.mark.slow
def test_prepare_takes_the_version_that_the_tick_has_found(
    cluster: Cluster, mlflow_sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alias has moved between the two."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_sqlite)
    shutil.copytree(cluster.models / "domain", cluster.models / "next")
    for name in ("domain", "next"):
        register(mlflow_sqlite, "icd", (cluster.models / name).as_uri())
    client(mlflow_sqlite).set_registered_model_alias("icd", "tuned", "1")
    cluster.form["student"] = "models:/icd@tuned"
    assert cluster.tick("job-1") == "go"
    client(mlflow_sqlite).set_registered_model_alias("icd", "tuned", "2")
    assert cluster.prepare("job-1").recipe.sources == {"student": "models:/icd/1"}
    assert cluster.prepare("job-2", schedule="none").recipe.sources == {"student": "models:/icd/2"}


@pytest.mark.slow
def test_an_outage_of_the_registry_fails_the_tick_and_one_of_tracking_alone_does_not(
    cluster: Cluster, mlflow_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_proxy.uri)
    mlflow_proxy.mode = "down"
    assert cluster.tick("job-1") == "go", "its student is a folder"
    cluster.form["student"] = "models:/icd@tuned"
    with pytest.raises(InputError, match=r"input_domain_model_uri|student: .*does not answer as it should"):
        cluster.tick("job-2")
