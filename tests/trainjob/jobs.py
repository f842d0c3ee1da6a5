"""What a cluster's controllers and a training leave of a job, for tests."""

import json
from collections.abc import Callable

from camopd import plan as layout
from camopd.failures import failure_uri
from camopd.store import Store
from camopd.trainjob import JobSpec, job_name
from tests.finished import produce
from tests.fixtures.kubernetes_api import Api

SPEC = JobSpec(nodes=2, runtime="torch-distributed", image="camopd/trainer")


def write_checkpoint(round_uri: str) -> None:
    produce(Store(), layout.checkpoint_uri(round_uri), "train", {"model.safetensors": "weights"}, {"loss": 0.5})


def leave_word(round_uri: str, **record) -> None:
    Store().write(failure_uri(round_uri), json.dumps(record).encode())


def started(api: Api, nodes: int = 2) -> Callable:
    """A controller that makes the pods of a new job, which run."""

    def make(job):
        for node in range(nodes):
            api.container(api.add_pod(job, node), running={})

    return make


def pods_of(api: Api) -> list[str]:
    return sorted(api.pods)


def finishing(api: Api, round_uri: str) -> Callable:
    """A controller whose jobs are done at once."""

    def make(job):
        for node in range(2):
            pod = api.add_pod(job, node)
            api.write(pod, f"step 1 of node {node}")
            api.container(pod, terminated={"exitCode": 0})
        write_checkpoint(round_uri)
        api.end(job["metadata"]["name"], "Complete", "JobsCompleted")

    return make


def there(api: Api, round_uri: str, **job) -> str:
    """A job that an earlier attempt left."""
    name = job_name(round_uri)
    api.jobs[name] = {"metadata": {"name": name, "uid": "old"}, **job}
    return name
