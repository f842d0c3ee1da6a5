"""What the environment names, tried: can a pod write where runs go, does MLflow answer? `helm test` asks it in a cluster."""

from __future__ import annotations

from collections.abc import Mapping

from camopd.config import OUTPUT
from camopd.errors import CamopdError, InputError, Problem
from camopd.store import Store, check_uri, join

PROBE = ".camopd-check"  # the same object each time, so that nothing has to be deleted
TRACKING = "MLFLOW_TRACKING_URI"


def check(environment: Mapping[str, str], *, store: Store) -> list[str]:
    """What was tried and works, a sentence each.

    Args:
        environment: the process's variables; CAMOPD_OUTPUT and MLFLOW_TRACKING_URI are looked at.
        store: where to write.

    Raises:
        InputError: what does not, all of it at once.
    """
    done, problems = [], []
    for variable, attempt in ((OUTPUT, _output), (TRACKING, _tracking)):
        try:
            done.append(attempt(environment.get(variable, ""), store))
        except (CamopdError, ValueError) as error:
            problems.append(Problem(variable, str(error)))
    if problems:
        raise InputError(problems)
    return done


def _output(output: str, store: Store) -> str:
    if not output:
        raise ValueError("is not set, so a run goes where its recipe says: set the chart's value output to an s3:// prefix")
    place, written = join(check_uri(output), PROBE), b"written by `camopd check`\n"
    store.write(place, written)
    if store.read(place) != written:
        raise ValueError(f"{place} does not hold what was written there")
    return f"Output {output}: written and read back"


def _tracking(uri: str, store: Store) -> str:
    if not uri:
        return f"{TRACKING} is not set: runs keep their records in the output alone, and nothing is registered"
    from camopd.tracking.mlflow_tracker import MlflowTracker, redact

    MlflowTracker(uri, "camopd").registry("camopd-check").versions()  # of a model that is not there: none
    return f"MLflow {redact(uri)}: answers, the registry too"
