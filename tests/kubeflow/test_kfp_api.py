"""The API server of the tests, asked by KFP's own client: what is right is taken, what the real one refuses is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kfp as sdk
import kfp_server_api
import pytest
from kfp_server_api.exceptions import ApiException

from tests.fixtures.kfp_api import KfpApi, node, step
from tests.fixtures.kfp_rules import Refused, check_cron

COMPILED = Path(__file__).parents[2] / "pipelines" / "recovery.yaml"


@pytest.fixture(autouse=True)
def no_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """KFP's client reads and writes a file in the user's home."""
    monkeypatch.setattr(sdk.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "kfp" / "context.json"))


def client_of(api: KfpApi, **options: Any) -> sdk.Client:
    return sdk.Client(host=api.host, **options)


@pytest.fixture
def client(kfp: KfpApi) -> sdk.Client:
    return client_of(kfp)


def uploaded(client: sdk.Client, version: str = "") -> tuple[str, str]:
    """Ids of the recovery pipeline and of its newest version."""
    pipeline = client.get_pipeline_id("camopd-recovery")
    if pipeline is None:
        pipeline = client.upload_pipeline(str(COMPILED), pipeline_name="camopd-recovery").pipeline_id
    if version:
        client.upload_pipeline_version(str(COMPILED), version, pipeline_id=pipeline)
    newest = client.list_pipeline_versions(pipeline, sort_by="created_at desc").pipeline_versions[0]
    return pipeline, newest.pipeline_version_id


def status_of(error: pytest.ExceptionInfo[ApiException]) -> int:
    return error.value.status


def test_a_pipeline_goes_up_and_its_versions_are_listed(client: sdk.Client) -> None:
    pipeline, first = uploaded(client)
    _, second = uploaded(client, "v2")
    assert first != second
    found = client.get_pipeline_version(pipeline, second)
    assert found.name == found.display_name == "v2"
    assert found.pipeline_spec["pipelineInfo"]["name"] == "camopd-recovery"
    with pytest.raises(ApiException) as error:
        uploaded(client, "v2")
    assert status_of(error) == 409
    with pytest.raises(ApiException) as error:
        client.delete_pipeline(pipeline)
    assert status_of(error) == 400
    for version in (first, second):
        client.delete_pipeline_version(pipeline, version)
    client.delete_pipeline(pipeline)
    assert client.get_pipeline_id("camopd-recovery") is None


def test_a_file_that_is_no_pipeline_is_refused(client: sdk.Client, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("apiVersion: v1\nkind: Pod\n")
    with pytest.raises(ApiException) as error:
        client.upload_pipeline(str(wrong), pipeline_name="wrong")
    assert status_of(error) == 400


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"method_sed": "1"}, "not required by pipeline: method_sed"),
        ({"method_seed": 1}, "method_seed requires type string"),
        ({"output_promote": "no"}, "output_promote requires type boolean"),
    ],
)
def test_parameters_are_those_of_the_run_form(client: sdk.Client, parameters: dict[str, Any], part: str) -> None:
    pipeline, version = uploaded(client)
    experiment = client.create_experiment("mine").experiment_id
    with pytest.raises(ApiException) as error:
        client.run_pipeline(experiment, "run", params=parameters, pipeline_id=pipeline, version_id=version)
    assert status_of(error) == 400
    assert part in json.loads(error.value.body)["message"]


def test_a_run_from_start_to_end(kfp: KfpApi, client: sdk.Client) -> None:
    pipeline, version = uploaded(client)
    experiment = client.create_experiment("mine").experiment_id
    made = client.run_pipeline(experiment, "run", params={"output_uri": "s3://b/p"}, pipeline_id=pipeline, version_id=version)
    assert (made.state, made.service_account, made.finished_at.year) == ("PENDING", "pipeline-runner", 1970)
    assert made.runtime_config.parameters == {"output_uri": "s3://b/p"}
    start, end = kfp.now(), kfp.now()
    kfp.tell(made.run_id, "RUNNING", step("prepare", "RUNNING", start))
    kfp.tell(made.run_id, "FAILED", [*step("prepare", "FAILED", start, end, attempts=2), node("root", "FAILED", start, end)])
    found = client.get_run(made.run_id)
    assert (found.state, found.error) == ("FAILED", None)
    assert [status.state for status in found.state_history] == ["PENDING", "RUNNING", "FAILED"]
    names = [task.display_name for task in found.run_details.task_details]
    assert names == ["prepare-driver", "prepare", "executor", "executor(0)", "executor(1)", "root"]
    with pytest.raises(ApiException) as error:
        client.terminate_run(made.run_id)
    assert status_of(error) == 400


def test_a_run_is_terminated_and_deleted(kfp: KfpApi, client: sdk.Client) -> None:
    pipeline, version = uploaded(client)
    made = client.run_pipeline(client.create_experiment("m").experiment_id, "run", pipeline_id=pipeline, version_id=version)
    client.terminate_run(made.run_id)
    assert client.get_run(made.run_id).state == "CANCELING"
    client.delete_run(made.run_id)
    with pytest.raises(ApiException) as error:
        client.get_run(made.run_id)
    assert status_of(error) == 404


def test_lists_come_in_pages(client: sdk.Client) -> None:
    made = {client.create_experiment(f"e{n}").experiment_id for n in range(25)}
    seen, token = [], ""
    while True:
        page = client.list_experiments(page_token=token, page_size=10)
        seen += [each.experiment_id for each in page.experiments]
        token = page.next_page_token or ""
        if not token:
            break
    assert len(seen) == len(set(seen)) == 26  # and the server's own Default
    assert made < set(seen)
    with pytest.raises(ApiException) as error:
        client.list_experiments(page_token=page.next_page_token or "nonsense")
    assert status_of(error) == 400
    with pytest.raises(ApiException) as error:
        client.list_experiments(sort_by="colour")
    assert status_of(error) == 400


def scheduled(client: sdk.Client, **changes: Any) -> kfp_server_api.V2beta1RecurringRun:
    pipeline, version = uploaded(client)
    options = {"cron_expression": "0 0 2 * * *", "max_concurrency": 1, "no_catchup": True, "version_id": version}
    experiment = client.create_experiment("mine").experiment_id
    return client.create_recurring_run(experiment, "nightly", pipeline_id=pipeline, **(options | changes))


def test_a_schedule_is_switched_on_and_off_and_makes_runs(kfp: KfpApi, client: sdk.Client) -> None:
    made = scheduled(client, params={"input_recipe": "micro"}, service_account="runner")
    found = client.get_recurring_run(made.recurring_run_id)
    assert (found.status, found.mode, found.max_concurrency, found.no_catchup) == ("ENABLED", "ENABLE", "1", True)
    assert found.trigger.cron_schedule.cron == "0 0 2 * * *"
    run = client.get_run(kfp.tick(made.recurring_run_id))
    assert (run.recurring_run_id, run.service_account) == (made.recurring_run_id, "runner")
    assert run.runtime_config.parameters == {"input_recipe": "micro"}
    client.disable_recurring_run(made.recurring_run_id)
    assert client.list_recurring_runs().recurring_runs[0].status == "DISABLED"
    client.enable_recurring_run(made.recurring_run_id)
    client.delete_recurring_run(made.recurring_run_id)
    assert client.list_recurring_runs().recurring_runs is None


def test_a_schedule_without_a_version_follows_the_newest(kfp: KfpApi, client: sdk.Client) -> None:
    pipeline, first = uploaded(client)
    experiment = client.create_experiment("mine").experiment_id
    body = {
        "display_name": "nightly", "experiment_id": experiment, "max_concurrency": "1", "mode": "ENABLE",
        "trigger": {"cron_schedule": {"cron": "0 0 2 * * *"}}, "pipeline_version_reference": {"pipeline_id": pipeline},
    }  # fmt: skip
    made = client._recurring_run_api.recurring_run_service_create_recurring_run(body)
    assert client.get_run(kfp.tick(made.recurring_run_id)).pipeline_version_reference.pipeline_version_id == first
    _, newest = uploaded(client, "v2")
    assert client.get_run(kfp.tick(made.recurring_run_id)).pipeline_version_reference.pipeline_version_id == newest


@pytest.mark.parametrize(
    "changes", [{"cron_expression": "every night"}, {"max_concurrency": 0}, {"max_concurrency": 11}, {"params": {"sed": "1"}}]
)
def test_a_bad_schedule_is_refused(client: sdk.Client, changes: dict[str, Any]) -> None:
    with pytest.raises(ApiException) as error:
        scheduled(client, **changes)
    assert status_of(error) == 400


def test_cron_has_the_second_first() -> None:
    for right in (
        "0 0 2 * * *",
        "0 */15 8-18 1,15 jan-mar MON-FRI",
        "0 0 2 * *",
        "@daily",
        "@every 6h",
    ):
        check_cron(right)
    for wrong in (
        "0 2 * *",
        "60 0 2 * * *",
        "0 0 24 * * *",
        "0 0 2 0 * *",
        "0 0 5-2 * * *",
        "0 0 2 * * */0",
        "0 0 2 * * L",
        "TZ=Europe/Berlin 0 0 2 * * ?",  # of later versions of robfig/cron
        "",
    ):
        with pytest.raises(Refused):
            check_cron(wrong)


def test_an_unknown_field_is_refused(kfp: KfpApi, client: sdk.Client) -> None:
    with pytest.raises(ApiException) as error:
        client._run_api.api_client.call_api("/apis/v2beta1/runs", "POST", body={"name": "old"}, auth_settings=[])
    assert status_of(error) == 400
    assert 'unknown field "name"' in json.loads(error.value.body)["message"]


def test_many_users(kfp_teams: KfpApi) -> None:
    with pytest.raises(ApiException) as error:
        client_of(kfp_teams, namespace="team-a").list_runs(namespace="team-a")
    assert status_of(error) == 401
    own = client_of(kfp_teams, namespace="team-a", existing_token="token-a")
    made = own.create_experiment("mine", namespace="team-a")
    assert made.namespace == "team-a"
    by_cookie = client_of(kfp_teams, namespace="team-a", cookies="session=a")
    assert by_cookie.get_experiment(made.experiment_id).display_name == "mine"
    other = client_of(kfp_teams, namespace="team-b", existing_token="token-b")
    with pytest.raises(ApiException) as error:
        other.get_experiment(made.experiment_id)
    assert status_of(error) == 403
    with pytest.raises(ApiException) as error:
        own._run_api.run_service_list_runs()
    assert status_of(error) == 400  # a namespace is needed
    pipeline = own.upload_pipeline(str(COMPILED), pipeline_name="camopd-recovery", namespace="team-a").pipeline_id
    with pytest.raises(ApiException) as error:
        other.upload_pipeline_version(str(COMPILED), "v2", pipeline_id=pipeline)
    assert status_of(error) == 400  # the upload handler's word for 403
    version = own.list_pipeline_versions(pipeline).pipeline_versions[0].pipeline_version_id
    run = own.run_pipeline(made.experiment_id, "run", pipeline_id=pipeline, version_id=version)
    assert run.service_account == "default-editor"
