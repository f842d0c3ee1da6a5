"""Why a job failed, in words."""

import json
from collections.abc import Callable

import pytest

from camopd import plan as layout
from camopd import workflow
from camopd.errors import ClusterError, InputError, Problem, UnhealthyRunError, WorkerError
from camopd.failures import of_fault
from camopd.outcome import error_uri
from camopd.store import Store
from camopd.trainjob import job_name
from tests.fixtures.kubernetes_api import Api
from tests.trainjob.jobs import SPEC, leave_word, pods_of, started


def failing(api: Api, *ends: dict, condition: bool = True) -> Callable:
    """A controller whose pods end as told; the first one's log has a line."""

    def make(job):
        for node, end in enumerate(ends):
            pod = api.add_pod(job, node)
            api.write(pod, f"the last words of node {node}")
            api.container(pod, terminated={"finishedAt": f"2026-01-01T00:00:0{node}Z", **end} if end else None)
        if condition:
            api.end(job["metadata"]["name"], "Failed", "FailedJobs", "jobset failed due to one or more job failures")

    return make


def test_the_training_s_own_error_comes_back_in_its_class(api, train, round_uri):
    make = failing(api, {"exitCode": 137, "reason": "OOMKilled"}, {"exitCode": 1})
    api.on_create = lambda job: (leave_word(round_uri, type="UnhealthyRunError", message="the loss is nan", rank=3), make(job))
    with pytest.raises(UnhealthyRunError, match=r"^the loss is nan$"):
        train()
    assert job_name(round_uri) in api.jobs, "a failed job stays to be looked at"


def test_every_problem_of_the_input_comes_back(api, train, round_uri):
    problem = {"where": "train.x", "what": "is wrong", "fix": "mend it"}
    make = failing(api, {"exitCode": 1}, {"exitCode": 1})
    api.on_create = lambda job: (leave_word(round_uri, type="InputError", message="", rank=0, problems=[problem]), make(job))
    with pytest.raises(InputError) as caught:
        train()
    assert caught.value.problems == (Problem(**problem),)


def test_what_an_earlier_attempt_said_is_not_said_again(api, train, round_uri):
    leave_word(round_uri, type="UnhealthyRunError", message="an old one", rank=0)
    api.on_create = failing(api, {"exitCode": 1}, {"exitCode": 1})
    with pytest.raises(WorkerError, match="exit code 1"):
        train()


KILLED = "was killed .* memory runs out: give the training pool more memory"


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ({"exitCode": 1, "reason": "OOMKilled"}, r"node 1 of 2 was killed \(OOMKilled\)"),
        ({"exitCode": 137, "reason": "Error"}, KILLED),
        (
            {"exitCode": 7, "message": "told by the pod"},
            r"node 1 of 2 ended with exit code 7 \(told by the pod\); FailedJobs: jobset",
        ),
    ],
)
def test_a_pod_s_end_is_said_in_words(api, train, end, sentence):
    """The neighbour of the one that died is ended by a signal, or fails for the broken connection; it is not the cause."""
    api.on_create = failing(api, {"exitCode": 143}, end)
    with pytest.raises(WorkerError, match=sentence):
        train()


def test_a_process_killed_inside_a_pod_is_known_by_torchrun_s_words(api, train):
    make = failing(api, {"exitCode": 1}, {"exitCode": 1})
    api.on_create = lambda job: (make(job), api.write(pods_of(api)[1], "  exitcode  : -9 (pid: 71)"))
    with pytest.raises(WorkerError, match=f"node 1 of 2 {KILLED}"):
        train()


def test_a_fault_is_told_with_the_pod_s_end_and_log_lines_go_to_the_log_alone(api, train, round_uri, capsys):
    """They may quote a prompt, and the sentence goes into the run's record and page."""
    make = failing(api, {"exitCode": 1}, {"exitCode": 1})
    fault = of_fault("KeyError", 5, 16)
    api.on_create = lambda job: (leave_word(round_uri, type="WorkerError", message=str(fault), rank=5), make(job))
    with pytest.raises(WorkerError) as caught:
        train()
    assert "failed: KeyError, see its trace in the log of this step; node 0 of 2 ended with exit code 1" in str(caught.value)
    assert "last words" not in str(caught.value)
    assert "[node 0] the last words of node 0" in capsys.readouterr().err


def test_an_evicted_pod_says_why(api, train):
    def make(job):
        api.add_pod(job, 0, phase="Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage.")
        api.end(job["metadata"]["name"], "Failed", "FailedJobs")

    api.on_create = make
    with pytest.raises(WorkerError, match=r"node 0 of 2 ended with Evicted \(The node was low on resource"):
        train()


def test_a_pod_that_was_taken_away_is_the_cause_and_not_its_neighbour(api, train, round_uri):
    """A spot node goes; what is left of the other process is a fault of the connection."""
    taken = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempting"}
    make = failing(api, {"exitCode": 1}, {"exitCode": 143}, condition=False)

    def preempt(job):
        make(job)
        api.pods[pods_of(api)[1]]["status"]["conditions"] = [taken]
        leave_word(round_uri, type="WorkerError", message="process 1 of 2 failed: DistBackendError", rank=0)

    api.on_create = preempt
    with pytest.raises(WorkerError, match=r"DistBackendError; node 1 of 2 ended with PreemptionByScheduler \(preempting\)"):
        train()


def test_memory_that_ran_out_counts_before_what_the_neighbour_met(api, train, round_uri):
    make = failing(api, {"exitCode": 1}, {"exitCode": 137, "reason": "OOMKilled"})
    record = {"type": "WorkerError", "message": "process 1 of 2 failed: DistBackendError", "rank": 0}
    api.on_create = lambda job: (leave_word(round_uri, **record), make(job))
    with pytest.raises(WorkerError, match=KILLED):
        train()


def test_a_job_out_of_time_names_the_setting(api, train):
    api.on_create = lambda job: api.end(job["metadata"]["name"], "Failed", "DeadlineExceeded", "exceeded its active deadline")
    with pytest.raises(WorkerError, match=r"longer than training.timeout_minutes = 30 .* raise it"):
        train(SPEC.model_copy(update={"timeout_minutes": 30}))


def test_a_failure_before_any_pod_is_the_job_s_own_sentence(api, train):
    api.on_create = lambda job: api.end(
        job["metadata"]["name"], "Failed", "TrainingRuntimeNotSupported", "unsupported runtime: X"
    )
    with pytest.raises(WorkerError, match="TrainingRuntimeNotSupported: unsupported runtime: X"):
        train()


def test_a_pod_that_is_started_again_in_place_fails_the_job_all_the_same(api, train, capsys):
    """Trainer's own runtimes restart a container up to six times, and none of them could join the others."""

    def make(job):
        started(api)(job)
        pod = pods_of(api)[1]
        api.write(pod, "the end of the first start", start=0)
        api.write(pod, "the second start", start=1)
        api.container(pod, restarts=1, last={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, running={})

    api.on_create = make
    with pytest.raises(WorkerError, match=r"node 1 of 2 was killed \(OOMKilled\)"):
        train()
    assert capsys.readouterr().out.splitlines() == ["[node 1] the end of the first start", "[node 1] the second start"]
    assert api.jobs == {}, "it would have gone on by itself"


def test_a_job_that_somebody_else_deletes_is_an_error(api, train, round_uri):
    api.on_create = started(api)
    api.looks = [lambda: None, lambda: None, lambda: api.remove(job_name(round_uri))]
    with pytest.raises(ClusterError, match="was deleted while it ran, not by this step"):
        train()


def test_the_run_s_record_and_its_stop_hold_the_reason(api, round_uri, monkeypatch):
    make = failing(api, {"exitCode": 1}, {"exitCode": 1})
    api.on_create = lambda job: (leave_word(round_uri, type="UnhealthyRunError", message="the loss is nan", rank=0), make(job))
    with pytest.raises(UnhealthyRunError):
        workflow.train(round_uri, job=SPEC.model_dump_json())
    run_uri, _ = layout.run_and_round(round_uri)
    assert json.loads(Store().read(error_uri(run_uri)))["reason"] == "the loss is nan"
    assert "the loss is nan" in json.loads(Store().read(layout.stop_uri(run_uri)))["reason"]
