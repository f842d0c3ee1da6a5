"""`camopd gc` on folders and on a real S3 server, against a real MLflow: what is gone afterwards, and what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from camopd import collect, rounds
from camopd import plan as layout
from camopd.cli import app
from camopd.collect import look, old_jobs, references_of, sweep
from camopd.errors import CamopdError, StoreError
from camopd.evaluate import evaluation_uri
from camopd.outcome import describe, result_of
from camopd.past import known, record_uri
from camopd.plan import Plan
from camopd.promote import release_uri
from camopd.retention import DAY, Policy, decide
from camopd.store import Store, join
from camopd.store.s3 import S3Backend
from camopd.tracking import logbook
from camopd.tracking.references import normalised
from tests.finished import make_plan, make_round, make_run
from tests.fixtures.s3_gateway import Answer, Gateway, gateway_to

EAGER = Policy(older_than=0)


def age(folder: Path, days: float = 40) -> None:
    """Make every file below a folder as old as that."""
    then = time.time() - days * DAY
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def make_released(output: str, store: Store, *, seed: int = 0, version: int | None = None) -> Plan:
    plan = make_run(output, store, seed=seed)
    release = {"status": "promoted", "model_name": "icd", "version": version, "alias": "champion", "reasons": []}
    place = join(release_uri(plan, store), "release.json")
    store.write(place, json.dumps(release | {"checkpoint_uri": layout.checkpoint_uri(plan.rounds[-1])}).encode())
    return plan


def collected(output: str, store: Store, policy: Policy = EAGER, *, later: float = 40 * DAY) -> list[str]:
    """Decide and sweep as it would be done so much later."""
    now = time.time() + later
    found = look(output, store, now)
    verdicts = decide(found.runs, references_of(found.runs), policy, now)
    done = list(sweep(found, verdicts, old_jobs(found, policy, now), store))
    assert not [one.problem for one in done if one.problem]
    return [one.what for one in done]


def names(uri: str, store: Store) -> set[str]:
    return {file.name for file in store.sweeper(uri).survey(uri)}


def rounds_below(uri: str, store: Store) -> set[str]:
    return {name for name in names(uri, store) if name.startswith("rounds/")}


@pytest.fixture(params=["folder", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return join(request.getfixturevalue("s3_prefix"), "runs") if request.param == "s3" else str(tmp_path / "runs")


# --- A finished run -------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_the_same_run_afterwards(output: str) -> None:
    store = Store()
    plan = make_released(output, store)
    store.write(join(output, "README.txt"), b"of somebody")
    whole, evaluated, released = names(plan.run_uri, store), evaluation_uri(plan, store), release_uri(plan, store)
    told = [(entry.key, entry.content_id) for entry in logbook.entries(plan, store)]
    ids = [store.require(layout.checkpoint_uri(uri)).content_id for uri in plan.rounds]
    removed = collected(output, store)
    first = plan.rounds[0]
    assert sorted(removed) == sorted(
        [join(uri, name) for uri in plan.rounds for name in ("rollout", "score-general", "score-domain", "select")]
        + [layout.checkpoint_uri(first)]
    )
    left = names(plan.run_uri, store)
    assert whole - left == {n for n in whole if n.startswith("rounds/") and not n.startswith("rounds/0002/train/")}
    assert left - whole == {record_uri(uri).removeprefix(f"{plan.run_uri}/") for uri in removed}
    assert store.read(join(output, "README.txt")) == b"of somebody"
    # What is left says the same of the run as all of it did.
    assert [rounds.begin(uri, store=store) for uri in plan.rounds] == ["done", "done"]
    assert (evaluation_uri(plan, store), release_uri(plan, store)) == (evaluated, released)
    assert result_of(plan, store) is not None
    assert "finished: **2 of 2" in describe(plan.run_uri, succeeded=True, store=store).replace(
        "Rounds finished:** ", "finished: **"
    )
    assert [(entry.key, entry.content_id) for entry in logbook.entries(plan, store)] == told
    assert [known(layout.checkpoint_uri(uri), store).content_id for uri in plan.rounds] == ids  # type: ignore[union-attr]
    assert collected(output, store) == []  # and there is nothing more to do


def test_more_rounds_after_a_removal_begin_where_it_ended(tmp_path) -> None:
    store = Store()
    plan = make_released(str(tmp_path), store)
    collected(str(tmp_path), store)
    settings = json.loads(store.read(join(plan.run_uri, "recipe.json")))
    store.write(join(plan.run_uri, "recipe.json"), json.dumps(settings | {"num_rounds": 3}).encode())
    longer = Plan.load(store, plan.run_uri)
    assert [rounds.begin(uri, store=store) for uri in longer.rounds] == ["done", "done", "go"]
    assert result_of(longer, store) is None
    (run,) = look(str(tmp_path), store, time.time() + 40 * DAY).runs
    assert decide([run], [], EAGER, time.time() + 40 * DAY)[0].state == "unfinished"


def test_more_rounds_without_a_checkpoint_are_an_error_that_says_so(tmp_path) -> None:
    store = Store()
    plan = make_released(str(tmp_path), store)
    collected(str(tmp_path), store, Policy(older_than=0, checkpoints="none"))
    assert [rounds.begin(uri, store=store) for uri in plan.rounds] == ["done", "done"]
    assert result_of(plan, store) is not None
    settings = json.loads(store.read(join(plan.run_uri, "recipe.json")))
    store.write(join(plan.run_uri, "recipe.json"), json.dumps(settings | {"num_rounds": 3}).encode())
    with pytest.raises(StoreError, match=r"rounds/0002/train was removed by `camopd gc`, and its files are needed"):
        rounds.begin(layout.round_uri(plan.run_uri, 3), store=store)


def test_a_teacher_of_another_run_stays(tmp_path) -> None:
    store = Store()
    plan = make_released(str(tmp_path), store)
    make_plan(str(tmp_path), store, seed=1, student=layout.checkpoint_uri(plan.rounds[0]))
    removed = collected(str(tmp_path), store)
    assert layout.checkpoint_uri(plan.rounds[0]) not in removed
    assert layout.rollout_uri(plan.rounds[0]) in removed


# --- Killed, raced, refused -----------------------------------------------------------------------------------------------


def test_killed_at_any_moment_the_next_one_ends_with_the_same(tmp_path, monkeypatch) -> None:
    """Whatever was removed last before the kill: no half of a prefix counts, and the next call leaves what one alone leaves."""

    class Killed(BaseException):
        pass

    store = Store()
    make_released(str(tmp_path / "whole"), store)
    collected(str(tmp_path / "whole"), store)
    (alone,) = (tmp_path / "whole").iterdir()
    for moment in range(1, 30):
        output = tmp_path / str(moment)
        plan = make_released(str(output), store)
        steps = iter(range(moment))
        real = Path.unlink

        def unlink(path: Path, missing_ok: bool = False, steps=steps, real=real) -> None:
            if str(path).startswith(str(tmp_path)) and ".camopd-" not in path.name and next(steps, None) is None:
                raise Killed
            real(path, missing_ok=missing_ok)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", unlink)
            try:
                collected(str(output), store)
                finished = True
            except Killed:
                finished = False
        for uri in (join(plan.run_uri, unit) for unit in ("rounds/0001/rollout", "rounds/0001/train", "rounds/0002/select")):
            if store.manifest(uri) is not None:
                assert store.verify(uri, deep=True) == []
            assert known(uri, store) is not None
        collected(str(output), store)
        assert rounds_below(plan.run_uri, store) == rounds_below(str(alone), store)
        if finished:
            break
    assert moment > 18, "it was killed before each file"


def test_a_run_that_starts_in_between_is_left_alone(output: str) -> None:
    store = Store()
    plan, other = make_released(output, store), make_released(output, store, seed=1)
    now = time.time() + 40 * DAY
    found = look(output, store, now)
    verdicts = decide(found.runs, [], EAGER, now)
    store.write(join(plan.run_uri, "recipe.json"), store.read(join(plan.run_uri, "recipe.json")) + b"\n")
    before = names(plan.run_uri, store)
    done = list(sweep(found, verdicts, [], store))
    assert [one.what for one in done if one.problem] == [plan.run_uri]
    assert names(plan.run_uri, store) == before
    assert store.manifest(layout.rollout_uri(other.rounds[0])) is None


def test_a_stranger_who_comes_in_between_is_left_alone(tmp_path) -> None:
    store = Store()
    plan = make_released(str(tmp_path), store)
    now = time.time() + 40 * DAY
    found = look(str(tmp_path), store, now)
    verdicts = decide(found.runs, [], EAGER, now)
    Path(layout.rollout_uri(plan.rounds[0]), "mine.txt").write_text("mine")
    list(sweep(found, verdicts, [], store))
    assert Path(layout.rollout_uri(plan.rounds[0]), "mine.txt").read_text() == "mine"
    assert store.manifest(layout.rollout_uri(plan.rounds[0])) is not None


def test_a_linked_folder_is_somebody_elses(tmp_path) -> None:
    """What a link leads to is neither looked at nor removed, as a run or below one."""
    store, outside = Store(), tmp_path / "outside"
    elsewhere = make_released(str(outside), store)
    plan = make_plan(str(tmp_path / "runs"), store, seed=1)
    make_round(plan, store, 1)
    rollout = Path(layout.rollout_uri(plan.rounds[0]))
    (rollout / "linked").symlink_to(layout.rollout_uri(elsewhere.rounds[0]))
    (tmp_path / "runs" / "linked-0123456789ab").symlink_to(elsewhere.run_uri)
    before = names(str(outside), store)
    now = time.time() + 40 * DAY
    found = look(str(tmp_path / "runs"), store, now)
    (verdict,) = decide(found.runs, [], Policy(older_than=0, whole_runs=True), now)
    assert verdict.keeps == ("holds what is not ours: rounds/0001/rollout/linked",)
    assert found.others == ("linked-0123456789ab",)
    (rollout / "linked").unlink()
    collected(str(tmp_path / "runs"), store, Policy(older_than=0, whole_runs=True))
    assert not Path(plan.run_uri).exists()
    assert names(str(outside), store) == before


def test_without_permission_there_is_a_sentence_and_everything_is_there(s3_prefix: str, s3_server) -> None:
    store = Store()
    output = join(s3_prefix, "runs")
    plan = make_released(output, store)
    before = names(plan.run_uri, store)

    def refuse(request) -> Answer | None:
        is_removal = request.method == "DELETE" or (request.method == "POST" and "delete" in request.query)
        return Answer.error(403, "AccessDenied") if is_removal else None

    with gateway_to(s3_server) as gateway:
        gateway.before = refuse
        refused = store_by(gateway)
        with pytest.raises(StoreError, match=r"these credentials may not delete there; they need s3:DeleteObject"):
            collected(output, refused)
    left = names(plan.run_uri, store)
    assert before <= left
    assert all(not store.verify(join(plan.run_uri, unit)) for unit in ("rounds/0001/rollout", "rounds/0001/train"))


def store_by(gateway: Gateway) -> Store:
    from camopd.store.s3 import s3_client

    before = os.environ["AWS_ENDPOINT_URL_S3"]
    os.environ["AWS_ENDPOINT_URL_S3"] = gateway.endpoint
    try:
        return Store(s3=S3Backend(s3_client()))
    finally:
        os.environ["AWS_ENDPOINT_URL_S3"] = before


@pytest.mark.parametrize("takes_many", [True, False])
def test_many_objects_go_in_batches_or_one_by_one(s3_prefix: str, s3_server, takes_many: bool) -> None:
    store, uri = Store(), join(s3_prefix, "many")
    for number in range(7):
        store.write(join(uri, f"{number}.txt"), b"x")
    with gateway_to(s3_server) as gateway:
        if not takes_many:
            gateway.before = lambda r: Answer.error(400, "MissingContentMD5") if r.method == "POST" else None
        sweeper = store_by(gateway).sweeper(uri)
        sweeper.remove(uri, [f"{number}.txt" for number in range(6)])
        sweeper.remove(uri, [f"{number}.txt" for number in range(6)])  # absent ones do no harm
        asked = [request.method for request in gateway.requests]
    assert names(uri, store) == {"6.txt"}
    assert asked == (["POST", "POST"] if takes_many else ["POST", *(12 * ["DELETE"])])


# --- Whole runs, jobs, uploads --------------------------------------------------------------------------------------------


def test_an_abandoned_run_goes_as_a_whole(output: str) -> None:
    store = Store()
    plan = make_plan(output, store)
    make_round(plan, store, 1)
    kept = make_released(output, store, seed=1)
    store.write(join(output, "jobs", "kfp-1.json"), b"{}")
    before = names(kept.run_uri, store)
    assert collected(output, store, Policy(older_than=90 * DAY, whole_runs=True)) == []
    removed = collected(output, store, Policy(older_than=30 * DAY, keep_last=0, whole_runs=True))
    assert plan.run_uri in removed
    assert names(plan.run_uri, store) == set()
    assert "1 records of pipeline runs in jobs/" in removed
    assert not Path(plan.run_uri).exists()
    assert store.stat(join(output, "jobs", "kfp-1.json")) is None
    left = names(kept.run_uri, store)
    assert {name for name in before if not name.startswith("rounds/")} <= left


def test_parts_of_uploads_that_nobody_ended(s3_prefix: str, s3_server) -> None:
    store, output = Store(), join(s3_prefix, "runs")
    plan = make_released(output, store)
    bucket, _, prefix = output.removeprefix("s3://").partition("/")
    run = plan.run_uri.removeprefix(f"s3://{bucket}/")
    client = s3_server.client()
    ours = client.create_multipart_upload(Bucket=bucket, Key=f"{run}/rounds/0002/train/model.safetensors")
    client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/of-somebody/x.bin")
    assert look(output, store, time.time()).uploads == ()
    (upload,) = look(output, store, time.time() + 2 * DAY).uploads
    assert upload.id == ours["UploadId"]
    collected(output, store)
    left = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
    assert [one["Key"] for one in left] == [f"{prefix}/of-somebody/x.bin"]


@pytest.mark.parametrize("recipe", [b"{", b"[]", b'{"num_rounds": 2}', b'{"num_rounds": "two", "student": "x"}'])
def test_a_recipe_that_is_not_understood_means_that_all_stays(tmp_path, recipe: bytes) -> None:
    store = Store()
    plan = make_released(str(tmp_path), store)
    store.write(join(plan.run_uri, "recipe.json"), recipe)
    before = names(plan.run_uri, store)
    assert collected(str(tmp_path), store, Policy(older_than=0, whole_runs=True)) == []
    assert names(plan.run_uri, store) == before


def test_a_run_or_nothing_is_no_output(tmp_path) -> None:
    store = Store()
    plan = make_released(str(tmp_path), store)
    with pytest.raises(StoreError, match="is a run; give the folder above it"):
        look(plan.run_uri, store, time.time())
    with pytest.raises(StoreError, match="nothing is there"):
        look(str(tmp_path / "elsewhere"), store, time.time())


# --- The registry ---------------------------------------------------------------------------------------------------------


def gc(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["gc", *arguments])
    said = str(done.exception) if isinstance(done.exception, CamopdError) else ""
    return done.exit_code, done.output + said


def test_what_a_version_of_any_model_names_in_a_tag_stays(tmp_path, mlflow_server: str, monkeypatch) -> None:
    """A server takes no folder as a source: there the tag says where the checkpoint is."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    store, output = Store(), tmp_path / "a folder"
    plan = make_released(str(output), store)
    age(output)
    client, model = MlflowClient(mlflow_server), f"gc-{time.time_ns()}"
    client.create_registered_model(model)
    client.create_model_version(
        model, "s3://elsewhere/x", tags={"camopd.checkpoint_uri": layout.checkpoint_uri(plan.rounds[0])}
    )
    code, said = gc(str(output), "--json")
    assert code == 0, said
    (run,) = json.loads(said)["runs"]
    went = {unit["name"] for unit in run["goes"]}
    assert "rounds/0001/train" not in went
    assert "rounds/0001/rollout" in went
    assert f"rounds/0001/train is needed by version 1 of {model}" in run["keeps"]
    assert json.loads(said)["registry"] == "asked"


def test_sources_on_s3_and_of_files(s3_prefix: str, mlflow_sqlite: str, monkeypatch, tmp_path) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_sqlite)
    client = MlflowClient(mlflow_sqlite)
    client.create_registered_model("icd")
    store = Store()
    for output in (join(s3_prefix, "runs"), str(tmp_path / "a folder")):
        plan = make_released(output, store)
        place = layout.checkpoint_uri(plan.rounds[0])
        client.create_model_version("icd", place if place.startswith("s3://") else Path(place).as_uri())
        now = time.time() + 40 * DAY
        found = look(output, store, now)
        (verdict,) = decide(found.runs, collect.references_in_registry(found.runs), EAGER, now)
        assert "rounds/0001/train" not in [unit.name for unit in verdict.removes]
        assert "rounds/0001/rollout" in [unit.name for unit in verdict.removes]


def test_a_registry_that_is_not_known_or_does_not_answer_means_that_nothing_goes(tmp_path, monkeypatch) -> None:
    store = Store()
    plan = make_released(str(tmp_path), store, version=3)
    age(tmp_path)
    before = names(plan.run_uri, store)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, said = gc(str(tmp_path))
    assert code == 0
    assert "Nothing can be removed now: nobody knows which registry may refer to these runs: set MLFLOW_TRACKING_URI" in said
    assert gc(str(tmp_path), "--delete")[0] == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, said = gc(str(tmp_path), "--delete")
    assert code == 1
    assert "http://127.0.0.1:9 does not answer" in said
    assert names(plan.run_uri, store) == before
    code, said = gc(str(tmp_path), "--delete", "--no-registry", "--checkpoints", "none")
    assert code == 0
    # Without a registry the run's own word counts: version 3 was made of this checkpoint.
    assert store.manifest(layout.checkpoint_uri(plan.rounds[-1])) is not None
    assert store.manifest(layout.checkpoint_uri(plan.rounds[0])) is None


# --- The command ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_and_removes_nothing(tmp_path, mlflow_sqlite: str, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_sqlite)
    store, output = Store(), tmp_path / "runs"
    plan = make_released(str(output), store)
    (output / "README.txt").write_text("of somebody")
    age(output)
    before = names(str(output), store)
    code, said = gc(str(output))
    assert code == 0
    name = plan.run_uri.rpartition("/")[2]
    assert said.splitlines()[0].split() == ["run", "age", "state", "would", "go", "bytes"]
    assert f"{name}  40 d  finished  8 tables, 1 checkpoint" in said
    assert "    stays: the last checkpoint and what further rounds need (--checkpoints none removes it)" in said
    assert "No runs, and left alone: README.txt" in said
    assert said.splitlines()[-1] == "Nothing was removed. The same with --delete does it."
    assert names(str(output), store) == before
    code, said = gc(str(output), "--delete")
    assert code == 0
    assert f"removed {join(plan.run_uri, 'rounds/0001/train')} (" in said
    assert store.manifest(layout.checkpoint_uri(plan.rounds[0])) is None
    assert gc(str(output), "--delete") == (0, "Nothing to remove.\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--older-than", "soon"), "write a number and m, h, d or w"), (("--checkpoints", "some"), "write last or none")],
)
def test_bad_options(tmp_path, arguments, words) -> None:
    code, said = gc(str(tmp_path), *arguments)
    assert code == 2
    assert words in " ".join(said.split())


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from camopd.cli import retention; print([m for m in ('boto3', 'mlflow', 'torch') if m in sys.modules])"
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3://b/x/", "s3://b/x"),
        ("S3A://b/x", "s3://b/x"),
        ("file:///a%20b/c/", "/a b/c"),
        ("runs:/123/checkpoint", ""),
        ("0.98", ""),
        ("", ""),
    ],
)
def test_locations_are_compared_in_one_form(text: str, place: str) -> None:
    assert normalised(text) == place


def test_places_through_links_are_the_same_place(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert normalised(str(tmp_path / "link" / "x")) == normalised((tmp_path / "real" / "x").as_uri())


@pytest.mark.parametrize("allowed", [0, 1, 2, 3, 8])
def test_broken_off_on_s3_the_next_one_goes_on(s3_prefix: str, s3_server, monkeypatch, allowed: int) -> None:
    store, output = Store(), join(s3_prefix, "runs")
    plan = make_released(output, store)
    ids = [store.require(layout.checkpoint_uri(uri)).content_id for uri in plan.rounds]
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    removals = iter(range(allowed))

    def fail_later(request) -> Answer | None:
        is_removal = request.method == "DELETE" or (request.method == "POST" and "delete" in request.query)
        return Answer.error(503, "SlowDown") if is_removal and next(removals, None) is None else None

    with gateway_to(s3_server) as gateway:
        gateway.before = fail_later
        with pytest.raises(StoreError, match="overloaded or failing"):
            collected(output, store_by(gateway))
    for uri in plan.rounds:
        for name in ("rollout", "select", "train"):
            place = join(uri, name)
            assert store.manifest(place) is None or store.verify(place, deep=True) == []
            assert known(place, store) is not None
    collected(output, store)
    left = rounds_below(plan.run_uri, store)
    assert {name for name in left if "/collected/" not in name} == {n for n in left if n.startswith("rounds/0002/train/")}
    assert [known(layout.checkpoint_uri(uri), store).content_id for uri in plan.rounds] == ids  # type: ignore[union-attr]
