"""KFP's local runner on the compiled pipeline.

``pipelines.local`` starts it as ``python -m pipelines.runner <run form as JSON> <folder>``, in a session of its own. The stages
run as processes of this Python, in this folder, with this environment; or in containers, given the folders they see as JSON.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.containers import Folders, docker_runner
from pipelines.warm import use_warm_starts

COMPILED = Path(__file__).with_name("recovery.yaml")


def run_compiled(
    parameters: Mapping[str, str | bool], *, root: Path, compiled: Path = COMPILED, containers: Folders | None = None
) -> None:
    """Run the compiled file to its end. In a script of yours it belongs under ``if __name__ == "__main__"`` (multiprocessing).

    Args:
        parameters: values of the run form; the rest keep their defaults.
        root: folder for KFP's own small artifacts.
        compiled: the compiled pipeline.
        containers: run each task in a container of its image, which sees these folders; None: in processes.

    Raises:
        RuntimeError: a task failed; the message names it.
    """
    from kfp import components, local

    if containers is None:
        use_warm_starts()
        start = contextlib.nullcontext(local.SubprocessRunner(use_venv=False))
    else:
        start = docker_runner(containers)
    with start as runner, restored_print():
        local.init(runner, pipeline_root=str(root), raise_on_error=True)
        components.load_component_from_file(str(compiled))(**parameters)


@contextlib.contextmanager
def restored_print() -> Iterator[None]:
    """kfp indents what is printed while it reports, from several threads at once, and may leave its own ``print`` behind."""
    before = builtins.print
    try:
        yield
    finally:
        builtins.print = before


def _end_with(parent: int) -> None:
    """End this process group when the one that started it is gone: the next start must not race with what is left of this."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    form, root, *folders = sys.argv[1:]
    run_compiled(json.loads(form), root=Path(root), containers=Folders(**json.loads(folders[0])) if folders else None)
