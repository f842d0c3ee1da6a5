"""The pools file: which machines each kind of task asks for. Read when the pipeline is compiled.

It belongs to the platform's engineer, not to the run form: accelerators, selectors, tolerations, shared memory, retries and
timeouts are constants of the compiled file. Without a pools file everything runs on CPU and asks for nothing.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from kfp import dsl, kubernetes
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from camopd.errors import InputError, Problem
from components import IMAGE

_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Toleration(_Table):
    """A taint that the pool's pods accept; the fields are Kubernetes'."""

    key: str = Field(min_length=1)
    operator: Literal["Equal", "Exists"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Pool(_Table):
    """What a task of this pool asks for."""

    image: str = Field(default=IMAGE, min_length=1, description="Image that holds the package.")
    accelerator: str | None = Field(default=None, min_length=1, description="Resource name, such as nvidia.com/gpu.")
    count: int = Field(default=0, ge=0, description="Accelerators of one pod.")
    cpu: str | None = Field(default=None, pattern=_QUANTITY, description="Cores requested.")
    memory: str | None = Field(default=None, pattern=_QUANTITY, description="Memory requested; also the limit.")
    shm: str | None = Field(
        default=None, pattern=_QUANTITY, description="Size of /dev/shm; torch and vLLM need more than 64 MiB."
    )
    selectors: dict[str, str] = Field(default_factory=dict, description="Node labels that must match.")
    tolerations: tuple[Toleration, ...] = ()
    retries: int = Field(
        default=0, ge=0, le=10, description="Times a failed task starts again; a finished stage is never done twice."
    )
    timeout_minutes: int | None = Field(default=None, ge=1, description="Longest time of a pod, counted from its start.")

    @model_validator(mode="after")
    def _accelerator_has_count(self) -> Pool:
        if (self.accelerator is None) != (self.count == 0):
            raise ValueError("accelerator and count belong together: name the resource and how many, or leave both out")
        return self

    def place(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Ask for this pool's machines, and never let KFP's cache answer: it looks at URIs, not at what is behind them."""
        task.set_caching_options(False)
        task.set_container_image(self.image)
        if self.accelerator:
            task.set_accelerator_type(self.accelerator).set_accelerator_limit(self.count)
        if self.cpu:
            task.set_cpu_request(self.cpu)
        if self.memory:
            task.set_memory_request(self.memory).set_memory_limit(self.memory)
        if self.shm:
            kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=self.shm)
        for label, value in self.selectors.items():
            kubernetes.add_node_selector(task, label_key=label, label_value=value)
        for toleration in self.tolerations:
            kubernetes.add_toleration(task, **toleration.model_dump())
        if self.retries:
            task.set_retry(self.retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")
        if self.timeout_minutes:
            kubernetes.set_timeout(task, self.timeout_minutes * 60)
        return task


class Pools(_Table):
    """The pools: ``cpu`` decides and registers, ``inference`` samples and scores, ``training`` updates.

    ``colocated`` is for the one pod of ``execution = "colocated"``, which is one process: its GPU is larger or its image
    another where it is named, and it is ``training``'s where not.
    """

    cpu: Pool = Pool()
    inference: Pool = Pool()
    training: Pool = Pool()
    colocated: Pool | None = None

    @model_validator(mode="after")
    def _cpu_is_cpu(self) -> Pools:
        if self.cpu.accelerator:
            raise ValueError("the cpu pool must not ask for an accelerator: its tasks also start for rounds that are done")
        return self


def load_pools(path: Path | None) -> Pools:
    """Read a pools file; None is everything on CPU.

    Raises:
        InputError: the file is missing, not TOML, or holds something else than pools; every problem is named.
    """
    if path is None:
        return Pools()
    try:
        return Pools.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError([Problem(str(path), "no such file", "give the path of a pools file, or none for CPU")]) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError([Problem(str(path), f"is not TOML: {error}", "see pipelines/pools.example.toml")]) from None
    except ValidationError as error:
        raise InputError([_problem(path, entry["loc"], entry["type"], entry["msg"]) for entry in error.errors()]) from None


def _problem(path: Path, place: tuple[int | str, ...], kind: str, message: str) -> Problem:
    fixes = {
        "extra_forbidden": "the pools are cpu, inference, training and colocated; see pipelines/pools.example.toml",
        "string_pattern_mismatch": 'write a Kubernetes quantity, such as "16" or "64Gi"',
    }
    where = ".".join(map(str, place))
    return Problem(f"{path}: {where}", message.removeprefix("Value error, "), fixes.get(kind, ""))
