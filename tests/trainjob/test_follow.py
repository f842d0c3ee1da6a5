"""Logs, waiting, faults of the connection and refusals, against a server that does what Kubernetes does."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from camopd.errors import ClusterError
from camopd.trainjob import cluster, follow, job_name
from tests.fixtures.kubernetes_api import Fault
from tests.trainjob.jobs import SPEC, finishing, pods_of, started, write_checkpoint

# --- Logs and waiting -----------------------------------------------------------------------------------------------------


def test_each_line_is_shown_once_and_as_it_comes(api, train, round_uri, capsys):
    api.on_create = started(api)
    name, seen = job_name(round_uri), []

    def say(node: int, text: str) -> Callable:
        return lambda: (seen.append(capsys.readouterr().out), api.write(pods_of(api)[node], text))

    end = [lambda: (write_checkpoint(round_uri), api.end(name, "Complete", "JobsCompleted"))]
    api.looks = [lambda: None, say(0, "a"), say(1, "b"), say(0, "c"), say(0, "c"), *end]
    train()
    assert "".join(seen) + capsys.readouterr().out == "[node 0] a\n[node 1] b\n[node 0] c\n[node 0] c\n"
    assert any(text for text in seen), "lines come while it runs"


def test_broken_connections_and_a_busy_server_cost_nothing(api, train, round_uri, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "PAUSE", 0.01)
    faults = [Fault(0), Fault(503, "etcd leader changed"), Fault(429, "too many"), Fault(500, "bad gateway", plain=True)]
    met = {"trainjobs": list(faults), "pods": list(faults), "pods/log": [*faults, Fault(410, "gone")]}

    def before(verb, resource):
        if verb != "create" and met.get(resource):
            raise met[resource].pop(0)

    def begin(job):
        started(api)(job)
        api.write(pods_of(api)[0], "said before the connection broke")

    api.before, api.on_create = before, begin
    end = [lambda: (write_checkpoint(round_uri), api.end(job_name(round_uri), "Complete", "JobsCompleted"))]
    api.looks = [lambda: None] * 6 + end
    train()
    assert met == {"trainjobs": [], "pods": [], "pods/log": []}
    assert capsys.readouterr().out == "[node 0] said before the connection broke\n"


def test_nothing_is_asked_again_behind_our_back(api):
    """The HTTP library would, three times, and a cancelled step has not got the seconds."""

    def before(verb, resource):
        raise Fault(0)

    api.before = before
    assert cluster.Cluster.connect().log("a-pod") is None
    with pytest.raises(ClusterError):
        cluster.Cluster.connect().delete("a-job", patience=0)
    assert api.asked == [("get", "pods/log"), ("delete", "trainjobs")]


def test_no_answer_for_long_is_an_error_that_leaves_the_job_running(api, train, round_uri, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 0.1)
    monkeypatch.setattr(cluster, "PAUSE", 0.02)
    api.on_create = started(api)

    def before(verb, resource):
        if resource == "pods":
            raise Fault(503, "the server is on its way")

    api.before = before
    with pytest.raises(ClusterError, match=r"no answer to list pods .*on its way.* start this step again to follow it"):
        train()
    assert job_name(round_uri) in api.jobs
    assert api.deleted == []


def test_pods_that_do_not_start_say_why_now_and_then(api, train, round_uri, capsys, monkeypatch):
    monkeypatch.setattr(follow, "PENDING", 0.0)
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/4 nodes are available"}

    def stuck(job):
        api.add_pod(job, 1, phase="Pending", conditions=[unscheduled])

    def pull(reason: str, message: str = "") -> Callable:
        waiting = {"name": "node", "state": {"waiting": {"reason": reason, "message": message}}}
        pod = {"phase": "Pending", "containerStatuses": [waiting], "conditions": []}
        return lambda: [api.pods[name]["status"].update(pod) for name in pods_of(api)]

    def end():
        for pod in pods_of(api):
            api.container(pod, terminated={"exitCode": 0})
        write_checkpoint(round_uri)
        api.end(job_name(round_uri), "Complete", "JobsCompleted")

    api.on_create = stuck
    same = [lambda: None] * 3
    api.looks = [*same, lambda: api.add_pod(api.jobs[job_name(round_uri)], 0, phase="Running"), *same]
    api.looks += [pull("ImagePullBackOff", 'Back-off pulling image "x"'), *same, end]
    train()
    lines = [line.partition(" waits: ")[2] for line in capsys.readouterr().err.splitlines() if " waits: " in line]
    assert lines == [
        "node 1: Unschedulable: 0/4 nodes are available; 1 of 2 pods are not made yet",
        "node 1: Unschedulable: 0/4 nodes are available",
        'node 0: ImagePullBackOff Back-off pulling image "x"; node 1: ImagePullBackOff Back-off pulling image "x"',
    ]


def test_a_job_without_pods_tells_kubernetes_warning_where_it_may_be_read(api, train, round_uri, capsys, monkeypatch):
    monkeypatch.setattr(follow, "PENDING", 0.0)
    api.events = [{"message": "quota exceeded", "lastTimestamp": "2026-01-01T00:00:01Z"}, {"message": "older"}]
    end = [lambda: (write_checkpoint(round_uri), api.end(job_name(round_uri), "Complete", "JobsCompleted"))]
    api.looks = [lambda: None] * 3 + end
    train()
    assert "waits: 2 of 2 pods are not made yet; quota exceeded" in capsys.readouterr().err


def test_a_job_in_a_queue_says_so_and_is_not_hurried(api, train, round_uri, capsys, monkeypatch):
    monkeypatch.setattr(follow, "PENDING", 0.0)
    api.forbidden = {("list", "events")}
    end = [lambda: (write_checkpoint(round_uri), api.end(job_name(round_uri), "Complete", "JobsCompleted"))]
    api.on_create = lambda job: api.end(job["metadata"]["name"], "Suspended", "Suspended", "TrainJob is suspended")
    api.looks = [lambda: None] * 3 + end
    train(SPEC.model_copy(update={"queue": "gpus"}))
    assert "waits: in Kueue's queue gpus (TrainJob is suspended)" in capsys.readouterr().err


# --- Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right", [("create", "trainjobs"), ("get", "trainjobs"), ("list", "pods"), ("get", "pods/log")], ids="/".join
)
def test_a_missing_right_is_named_with_who_lacks_it_and_where(api, train, round_uri, right):
    api.forbidden, api.on_create = {right}, started(api)
    with pytest.raises(ClusterError) as caught:
        train()
    verb, resource = right
    assert f"the service account default-editor may not {verb} {resource} in namespace team-a" in str(caught.value)
    assert "docs/scale.md" in str(caught.value)


def test_a_finished_job_that_may_not_be_deleted_is_no_failure(api, train, round_uri, capsys):
    api.forbidden, api.on_create = {("delete", "trainjobs")}, finishing(api, round_uri)
    assert train().metrics == {"loss": 0.5}
    assert "is done and was not deleted: the service account" in capsys.readouterr().err


def test_without_kubeflow_trainer_its_version_is_named(api, train):
    api.schema = None
    with pytest.raises(ClusterError, match=r"trainer.kubeflow.org/v1alpha1: install Kubeflow Trainer 2.2 or later"):
        train()


def test_an_older_trainer_takes_nothing_rather_than_half(api, train):
    """Kubeflow Trainer 2.1 has no runtimePatches. Dropped in silence, the pods would start on any node."""
    assert api.schema is not None
    del api.schema["properties"]["spec"]["properties"]["runtimePatches"]
    with pytest.raises(ClusterError, match=r"is another than ours, 2.2 or 2.3, .*unknown field .spec.runtimePatches"):
        train()
    assert api.jobs == {}


def test_what_trainer_s_own_check_refuses_is_not_taken_for_a_missing_right(api, train):
    def before(verb, resource):
        if verb == "create":
            raise Fault(403, 'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: no such runtime')

    api.before = before
    with pytest.raises(ClusterError, match=r"refused to create trainjobs in namespace team-a \(403\): .*no such runtime"):
        train()


def test_without_any_way_to_kubernetes_the_sentence_says_where_to_run(api, train, monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match=r"no way to Kubernetes: .*inside a cluster, or with a kubeconfig"):
        train()


def test_in_a_pod_without_a_service_account_the_sentence_says_so(train, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with pytest.raises(ClusterError, match=r"no way to Kubernetes: Service token file does not exist"):
        train()


def test_the_role_of_the_docs_holds_the_rights_that_are_used_and_no_other(api, train, round_uri, monkeypatch):
    monkeypatch.setattr(follow, "PENDING", 0.0)
    end = [lambda: finishing(api, round_uri)(api.jobs[job_name(round_uri)])]
    api.looks = [lambda: None] * 3 + end
    train()
    blocks = re.findall(r"(?s)```yaml\n(.*?)```", Path("docs/scale.md").read_text(encoding="utf-8"))
    (role,) = (found for found in map(yaml.safe_load, blocks) if found["kind"] == "Role")
    given = {(verb, resource) for rule in role["rules"] for verb in rule["verbs"] for resource in rule["resources"]}
    assert set(api.asked) == given
