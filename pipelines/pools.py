"""The pools file: which machines each kind of task asks for. Read when the pipeline is compiled.

It belongs to the platform's engineer, not to the run form: accelerators, selectors, tolerations, shared memory, retries and
timeouts are constants of the compiled file. Without a pools file everything runs on CPU and asks for nothing.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from kfp import dsl, kubernetes
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from camopd.errors import InputError, Problem
from camopd.trainjob import JobSpec
from camopd.trainjob.spec import CA_FOLDER, RESERVED, kueue_labels, trusting
from components import TRAINER
from pipelines.affinity import NodeAffinity

_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
_LABEL = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
_SECRET = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/[-._a-zA-Z0-9]+$"
_SECRECY = re.compile(r"(^|_)(SECRET|PASSWORD|TOKEN|CREDENTIALS?|API_KEY|ACCESS_KEY)(_|$)", re.IGNORECASE)
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
_OF_A_JOB = {"runtime", "runtime_kind", "resources", "service_account"}


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Toleration(_Table):
    """A taint that the pool's pods accept; the fields are Kubernetes'."""

    key: str = Field(min_length=1)
    operator: Literal["Equal", "Exists"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Shared(_Table):
    """What all pools may have in common: how their pods reach the store, the registry and their images."""

    env: dict[Annotated[str, Field(pattern=_VARIABLE)], str] = Field(default_factory=dict, description="Variables of the pods.")
    secrets: dict[Annotated[str, Field(pattern=_VARIABLE)], Annotated[str, Field(pattern=_SECRET)]] = Field(
        default_factory=dict, description="Variables with the name/key of a Secret; values never leave the cluster."
    )
    image_pull_secrets: tuple[Annotated[str, Field(pattern=_NAME)], ...] = Field(
        default=(), description="Secrets with the registry's credentials."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    ca_bundle: str | None = Field(
        default=None, pattern=_SECRET, description="name/key of a ConfigMap: all certificates that connections are to trust."
    )
    labels: dict[Annotated[str, Field(pattern=_LABEL)], Annotated[str, Field(pattern=_LABEL_VALUE)]] = Field(
        default_factory=dict, description="Labels of the pods, for network policies, quotas and bills."
    )

    @model_validator(mode="after")
    def _each_variable_once(self) -> Self:
        if twice := sorted(self.env.keys() & self.secrets.keys()):
            raise ValueError(f"{', '.join(twice)} are in env and in secrets: leave one out")
        return self

    @field_validator("env", "secrets")
    @classmethod
    def _names_are_ours(cls, variables: dict[str, str]) -> dict[str, str]:
        if taken := sorted(variables.keys() & set(RESERVED)):
            raise ValueError(f"{', '.join(taken)} are set by the runtime: leave them out")
        return variables

    @field_validator("env")
    @classmethod
    def _values_are_no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        if telling := sorted(name for name, value in env.items() if _SECRECY.search(name) or _PASSWORD.search(value)):
            raise ValueError(f"{', '.join(telling)} look like secrets: give them in secrets, as name/key of a Secret")
        return env


class Pool(Shared):
    """What a task of this pool asks for."""

    image: str | None = Field(default=None, min_length=1, description="Image of all its tasks; none: what each one names.")
    accelerator: str | None = Field(default=None, min_length=1, description="Resource name, such as nvidia.com/gpu.")
    count: int = Field(default=0, ge=0, description="Accelerators of one pod.")
    cpu: str | None = Field(default=None, pattern=_QUANTITY, description="Cores requested.")
    memory: str | None = Field(default=None, pattern=_QUANTITY, description="Memory requested; also the limit.")
    shm: str | None = Field(
        default=None, pattern=_QUANTITY, description="Size of /dev/shm; torch and vLLM need more than 64 MiB."
    )
    scratch: str | None = Field(
        default=None, pattern=_QUANTITY, description="Disk at /tmp, an emptyDir: models are downloaded there."
    )
    selectors: dict[str, str] = Field(default_factory=dict, description="Node labels that must match.")
    node_affinity: NodeAffinity | None = Field(
        default=None, description="Node affinity in Kubernetes' own form, where selectors do not say enough."
    )
    tolerations: tuple[Toleration, ...] = ()
    queue: str | None = Field(
        default=None, pattern=_NAME, description="Kueue's local queue; for single pods Kueue's pod integration must be on."
    )
    priority_class: str | None = Field(default=None, pattern=_NAME, description="Kueue's WorkloadPriorityClass in that queue.")
    retries: int = Field(
        default=0, ge=0, le=10, description="Times a failed task starts again; a finished stage is never done twice."
    )
    timeout_minutes: int | None = Field(default=None, ge=1, description="Longest time of a pod, counted from its start.")

    @model_validator(mode="after")
    def _accelerator_has_count(self) -> Pool:
        if (self.accelerator is None) != (self.count == 0):
            raise ValueError("accelerator and count belong together: name the resource and how many, or leave both out")
        return self

    @model_validator(mode="after")
    def _priority_is_the_queue_s(self) -> Self:
        if self.priority_class and not self.queue:
            raise ValueError(
                "priority_class is Kueue's, so it needs a queue: neither KFP nor Kubeflow Trainer passes a pod's own priority "
                "class on; without Kueue set it in Argo's workflowDefaults or in the TrainingRuntime"
            )
        return self

    @property
    def pod_labels(self) -> dict[str, str]:
        """The labels of a pod, Kueue's among them."""
        return self.labels | kueue_labels(self.queue, self.priority_class)

    def sharing(self, shared: Shared) -> Self:
        """With what all pools share, where this one does not say otherwise."""
        own = self.env.keys() | self.secrets.keys()

        def others(variables: Mapping[str, str]) -> dict[str, str]:
            return {name: value for name, value in variables.items() if name not in own}

        return self.model_copy(
            update={
                "env": others(shared.env) | self.env,
                "secrets": others(shared.secrets) | self.secrets,
                "image_pull_secrets": self.image_pull_secrets or shared.image_pull_secrets,
                "image_pull_policy": self.image_pull_policy or shared.image_pull_policy,
                "ca_bundle": self.ca_bundle or shared.ca_bundle,
                "labels": shared.labels | self.labels,
            }
        )

    @property
    def variables(self) -> dict[str, str]:
        """Those of its pods, and which image they run, where it is named by its digest: the records of a run keep it."""
        digest = (self.image or "").partition("@")[2]
        return ({"CAMOPD_IMAGE_DIGEST": digest} if digest else {}) | self.env

    def place(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Ask for this pool's machines, and never let KFP's cache answer: it looks at URIs, not at what is behind them."""
        task.set_caching_options(False)
        if self.image:
            task.set_container_image(self.image)
        if self.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, list(self.image_pull_secrets))
        if self.image_pull_policy:
            kubernetes.set_image_pull_policy(task, self.image_pull_policy)
        if self.ca_bundle:
            kubernetes.use_config_map_as_volume(task, config_map_name=self.ca_bundle.split("/")[0], mount_path=CA_FOLDER)
        for variable, value in (trusting(self.ca_bundle, self.secrets) | self.variables).items():
            task.set_env_variable(variable, value)
        for variable, reference in self.secrets.items():  # one by one: two variables may want the same key
            secret, key = reference.split("/")
            kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env={key: variable})
        if self.accelerator:
            task.set_accelerator_type(self.accelerator).set_accelerator_limit(self.count)
        if self.cpu:
            task.set_cpu_request(self.cpu)
        if self.memory:
            task.set_memory_request(self.memory).set_memory_limit(self.memory)
        if self.shm:
            kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=self.shm)
        if self.scratch:
            kubernetes.empty_dir_mount(task, volume_name="scratch", mount_path="/tmp", size_limit=self.scratch)
        for label, value in self.selectors.items():
            kubernetes.add_node_selector(task, label_key=label, label_value=value)
        for toleration in self.tolerations:
            kubernetes.add_toleration(task, **toleration.model_dump())
        if self.node_affinity:
            kubernetes.add_node_affinity_json(task, self.node_affinity.as_kubernetes())
        for label, value in self.pod_labels.items():
            kubernetes.add_pod_label(task, label_key=label, label_value=value)
        if self.retries:
            task.set_retry(self.retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")
        if self.timeout_minutes:
            kubernetes.set_timeout(task, self.timeout_minutes * 60)
        return task


class TrainingPool(Pool):
    """What training asks for: one pod, or with ``nodes`` above 1 the pods of a TrainJob that the train step launches.

    Image, pull secrets, variables, labels, accelerators, cores, memory, shared memory, selectors, affinity and tolerations are
    then those of each pod; timeout, queue and priority are the job's; the step itself runs on the cpu pool, with this one's
    retries.
    """

    nodes: int = Field(default=1, ge=1, le=999, description="Pods that train together.")
    runtime: str | None = Field(
        default=None, pattern=_NAME, description="Kubeflow Trainer's runtime, such as torch-distributed."
    )
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    resources: dict[str, Annotated[str, Field(pattern=_QUANTITY)]] = Field(
        default_factory=dict, description="Other resources of a pod, such as network cards."
    )
    service_account: str | None = Field(default=None, pattern=_NAME, description="Of the job's pods; none is the runtime's.")

    @model_validator(mode="after")
    def _job_or_pod(self) -> TrainingPool:
        if self.nodes > 1 and self.runtime is None:
            raise ValueError('nodes above 1 need a runtime of Kubeflow Trainer, such as runtime = "torch-distributed"')
        if self.nodes > 1 and self.image_pull_policy:
            raise ValueError("image_pull_policy of a job's pods is the runtime's: leave it out, and say it there")
        if self.nodes == 1 and (set_ := self.model_fields_set & _OF_A_JOB):
            raise ValueError(
                f"{', '.join(sorted(set_))} belong to a job on several nodes: set nodes above 1, or leave them out"
            )
        return self

    def train(self, component: Callable[..., dsl.PipelineTask], *, round_uri: Any, launched_from: Pool) -> dsl.PipelineTask:
        """The train step: on this pool, or on the cpu pool as the one that launches the job and waits for it."""
        if self.nodes == 1:
            return self.place(component(round_uri=round_uri))
        launcher = launched_from.model_copy(update={"retries": self.retries, "timeout_minutes": None})
        return launcher.place(component(round_uri=round_uri, job=self.job()))

    def job(self) -> str:
        """The job's description, a constant of the compiled file. Text, since numbers of a STRUCT arrive as floats."""
        fields = {name: getattr(self, name) for name in JobSpec.model_fields}
        fields["image"] = self.image or TRAINER
        fields["env"] = self.variables
        fields["node_affinity"] = self.node_affinity.as_kubernetes() if self.node_affinity else {}
        fields["tolerations"] = tuple(toleration.model_dump(exclude_none=True) for toleration in self.tolerations)
        return JobSpec(**fields).model_dump_json(exclude_defaults=True)


class Pools(_Table):
    """The pools: ``cpu`` decides and registers, ``inference`` samples and scores, ``training`` updates.

    ``colocated`` is for the one pod of ``execution = "colocated"``, which is one process: its GPU is larger or its image
    another where it is named, and it is ``training``'s where not. What stands under ``all`` is every pool's.
    """

    all: Shared = Shared()
    cpu: Pool = Pool()
    inference: Pool = Pool()
    training: TrainingPool = TrainingPool()
    colocated: Pool | None = None

    @model_validator(mode="after")
    def _cpu_is_cpu(self) -> Pools:
        if self.cpu.accelerator:
            raise ValueError("the cpu pool must not ask for an accelerator: its tasks also start for rounds that are done")
        return self

    def spread(self) -> Pools:
        """Each pool with what all of them share."""
        named = {name: pool.sharing(self.all) for name, pool in self if isinstance(pool, Pool)}
        return self.model_copy(update={"all": Shared(), **named})


def load_pools(path: Path | None) -> Pools:
    """Read a pools file, each pool with what all of them share; None is everything on CPU.

    Args:
        path: TOML, or JSON where the name ends in ``.json``.

    Raises:
        InputError: the file is missing, cannot be parsed, or holds something else than pools; every problem is named.
    """
    if path is None:
        return Pools()
    kind, parse = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError([Problem(str(path), "no such file", "give the path of a pools file, or none for CPU")]) from None
    except ValueError as error:  # of either parser
        raise InputError([Problem(str(path), f"is not {kind}: {error}", "see pipelines/pools.example.toml")]) from None
    return check_pools(values, str(path))


def check_pools(values: Any, source: str) -> Pools:
    """The pools that a file's tables say, each with what all of them share.

    Args:
        values: the tables, as parsed.
        source: whose they are, for messages.

    Raises:
        InputError: every problem, by name.
    """
    try:
        return Pools.model_validate(values).spread()
    except ValidationError as error:
        raise InputError([_problem(source, entry["loc"], entry["type"], entry["msg"]) for entry in error.errors()]) from None


_NAMED = "write the name of a Kubernetes object: small letters, digits, dots and hyphens"
_PATTERNS = {
    "": 'write a Kubernetes quantity, such as "16" or "64Gi"',
    "runtime": _NAMED,
    "service_account": _NAMED,
    "queue": _NAMED,
    "priority_class": _NAMED,
    "labels": "write a Kubernetes label: letters, digits, dots, hyphens and underscores, at most 63",
    "image_pull_secrets": _NAMED,
    "env": "write the name of a variable: letters, digits and underscores",
    "ca_bundle": 'write "configmap-name/key"',
    "secrets": 'write VARIABLE = "secret-name/key"',
}


def _problem(source: str, place: tuple[int | str, ...], kind: str, message: str) -> Problem:
    fixes = {
        "extra_forbidden": "the tables are all, cpu, inference, training and colocated; see pipelines/pools.example.toml",
        "string_pattern_mismatch": _PATTERNS.get(place[1] if len(place) > 1 else "", _PATTERNS[""]),
    }
    where = ".".join(map(str, place))
    return Problem(f"{source}: {where}", message.removeprefix("Value error, "), fixes.get(kind, ""))
