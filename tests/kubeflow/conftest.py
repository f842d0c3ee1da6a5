"""The API server, the command line, and an environment that names no cluster of anybody's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from camopd.cli import main
from camopd.kubeflow import watch
from tests.fixtures.kfp_api import kfp, kfp_teams

__all__ = ["kfp", "kfp_teams"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nobodys_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("KFP_", "KF_PIPELINES_", "KUBE", "CAMOPD_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr(watch, "EVERY", 0.02)


@pytest.fixture
def camopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command line in this process: exit code, and what it printed on both streams."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["camopd", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), said.out + said.err

    return run
