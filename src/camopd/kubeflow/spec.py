"""What a compiled pipeline says of itself: its run form, its steps, their images and variables. Pure, and without kfp.

A spec is what the API returns for a version: the pipeline alone, or ``pipeline_spec`` beside ``platform_spec``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Spec = Mapping[str, Any]


def inputs_of(spec: Spec) -> Mapping[str, Mapping[str, Any]]:
    """The fields of the run form: name -> ``parameterType``, ``defaultValue``."""
    return _pipeline(spec).get("root", {}).get("inputDefinitions", {}).get("parameters", {})


def name_of(spec: Spec) -> str:
    return str(_pipeline(spec)["pipelineInfo"]["name"])


def steps_of(spec: Spec) -> dict[str, str]:
    """The steps that run in containers: name of Argo's node -> what people read, ``Rollout: sample the student``."""
    pipeline = _pipeline(spec)
    components = pipeline.get("components", {})
    return {
        key: task.get("taskInfo", {}).get("name", key)
        for key, task in _tasks(pipeline)
        if "executorLabel" in components.get(task["componentRef"]["name"], {})
    }


def component_of(spec: Spec, step: str) -> str:
    """The word of the stage that a step does: ``rollout`` for the node ``rollout-2``."""
    found = next((task["componentRef"]["name"] for key, task in _tasks(_pipeline(spec)) if key == step), step)
    words = str(found).removeprefix("comp-").rsplit("-", 1)
    return words[0] if len(words) == 2 and words[1].isdigit() else "-".join(words)


def image_of(spec: Spec, stage: str) -> str:
    """Image of the first step that does the stage; empty where none does."""
    return next((str(container.get("image", "")) for container in _containers(spec, stage)), "")


def variable_of(spec: Spec, stage: str, name: str) -> str:
    """Value of an environment variable of that step, where it stands in the file; empty for none, and for a Secret's."""
    entries = [entry for container in _containers(spec, stage) for entry in container.get("env", ())]
    return next((str(entry.get("value", "")) for entry in entries if entry.get("name") == name), "")


def template_of(spec: Spec, step: str) -> str:
    """Name of Argo's template for the step's pod, which is part of the pod's name (KFP's argocompiler/container.go)."""
    pipeline = _pipeline(spec)
    task = next((task for key, task in _tasks(pipeline) if key == step), {})
    label = pipeline.get("components", {}).get(task.get("componentRef", {}).get("name", ""), {}).get("executorLabel", "")
    executors = (
        spec.get("platform_spec", {}).get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    )
    pod = executors.get(label, {}).get("podMetadata")
    metadata = f"metadata-{len(pod.get('annotations', {}))}-{len(pod.get('labels', {}))}-" if pod is not None else ""
    return f"{metadata}{'retry-' if 'retryPolicy' in task else ''}system-container-impl"


def _pipeline(spec: Spec) -> Spec:
    return spec.get("pipeline_spec", spec)


def _tasks(pipeline: Spec) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for component in (pipeline.get("root", {}), *pipeline.get("components", {}).values()):
        yield from component.get("dag", {}).get("tasks", {}).items()


def _containers(spec: Spec, stage: str) -> Iterator[Mapping[str, Any]]:
    pipeline = _pipeline(spec)
    executors = pipeline.get("deploymentSpec", {}).get("executors", {})
    label = pipeline.get("components", {}).get(f"comp-{stage}", {}).get("executorLabel", "")
    if "container" in executors.get(label, {}):
        yield executors[label]["container"]
