"""The compiled pipeline with training on two nodes, by KFP's local runner: the job's description goes all the way."""

import pytest

from pipelines.compile import compile_pipeline
from pipelines.runner import run_compiled
from tests.fixtures.torchrun_nodes import nodes_for
from tests.integration.runs import checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Task .* have no effect", "ignore:You may be attemping to run"),  # by KFP
]
POOLS = """
[training]
nodes = 2
runtime = "torch-distributed"
env = { OMP_NUM_THREADS = "1" }
"""


def test_the_compiled_pipeline_trains_on_two_nodes(small_recipe, kubernetes, mlflow_sqlite, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_sqlite)
    (tmp_path / "pools.toml").write_text(POOLS)
    compile_pipeline(tmp_path / "recovery.yaml", tmp_path / "pools.toml")
    form = {"input_recipe": str(small_recipe), "output_uri": str(tmp_path / "runs"), "method_num_rounds": "2"}
    with nodes_for(kubernetes):
        run_compiled({**form, "output_promote": False}, root=tmp_path / "kfp", compiled=tmp_path / "recovery.yaml")
    assert kubernetes.asked.count(("create", "trainjobs")) == 2, "one a round"
    assert kubernetes.jobs == {}
    (folder,) = (tmp_path / "runs").glob("graph-*")
    assert len(checkpoints(str(folder))) == 2
    assert "finished" in next(tmp_path.glob("kfp/*/report-outcome/outcome")).read_text(encoding="utf-8")
