"""A server, a round to train, and the function under test with looks in quick succession."""

from collections.abc import Callable
from pathlib import Path

import pytest

from camopd import plan as layout
from camopd.store import Store
from camopd.trainjob import JobSpec, follow, launch_and_follow
from tests.finished import make_plan
from tests.fixtures.kubernetes_api import Api
from tests.trainjob.jobs import SPEC


@pytest.fixture
def api(kubernetes: Api) -> Api:
    return kubernetes


@pytest.fixture
def round_uri(tmp_path: Path) -> str:
    plan = make_plan(str(tmp_path / "runs"), Store())
    return layout.round_uri(plan.run_uri, 1)


@pytest.fixture
def train(api: Api, round_uri: str, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Launch and follow, with looks in quick succession."""
    monkeypatch.setattr(follow, "GRACE", 0.2)

    def run(spec: JobSpec = SPEC):
        return launch_and_follow(spec.model_dump_json(), round_uri, store=Store(), poll=0.02)

    return run
