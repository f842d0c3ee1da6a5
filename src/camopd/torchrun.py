"""``torchrun ... -m camopd.train <round_uri>``: the training stage as one of the processes that torchrun has started.

On one node or several, which share nothing but the store. Whoever started the job finds in ``<round>/train-failure.json`` why
it failed (camopd.failures).
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from camopd.errors import CamopdError
from camopd.failures import forget_failure, leave_failure
from camopd.group import join_group
from camopd.store import Store, check_uri


def main() -> NoReturn:
    """Join the other processes, do the round's updates with them, and leave word if that fails."""
    if len(sys.argv) != 2 or "RANK" not in os.environ:
        sys.exit(
            "usage: torchrun [options of torchrun] -m camopd.train <run>/rounds/0001; on one machine `camopd train` will do"
        )
    place = sys.argv[1]
    round_uri = check_uri(place if "://" in place else str(Path(place).absolute()))
    rank, size, store = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Store()
    try:
        group = join_group("env://")
        if rank == 0:
            forget_failure(round_uri, store)
        group.gather(None)
        from camopd.train import share  # a module of its own name, not the one that is run

        share(round_uri)
        group.gather(None)  # nobody leaves while another may still read from it
    except Exception as error:  # whatever it is, who started the job has to be told
        if isinstance(error, CamopdError):
            print(f"Error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        leave_failure(round_uri, error, rank=rank, size=size, store=store)
        _end(1)
    _end(0)


def _end(code: int) -> NoReturn:
    """At once: taking the group down can wait for a neighbour that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
