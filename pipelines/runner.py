"""KFP's local runner on the compiled pipeline.

``pipelines.local`` starts it as ``python -m pipelines.runner <run form as JSON> <folder>``, in a session of its own. The stages
run as processes of this Python, in this folder, with this environment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from pipelines.warm import use_warm_starts

COMPILED = Path(__file__).with_name("recovery.yaml")


def run_compiled(parameters: Mapping[str, str | bool], *, root: Path, compiled: Path = COMPILED) -> None:
    """Run the compiled file to its end. In a script of yours it belongs under ``if __name__ == "__main__"`` (multiprocessing).

    Args:
        parameters: values of the run form; the rest keep their defaults.
        root: folder for KFP's own small artifacts.
        compiled: the compiled pipeline.

    Raises:
        RuntimeError: a task failed; the message names it.
    """
    from kfp import components, local

    use_warm_starts()
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), raise_on_error=True)
    components.load_component_from_file(str(compiled))(**parameters)


def _end_with(parent: int) -> None:
    """End this process group when the one that started it is gone: the next start must not race with what is left of this."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    run_compiled(json.loads(sys.argv[1]), root=Path(sys.argv[2]))
