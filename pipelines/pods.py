"""How many pods the compiled graph starts, for `camopd plan`: written beside it whenever it is compiled.

By the rules of KFP 2.17's compiler for Argo (its compiler/argocompiler/dag.go): a driver for each task and an executor if it is
no graph, a driver for each graph, loop and condition, and one for each turn of a loop.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import camopd.estimate.pods

COUNTED = Path(camopd.estimate.pods.__file__).with_name("pods.json")
DRIVER, EXECUTOR = 1, 1


def pods_of(spec: Mapping[str, Any]) -> dict[str, int]:
    """Pods by where they are started: outside of all loops and conditions (an empty name), in each turn of ``rounds``, in each
    turn of ``rounds`` that takes the way ``go``, ``rounds/go``, and so on, by the names that people see.

    Args:
        spec: the compiled pipeline.
    """
    found = Counter({"": DRIVER})

    def count(dag: Mapping[str, Any], path: str) -> None:
        for task in dag["tasks"].values():
            inner = spec["components"][task["componentRef"]["name"]].get("dag")
            found[path] += DRIVER if inner else DRIVER + EXECUTOR
            if inner:
                loop, condition = "parameterIterator" in task, "condition" in task.get("triggerPolicy", {})
                below = f"{path}/{task['taskInfo']['name']}".lstrip("/") if loop or condition else path
                found[below] += DRIVER * loop
                count(inner, below)

    count(spec["root"]["dag"], "")
    return dict(sorted(found.items()))


def write_pods(compiled: Path, target: Path = COUNTED) -> None:
    """Count the pods of a compiled file, and write them where `camopd plan` reads them."""
    spec = next(yaml.safe_load_all(compiled.read_text(encoding="utf-8")))
    target.write_text(json.dumps(pods_of(spec), indent=1) + "\n", encoding="utf-8")
