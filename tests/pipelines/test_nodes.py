"""The compiled pipeline with training on two nodes, by KFP's local runner: the job's description goes all the way."""

import pytest

from pipelines.compile import compile_pipeline
from pipelines.runner import run_compiled
from tests.fixtures.torchrun_nodes import nodes_for

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


def test_the_compiled_pipeline_trains_on_two_nodes(small_recipe, api, tmp_path):
    """By KFP's local runner: the job's description goes through the compiled file and KFP's executor."""
    pools = tmp_path / "pools.toml"
    pools.write_text('[training]\nnodes = 2\nruntime = "torch-distributed"\nenv = { OMP_NUM_THREADS = "1" }\n')
    compile_pipeline(tmp_path / "recovery.yaml", pools)
    form = {"input_recipe": str(small_recipe), "output_uri": str(tmp_path / "runs"), "method_num_rounds": "2"}
    with nodes_for(api):
        run_compiled({**form, "output_promote": False}, root=tmp_path / "kfp", compiled=tmp_path / "recovery.yaml")
    assert api.asked.count(("create", "trainjobs")) == 2, "one a round"
    (folder,) = (tmp_path / "runs").glob("graph-*")
    assert len(list(folder.glob("rounds/*/train/manifest.json"))) == 2
    assert api.jobs == {}
