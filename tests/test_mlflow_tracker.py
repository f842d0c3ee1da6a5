"""Rules of the MLflow adapter that need no MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from camopd.tracking.mlflow_tracker import reconciled, redact

SOURCES = Path(__file__).parents[1] / "src" / "camopd"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@mlflow:5000/x failed", "http://***@mlflow:5000/x failed"),
        ("http://user:p@ss@mlflow:5000", "http://***@mlflow:5000"),
        ("postgresql+psycopg2://u:p@db/mlflow and s3://bucket/key", "postgresql+psycopg2://***@db/mlflow and s3://bucket/key"),
        ("http://mlflow:5000/?who=a@b.c", "http://mlflow:5000/?who=a@b.c"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_parameter_is_written_once() -> None:
    params, tags = {"lr": "1e-06", "rounds": "30"}, {"camopd.now.rounds": "40"}
    new, changed = reconciled({"lr": "2e-06", "rounds": "30", "seed": "1"}, params, tags)
    assert new == {"seed": "1"}
    assert changed == {"camopd.now.lr": "2e-06", "camopd.now.rounds": "30"}


def test_only_one_file_knows_mlflow() -> None:
    knowing = {
        path.name for path in SOURCES.rglob("*.py") if "import mlflow" in path.read_text() or "from mlflow" in path.read_text()
    }
    assert knowing == {"mlflow_tracker.py"}
