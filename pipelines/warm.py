"""Warm starts for the local runner: components run in processes forked from one that has imported the heavy libraries.

A task takes the local runner 0.06 s, but three of four then import torch, transformers and MLflow anew: 4 to 6 s each, half of
a small run. The standard library's fork server imports them once. Pods on a cluster start as they always do.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from camopd.tracking.mlflow_tracker import ENVIRONMENT

# Loops run in threads. A start looks after all other children, too, and of two that look after one at the same time one finds
# its exit code gone and makes it 255.
_CHILDREN = threading.Lock()
PRELOADED = ["camopd.train", "mlflow"]  # none of them starts a thread, so that forking is safe


def use_warm_starts() -> None:
    """Let kfp's subprocess runner start its components by ``run_component``: the one function of it that starts a process."""
    from kfp.local import subprocess_task_handler

    for name, value in ENVIRONMENT.items():  # MLflow reads some of it at import, which the fork server does for all
        os.environ.setdefault(name, value)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    subprocess_task_handler.run_local_subprocess = run_component


def run_component(full_command: Sequence[str], env_vars: Mapping[str, str] | None = None) -> int:
    """Run a lightweight component as its command would, in a forked process, and return the exit code.

    Args:
        full_command: ``sh -ec <script> <source> --executor_input <json> --function_to_execute <name>``; the script writes the
            source to a file and starts kfp's executor on it, which ``_execute`` does in its place.
        env_vars: environment of the component on top of ours; a fork has the fork server's, so that all of it is handed over.
    """
    _, _, script, source, *arguments = full_command
    assert "kfp.dsl.executor_main" in script, "not the command of a lightweight component"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_execute, args=(source, arguments, {**os.environ, **(env_vars or {})}, os.getcwd()))
    with _CHILDREN:
        process.start()
    wait([process.sentinel])
    with _CHILDREN:
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _execute(source: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment, _KFP_RUNTIME="true")  # before kfp is imported: the lean half of it is enough
    from kfp.dsl import executor_main

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "ephemeral_component.py")
        path.write_text(source, encoding="utf-8")
        sys.argv = ["executor_main", "--component_module_path", str(path), *arguments]
        executor_main.executor_main()
