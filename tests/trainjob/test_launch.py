"""Making the job, taking up an earlier attempt's, and deleting it when the step is cancelled."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from camopd import attempts, workflow
from camopd import plan as layout
from camopd.errors import ClusterError, StoreError
from camopd.store import Store
from camopd.trainjob import follow, job_name
from tests.fixtures.kubernetes_api import Fault
from tests.trainjob.jobs import SPEC, finishing, leave_word, started, there, write_checkpoint

# --- A job that is done ---------------------------------------------------------------------------------------------------


def test_a_job_is_made_followed_and_cleared_away(api, train, round_uri, capsys):
    api.on_create = finishing(api, round_uri)
    manifest = train()
    assert manifest == Store().require(layout.checkpoint_uri(round_uri))
    out = capsys.readouterr()
    assert out.out.splitlines() == ["[node 0] step 1 of node 0", "[node 1] step 1 of node 1"]
    assert f"TrainJob {job_name(round_uri)}: launched in namespace team-a, 2 nodes" in out.err
    assert api.jobs == {}
    assert api.deleted == [(job_name(round_uri), "Foreground")]


def test_a_finished_round_asks_kubernetes_nothing(api, train, round_uri):
    write_checkpoint(round_uri)
    train()
    assert api.asked == []


def test_a_job_that_says_done_and_left_no_checkpoint_is_an_error(api, train):
    api.on_create = lambda job: api.end(job["metadata"]["name"], "Complete", "JobsCompleted")
    with pytest.raises(StoreError, match="is not finished"):
        train()
    assert api.deleted == []


def test_the_step_owns_its_job(api, train, round_uri, monkeypatch):
    monkeypatch.setenv("KFP_POD_NAME", "train-1")
    monkeypatch.setenv("KFP_POD_UID", "u-1")
    seen = []
    done = finishing(api, round_uri)
    api.on_create = lambda job: (seen.append(job["metadata"]["ownerReferences"]), done(job))
    train()
    assert seen == [[{"apiVersion": "v1", "kind": "Pod", "name": "train-1", "uid": "u-1"}]]


def test_the_stage_says_the_checkpoint_s_numbers(api, round_uri, monkeypatch):
    monkeypatch.setattr("camopd.tracking.sync", lambda *args, **options: None)
    monkeypatch.setattr("camopd.tracking.tracker_for", lambda settings: None)
    api.on_create = finishing(api, round_uri)
    done = workflow.train(round_uri, job=SPEC.model_dump_json())
    assert dict(done.metrics) == {"loss": 0.5}


# --- A job that is there already ------------------------------------------------------------------------------------------


def test_one_that_runs_is_followed(api, train, round_uri):
    name = there(api, round_uri)
    leave_word(round_uri, type="UnhealthyRunError", message="said by the running job", rank=0)
    started(api)(api.jobs[name])
    api.looks = [lambda: None, lambda: (write_checkpoint(round_uri), api.end(name, "Complete", "JobsCompleted"))]
    train()
    assert ("create", "trainjobs") not in api.asked


def test_one_that_is_done_and_left_its_checkpoint_only_now_is_taken(api, train, round_uri):
    name = there(api, round_uri)
    api.looks = [lambda: (write_checkpoint(round_uri), api.end(name, "Complete", "JobsCompleted"))]
    train()
    assert ("create", "trainjobs") not in api.asked


@pytest.mark.parametrize("end", ["Failed", "Complete"])
def test_one_that_failed_or_left_nothing_makes_way_once_it_is_gone(api, train, round_uri, end):
    name = there(api, round_uri)
    api.end(name, end, "FailedJobs")
    gone = finishing(api, round_uri)
    api.on_create = gone
    api.on_delete = lambda job: None  # its pods take their time
    api.looks = [lambda: None, lambda: None, lambda: None, lambda: api.remove(name)]
    api.looks += [lambda: setattr(api, "on_delete", None)]
    train()
    assert [ask for ask in api.asked if ask[1] == "trainjobs"][:7] == [
        ("get", "trainjobs"), ("delete", "trainjobs"), ("get", "trainjobs"), ("get", "trainjobs"), ("get", "trainjobs"),
        ("get", "trainjobs"), ("create", "trainjobs"),
    ]  # fmt: skip


def test_one_that_is_being_deleted_is_waited_for_and_not_deleted_again(api, train, round_uri):
    name = there(api, round_uri)
    api.jobs[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    api.on_create = finishing(api, round_uri)
    api.looks = [lambda: None, lambda: api.remove(name)]
    train()
    assert len(api.deleted) == 1, "the new one, in the end"


def test_one_that_another_has_replaced_meanwhile_is_followed(api, train, round_uri):
    """Two attempts of a step at once, as where a node is lost and comes back."""
    name = there(api, round_uri)
    api.end(name, "Failed", "FailedJobs")
    api.on_delete = lambda job: None

    def replaced():
        api.jobs[name] = {"metadata": {"name": name, "uid": "another"}}
        finishing(api, round_uri)(api.jobs[name])

    api.looks = [lambda: None, lambda: None, replaced]
    train()
    assert ("create", "trainjobs") not in api.asked


def test_one_that_does_not_go_is_named(api, train, round_uri, monkeypatch):
    monkeypatch.setattr(follow, "GONE", 0.1)
    api.on_delete = lambda job: None
    api.end(there(api, round_uri), "Failed", "FailedJobs")
    with pytest.raises(ClusterError, match=r"is deleted, and not gone after .* finalizers"):
        train()


def test_one_that_another_makes_at_the_same_time_is_followed(api, train, round_uri):
    def taken(verb, resource):
        if verb == "create":
            finishing(api, round_uri)(api.jobs[there(api, round_uri)])

    api.before = taken
    train()
    assert api.asked.count(("create", "trainjobs")) == 1


def test_one_whose_making_was_answered_by_a_broken_connection_is_followed(api, train, round_uri):
    """The first request made it, and nobody heard: the second meets it by its name."""
    made = []

    def before(verb, resource):
        if verb == "create" and not made:
            made.append(there(api, round_uri))
            finishing(api, round_uri)(api.jobs[made[0]])
            raise Fault(0)

    api.before = before
    train()
    assert api.asked.count(("create", "trainjobs")) == 2


# --- Cancelling -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sigterm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Sends this process SIGTERM, whose way out would end it for certain after some seconds."""
    monkeypatch.setattr(attempts, "CLEAN_UP", 3600)
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    signal.alarm(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_sigterm_deletes_the_job_and_ends_the_step(api, train, round_uri, sigterm):
    api.on_create = started(api)
    api.looks = [lambda: None, lambda: None, sigterm]
    begun = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        train()
    assert caught.value.code == 143
    assert time.monotonic() - begun < 10
    assert api.deleted == [(job_name(round_uri), "Foreground")]


def test_a_second_sigterm_does_not_interrupt_the_deletion(api, train, round_uri, sigterm):
    api.on_create = started(api)
    api.looks = [lambda: None, lambda: None, sigterm]
    met = []

    def before(verb, resource):
        if verb == "delete" and not met:
            met.append(verb)
            sigterm()
            raise Fault(503, "ask again")

    api.before = before
    with pytest.raises(SystemExit):
        train()
    assert api.jobs == {}


def test_a_deletion_whose_answer_breaks_is_asked_again(api, train, round_uri, sigterm):
    api.on_create = started(api)
    api.looks = [lambda: None, lambda: None, sigterm]
    broken = [Fault(0), Fault(503, "busy")]

    def before(verb, resource):
        if verb == "delete" and broken:
            raise broken.pop(0)

    api.before = before
    begun = time.monotonic()
    with pytest.raises(SystemExit):
        train()
    assert api.jobs == {}
    assert time.monotonic() - begun < 10


def test_a_job_that_comes_into_being_while_the_step_is_cancelled_is_deleted_too(api, train, round_uri, sigterm):
    """SIGTERM while the request that makes the job is on its way: the first deletion finds nothing."""
    met = []

    def before(verb, resource):
        if verb == "create":
            sigterm()
            time.sleep(0.1)
            raise Fault(503, "the answer is lost")
        if verb == "delete" and not met:
            met.append(verb)
            api.looks.append(lambda: None)
            threading.Timer(0.2, lambda: there(api, round_uri)).start()

    api.before = before
    with pytest.raises(SystemExit):
        train()
    assert api.jobs == {}
    assert len(api.deleted) == 1


def test_a_step_that_cannot_delete_says_what_may_still_run(api, train, round_uri, capsys, sigterm):
    api.on_create, api.forbidden = started(api), {("delete", "trainjobs")}
    api.looks = [lambda: None, lambda: None, sigterm]
    with pytest.raises(SystemExit):
        train()
    assert f"kubectl delete trainjob {job_name(round_uri)}" in capsys.readouterr().err


def test_in_another_thread_signals_are_left_alone(api, train, round_uri):
    api.on_create = finishing(api, round_uri)
    found = SimpleNamespace(value=None)
    thread = threading.Thread(target=lambda: setattr(found, "value", train()))
    thread.start()
    thread.join(20)
    assert found.value == Store().require(layout.checkpoint_uri(round_uri))
