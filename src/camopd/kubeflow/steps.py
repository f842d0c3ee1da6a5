"""Where a run stands, read from what the API tells of it: Argo's nodes, without a word on which belongs to which. Pure.

A container step ``rollout`` is three nodes or more: ``rollout-driver``, ``rollout``, in it ``executor``, and where the step may
be retried ``executor(0)`` and so on. Loops and conditions are nodes, too: ``for-loop-2``, ``iteration-item``. So a step is a
node whose name the compiled pipeline has for a container.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from camopd.kubeflow.spec import Spec, component_of, steps_of, template_of

DONE = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
AT_WORK = ("RUNNING", "PENDING")


@dataclass(frozen=True)
class Step:
    """A container step that has begun.

    Attributes:
        name: Argo's, ``rollout-2``.
        stage: the component's word, ``rollout``.
        title: what people read.
        state: KFP's word.
        start: seconds of the epoch.
        end: as start; 0 while it runs.
        pods: names that its pods may have, the last attempt first.
    """

    name: str
    stage: str
    title: str
    state: str
    start: float
    end: float
    pods: tuple[str, ...] = ()


def steps(tasks: list[Any], spec: Spec) -> list[Step]:
    """The container steps that have begun, by their start.

    Args:
        tasks: V2beta1PipelineTaskDetail, as a run has them.
        spec: of the run's pipeline.
    """
    titles = steps_of(spec)
    found = []
    for task in tasks:
        start, end = _seconds(task.start_time), _seconds(task.end_time)
        if task.display_name in titles and start:
            stage = component_of(spec, task.display_name)
            pods = tuple(_pods(task, tasks, template_of(spec, task.display_name)))
            found.append(Step(task.display_name, stage, titles[task.display_name], str(task.state), start, end, pods))
    return sorted(found, key=lambda step: (step.start, step.name))


def failed_step(tasks: list[Any], spec: Spec) -> Step | None:
    """The step that failed first; where none did, the one whose driver did: what decides about it before its pod starts."""
    own = [step for step in steps(tasks, spec) if step.state == "FAILED"]
    if own:
        return min(own, key=lambda step: (step.end or step.start, step.start))
    titles = steps_of(spec)
    drivers = [task for task in tasks if task.state == "FAILED" and task.display_name.endswith("-driver")]
    for task in sorted(drivers, key=lambda task: _seconds(task.end_time)):
        name = task.display_name.removesuffix("-driver")
        title = f"{titles.get(name, name)}, before its pod was started"
        return Step(name, component_of(spec, name), title, "FAILED", _seconds(task.start_time), _seconds(task.end_time))
    return None


def board_line(begun: list[Step], tasks: list[Any], *, finished: int | None) -> Mapping[str, Any] | None:
    """What is at work, in the form of a stage's own progress line (camopd.progress); None where nothing has begun.

    Args:
        begun: of the run.
        tasks: all its nodes.
        finished: rounds that have their checkpoint, where the store tells.
    """
    if not begun:
        return None
    at_work = [step for step in begun if step.state in AT_WORK]
    last = at_work[0] if at_work else begun[-1]
    turns = [step.start for step in begun if step.stage == "begin" and step.start <= last.start]
    after = last.stage in ("evaluate", "promote", "report-outcome")
    number = 0 if after else (finished or 0) + 1 if last.stage == "recover" else len(turns)
    same = [step for step in begun if step.stage == last.stage and (not turns or step.start >= turns[-1])]
    waiting = last.state in AT_WORK and any(
        task.state == "PENDING" and re.fullmatch(r"executor(\(\d+\))?", task.display_name) for task in tasks
    )
    several = len(same) > 1
    return {
        "stage": last.stage,
        "round": number,
        "branch": "",
        "done": sum(step.state in DONE for step in same) if several else 0,
        "total": len(same) if several else 0,
        "unit": "steps",
        "tokens_per_second": 0,
        "time": last.start,
        "note": "waiting for a pod to start" if waiting else "",
    }


def _pods(task: Any, tasks: list[Any], template: str) -> Iterator[str]:
    """``<workflow>-<template>-<hash>``, as Argo names pods, from the nodes below the step and below its attempts."""
    below = [child.pod_name for child in task.child_tasks or () if child.pod_name]
    if "retry-" in template:  # what is below the step is not a pod, but holds its attempts
        failed = [other for other in tasks if other.display_name == "executor" and other.state == task.state]
        own = [other for other in failed if (other.start_time, other.end_time) == (task.start_time, task.end_time)] or failed
        below = [child.pod_name for other in own for child in other.child_tasks or () if child.pod_name]
    for node in reversed(below):
        workflow, _, number = node.rpartition("-")
        yield f"{workflow}-{template}-{number}"


def _seconds(time: datetime | None) -> float:
    """0 for what has not happened: the API says nothing, or that it was in 1970 or in the year 1."""
    return time.timestamp() if time is not None and time.year > 1970 else 0.0
