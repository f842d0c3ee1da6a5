"""`camopd check`: is what a run needs within reach?"""

from __future__ import annotations

import os

import typer


def check() -> None:
    """Try what the environment names: the output can be written and read, MLflow and its registry answer.

    **Reads** CAMOPD_OUTPUT, MLFLOW_TRACKING_URI and what S3 and MLflow want. **Writes** one small object, `.camopd-check`,
    into the output. `helm test` runs it inside of a cluster.
    """
    from camopd.check import check as try_all
    from camopd.store import Store

    for sentence in try_all(os.environ, store=Store()):
        typer.echo(sentence)
