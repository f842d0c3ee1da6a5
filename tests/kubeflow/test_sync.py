"""`camopd sync`: what a file says becomes true on a KFP API server with state, and stays so."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from camopd.cli import app
from camopd.errors import CamopdError, InputError
from camopd.kubeflow import schedules, sync
from camopd.kubeflow.client import ApiError, connect
from camopd.store import Store
from tests.fixtures.kfp_api import KfpApi
from tests.fixtures.kfp_rules import Refused

ENTRY = {
    "name": "icd-coder",
    "cron": "0 0 2 * * *",
    "follow": "models:/icd-coder@latest-tuned",
    "recipe": "micro",
    "parameters": {"output_uri": "s3://models/runs", "method_num_rounds": 4, "output_promote": False},
}
OTHER = {**ENTRY, "name": "legal", "follow": "s3://models/legal", "max_attempts": 5, "again_for_new_teachers": True}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "SETTLE_SECONDS", 0.0)
    for name in ("KFP_HOST", "KFP_TOKEN", "KFP_TOKEN_FILE", "KFP_COOKIES", "KFP_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)


class Site:
    """A file of schedules and a server."""

    def __init__(self, api: KfpApi, folder: Path, **values: Any) -> None:
        self.api, self.path = api, folder / "schedules.json"
        self.values: dict[str, Any] = {"owner": "team/camopd", "schedules": [ENTRY, OTHER], **values}

    def write(self, **values: Any) -> Path:
        self.values |= values
        self.path.write_text(json.dumps(self.values))
        return self.path

    def sync(self, dry_run: bool = False, **values: Any) -> str:
        said: list[str] = []
        file = schedules.read(self.write(**values))
        changed = sync.sync(connect(self.api.host, file.namespace), file, store=Store(), say=said.append, dry_run=dry_run)
        text = "\n".join(said)
        assert changed != ("Nothing to do" in text)
        return text

    def change(self, name: str, **values: Any) -> str:
        entries = [{**each, **values} if each["name"] == name else each for each in self.values["schedules"]]
        return self.sync(schedules=entries)

    def on(self) -> dict[str, dict[str, Any]]:
        """The recurring runs that fire, by schedule. Fails where one has two."""
        found = [each for each in self.api.recurring.values() if each["status"] == "ENABLED"]
        names = [re.findall(r"schedule (\S+),", each["description"])[0] for each in found]
        assert len(set(names)) == len(names)
        return dict(zip(names, found, strict=True))


@pytest.fixture
def site(kfp: KfpApi, tmp_path: Path) -> Site:
    return Site(kfp, tmp_path)


# --- What it makes --------------------------------------------------------------------------------------------------------


def test_each_schedule_becomes_a_recurring_run_with_everything_it_needs(site: Site) -> None:
    text = site.sync(service_account="camopd-runner", experiment="nightly")
    icd, legal = site.on()["icd-coder"], site.on()["legal"]
    assert icd["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * *"}}
    assert (icd["max_concurrency"], icd["no_catchup"], icd["service_account"]) == ("1", True, "camopd-runner")
    assert site.api.experiments[icd["experiment_id"]]["display_name"] == "nightly"
    (version,) = site.api.versions
    assert icd["pipeline_version_reference"]["pipeline_version_id"] == version
    parameters = icd["runtime_config"]["parameters"]
    assert 'name = "micro"' in parameters.pop("input_recipe")
    assert parameters == {
        "input_domain_model_uri": "models:/icd-coder@latest-tuned",
        "method_num_rounds": "4",
        "output_promote": False,
        "output_uri": "s3://models/runs",
        "schedule_again_for_new_teachers": False,
        "schedule_max_attempts": 3,
        "schedule_name": "icd-coder",
    }
    told = legal["runtime_config"]["parameters"]
    assert (told["schedule_max_attempts"], told["schedule_again_for_new_teachers"]) == (5, True)
    assert "Kept by camopd sync for team/camopd: schedule icd-coder, wish " in icd["description"]
    assert icd["display_name"].startswith("camopd-icd-coder-")
    assert re.search(
        r"'0 0 2 \* \* \*' fires next at (20\d\d-\d\d-\d\d 02:00:00, ){2}20\d\d-\d\d-\d\d 02:00:00 \(UTC, unless", text
    )
    run = site.api.tick(icd["recurring_run_id"])
    assert site.api.runs[run]["runtime_config"]["parameters"]["schedule_name"] == "icd-coder"


def test_a_second_time_it_changes_nothing_and_says_so(site: Site) -> None:
    site.sync()
    before = json.dumps([site.api.recurring, site.api.versions, site.api.experiments], default=str)
    posted = len(site.api.bodies)
    assert site.sync().endswith("Nothing to do: pipeline and 2 schedules are as the file says.")
    assert json.dumps([site.api.recurring, site.api.versions, site.api.experiments], default=str) == before
    assert len(site.api.bodies) == posted


def test_the_pools_of_the_file_are_in_the_pipeline(site: Site) -> None:
    pools = {"inference": {"accelerator": "nvidia.com/gpu", "count": 2, "memory": "64Gi"}}
    site.sync(pools=pools, schedules=[])
    (version,) = site.api.versions.values()
    spec = version["pipeline_spec"]
    containers = spec.get("pipeline_spec", spec)["deploymentSpec"]["executors"]
    assert containers["exec-rollout"]["container"]["resources"]["accelerator"]["resourceCount"] == "2"
    with pytest.raises(CamopdError, match="accelerator and count belong together"):
        site.sync(pools={"inference": {"accelerator": "nvidia.com/gpu"}})


def test_pages_of_other_people_s_schedules_are_read_and_left_alone(site: Site) -> None:
    site.sync(schedules=[ENTRY])
    (ours,) = site.api.recurring.values()
    for number in range(450):
        other = {**ours, "recurring_run_id": f"other-{number}", "description": "by hand"}
        site.api.recurring[f"other-{number}"] = other
    site.api.recurring["another-release"] = {
        **ours, "recurring_run_id": "another-release",
        "description": ours["description"].replace("team/camopd", "team/camopd2"),
    }  # fmt: skip
    assert "Nothing to do" in site.sync()
    site.sync(schedules=[])
    assert len(site.api.recurring) == 451
    assert all(each["status"] == "ENABLED" for each in site.api.recurring.values())


# --- What changes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"cron": "0 30 2 * * *"},
        {"follow": "models:/icd-coder#stage=ready"},
        {"max_attempts": 1},
        {"again_for_new_teachers": True},
        {"parameters": {"output_uri": "s3://models/runs", "method_seed": 7}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_wish_is_a_new_recurring_run_and_the_old_one_goes(site: Site, change: dict[str, Any]) -> None:
    site.sync()
    before = site.on()
    site.api.asked.clear()
    text = site.change("icd-coder", **change)
    assert "schedule icd-coder: is created, since its wish has changed" in text
    after = site.on()
    assert after["icd-coder"]["recurring_run_id"] != before["icd-coder"]["recurring_run_id"]
    assert after["legal"] == before["legal"]
    assert len(site.api.recurring) == 2
    verbs = [path.rpartition(":")[2] if ":" in path else method for method, path in site.api.asked if "recurringruns" in path]
    order = [verb for verb in verbs if verb in ("POST", "disable", "DELETE")]
    assert order == ["POST", "disable", "DELETE"], "never a moment without one"


def test_while_a_run_is_in_flight_the_old_one_is_off_and_stays(site: Site) -> None:
    site.sync()
    old = site.on()["icd-coder"]["recurring_run_id"]
    run = site.api.tick(old)
    text = site.change("icd-coder", cron="0 0 3 * * *")
    assert f"the old one is off; it stays until its run {run} has ended" in text
    assert site.api.recurring[old]["status"] == "DISABLED"
    assert site.on()["icd-coder"]["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
    assert old in site.api.recurring
    site.sync()
    assert old in site.api.recurring
    site.api.tell(run, "SUCCEEDED")
    assert "schedule icd-coder: is retired" in site.sync()
    assert old not in site.api.recurring
    assert "Nothing to do" in site.sync()


@pytest.mark.parametrize("how", ["vanished", "switched off"])
def test_a_schedule_that_is_no_more_wanted_goes(site: Site, how: str) -> None:
    site.sync()
    text = site.sync(schedules=[OTHER]) if how == "vanished" else site.change("icd-coder", enabled=False)
    assert "schedule icd-coder: is retired, since the file has it no more, or switches it off" in text
    assert list(site.on()) == ["legal"]
    assert len(site.api.recurring) == 1


def test_a_wish_that_comes_back_finds_its_recurring_run_again(site: Site) -> None:
    site.sync()
    old = site.on()["icd-coder"]["recurring_run_id"]
    site.api.tick(old)
    site.change("icd-coder", cron="0 0 3 * * *")
    site.change("icd-coder", cron=ENTRY["cron"])
    assert site.on()["icd-coder"]["recurring_run_id"] == old


def test_another_pipeline_is_another_version_and_every_schedule_follows(site: Site) -> None:
    site.sync()
    first = site.on()["legal"]["pipeline_version_reference"]["pipeline_version_id"]
    text = site.sync(pools={"cpu": {"memory": "2Gi"}})
    assert "is uploaded" in text
    assert len(site.api.versions) == 2
    assert all(each["pipeline_version_reference"]["pipeline_version_id"] != first for each in site.api.recurring.values())


# --- Drift ----------------------------------------------------------------------------------------------------------------


def test_what_was_paused_deleted_or_edited_by_hand_is_told_and_mended(site: Site) -> None:
    site.sync()
    paused = site.on()["icd-coder"]
    paused.update(status="DISABLED", mode="DISABLE")
    told = site.sync(dry_run=True)
    assert "schedule icd-coder: would be switched on again, since it was switched off" in told
    assert paused["status"] == "DISABLED"
    site.sync()
    assert site.on()["icd-coder"]["recurring_run_id"] == paused["recurring_run_id"]

    del site.api.recurring[site.on()["legal"]["recurring_run_id"]]
    assert "schedule legal: is created" in site.sync()

    edited = site.on()["legal"]
    edited["trigger"] = {"cron_schedule": {"cron": "0 * * * * *"}}
    edited["runtime_config"]["parameters"]["method_seed"] = "9"
    assert "schedule legal: is created, since its cron, parameters was changed by hand" in site.sync()
    assert edited["recurring_run_id"] not in site.api.recurring
    assert "Nothing to do" in site.sync()


def test_a_dry_run_tells_everything_and_does_nothing(site: Site) -> None:
    text = site.sync(dry_run=True)
    assert "version sha256-" in text
    assert "would be uploaded" in text
    assert "schedule legal: would be created, since it is new" in text
    assert not site.api.bodies
    assert not site.api.recurring
    assert not site.api.versions
    site.sync()
    assert "Nothing to do" in site.sync(dry_run=True)


def test_a_sync_that_was_cut_off_anywhere_is_finished_by_the_next(site: Site) -> None:
    """After each request of a change in turn the server is gone; then it is there again."""
    site.sync()
    entries = {number: [{**ENTRY, "cron": f"0 {number} 3 * * *"}, OTHER] for number in range(1, 40)}
    for number, wanted in entries.items():
        left = number

        def gone(method: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Refused(503, "gone")

        site.api.before = gone
        try:
            site.sync(schedules=wanted)
        except CamopdError:
            cut = True
        else:
            cut = False
        site.api.before = lambda method, path: None
        text = site.sync(schedules=wanted)
        assert site.on()["icd-coder"]["trigger"]["cron_schedule"]["cron"] == wanted[0]["cron"]
        assert len(site.api.recurring) == 2
        if not cut:
            assert "Nothing to do" in text
            break
    assert not cut
    assert number > 5


def test_two_at_once_leave_one_recurring_run_a_schedule(site: Site, tmp_path: Path) -> None:
    for turn in range(3):
        entries = [{**each, "cron": f"0 {turn} 2 * * *"} for each in (ENTRY, OTHER)]
        path = site.write(schedules=entries)
        file = schedules.read(path)
        with ThreadPoolExecutor(3) as pool:
            done = [
                pool.submit(sync.sync, connect(site.api.host), file, store=Store(), say=lambda text: None) for _ in range(3)
            ]
        assert [each.exception() for each in done] == [None] * 3
        site.sync()
        assert {each["trigger"]["cron_schedule"]["cron"] for each in site.on().values()} == {f"0 {turn} 2 * * *"}
        assert len(site.api.recurring) == 2
        assert len(site.api.versions) == 1
        assert "Nothing to do" in site.sync()


# --- Removal --------------------------------------------------------------------------------------------------------------


def test_before_an_uninstall_the_owner_s_schedules_go_and_nothing_else(site: Site) -> None:
    site.sync()
    run = site.api.tick(site.on()["icd-coder"]["recurring_run_id"])
    busy = site.on()["icd-coder"]["recurring_run_id"]
    theirs = {**site.on()["legal"], "recurring_run_id": "theirs", "description": "by hand"}
    site.api.recurring["theirs"] = theirs
    site.write(schedules=[{"name": "broken"}], pools={"no": "pool"})
    said: list[str] = []
    owner, namespace = schedules.owner_of(site.path)
    assert sync.remove(connect(site.api.host, namespace), owner, say=said.append)
    assert {key: each["status"] for key, each in site.api.recurring.items()} == {busy: "DISABLED", "theirs": "ENABLED"}
    assert any(run in sentence for sentence in said)
    assert site.api.runs[run]["state"] == "PENDING"
    assert site.api.versions
    site.api.tell(run, "FAILED")
    sync.remove(connect(site.api.host, namespace), owner, say=said.append)
    assert list(site.api.recurring) == ["theirs"]
    assert not sync.remove(connect(site.api.host, namespace), owner, say=said.append)
    assert said[-1] == "Nothing to do: team/camopd has no schedules."


# --- Users and namespaces -------------------------------------------------------------------------------------------------


def test_with_many_users_everything_is_in_the_file_s_namespace(
    kfp_teams: KfpApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "token-a")
    site = Site(kfp_teams, tmp_path, namespace="team-a")
    site.sync()
    assert {each["namespace"] for each in kfp_teams.recurring.values()} == {"team-a"}
    assert "Nothing to do" in site.sync()
    with pytest.raises(ApiError, match="does not allow it"):
        site.sync(namespace="team-b")


# --- Wrong files ----------------------------------------------------------------------------------------------------------


def problems(site: Site, **values: Any) -> str:
    with pytest.raises(InputError) as caught:
        site.sync(**values)
    assert not site.api.bodies, "nothing was done"
    return str(caught.value)


def test_all_that_is_wrong_comes_at_once(site: Site) -> None:
    entries = [
        {**ENTRY, "name": "Bad Name", "cron": "0 2 * * *"},
        {**ENTRY, "name": "twice", "follow": "models:/icd-coder"},
        {**ENTRY, "name": "twice", "follow": "/models/here", "max_attempts": 0},
        {**ENTRY, "name": "form", "parameters": {"method_sed": 1, "schedule_name": "x", "input_recipe": "y"}},
        {**ENTRY, "name": "recipe", "recipe": "mikro"},
        {**ENTRY, "name": "value", "parameters": {"output_uri": "s3://m/r", "method_num_rounds": 0}, "enabled": False},
        {**ENTRY, "name": "disk", "parameters": {}},
    ]
    text = problems(site, schedules=entries, time_zone="Mars/Olympus")
    for words in (
        "time_zone: 'Mars/Olympus' is no time zone that is known here",
        "schedules.twice: stands there 2 times",
        "schedules.Bad Name.name: 'Bad Name' cannot name a schedule",
        "schedules.Bad Name.cron: '0 2 * * *' has five fields",
        "write '0 0 2 * * *'",
        "schedules.twice.follow: 'models:/icd-coder' does not say which version",
        "schedules.twice.follow: /models/here is a folder, and pods share no disk",
        "schedules.twice.max_attempts: 0 attempts would try nothing",
        "schedules.form.parameters.method_sed: the run form has no such field -> did you mean 'method_seed'",
        "schedules.form.parameters.schedule_name: is the schedule's own -> say it by name",
        "schedules.form.parameters.input_recipe: is the schedule's own -> say it by recipe",
        "schedules.recipe.mikro: the recipe cannot be read",
        "schedules.value.method_num_rounds: 0 rounds would train nothing",
        "schedules.disk.output_uri:",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"owner": "no slash"}, "owner: "),
        ({"schedule": []}, "schedule: there is no such key"),
        ({"schedules": [{**ENTRY, "crons": "x"}]}, "schedules.icd-coder.crons: there is no such key -> did you mean 'cron'"),
        ({"schedules": [{"name": "a"}]}, "schedules.a.cron: Field required -> Six fields, seconds first."),
        ({"schedules": [{**ENTRY, "max_attempts": "often"}]}, "schedules.icd-coder.max_attempts: "),
    ],
)
def test_keys_are_named_by_the_schedule_they_stand_in(site: Site, values: dict[str, Any], words: str) -> None:
    assert words in problems(site, **values)


def test_a_recipe_on_s3_that_cannot_be_read_from_here_is_told_and_left_to_the_tick(site: Site, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    text = site.sync(schedules=[{**ENTRY, "recipe": "s3://models/recipes/icd.toml"}])
    assert "its recipe was not checked:" in text
    assert site.on()["icd-coder"]["runtime_config"]["parameters"]["input_recipe"] == "s3://models/recipes/icd.toml"


def test_the_example_of_a_file_is_right(site: Site) -> None:
    values = yaml.safe_load((Path(__file__).parents[2] / "pipelines" / "schedules.example.yaml").read_text())
    site.sync(**values)
    assert list(site.on()) == ["icd-coder"]
    given = site.on()["icd-coder"]["runtime_config"]["parameters"]
    assert {name: given[name] for name in values["schedules"][0]["parameters"]} == values["schedules"][0]["parameters"]


# --- The command ----------------------------------------------------------------------------------------------------------


def test_the_command_reads_yaml_and_tells_what_it_does(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_HOST", site.api.host)
    path = site.path.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(site.values))
    runner = CliRunner()
    dry = runner.invoke(app, ["sync", str(path), "--dry-run"])
    assert dry.exit_code == 3, dry.output
    assert "would be created" in dry.output
    assert runner.invoke(app, ["sync", str(path)]).exit_code == 0
    assert runner.invoke(app, ["sync", str(path), "--dry-run"]).exit_code == 0
    assert len(site.on()) == 2
    gone = runner.invoke(app, ["sync", str(path), "--remove"])
    assert gone.exit_code == 0, gone.output
    assert not site.api.recurring
