"""Components outside our own graph: as files, and in somebody else's pipeline (docs/components.md)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kfp import components, dsl

from camopd.records import read_table
from pipelines.compile import compile_components

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from kfp import local
from pipeline import on_policy_answers
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1], raise_on_error=True)
on_policy_answers(recipe="micro", output_uri=sys.argv[2])
"""


def test_each_component_is_a_file_that_kfp_loads_without_our_package(tmp_path):
    files = compile_components(tmp_path / "out")
    loaded = {file.stem: components.load_component_from_file(str(file)) for file in files}
    assert {"prepare", "rollout", "score", "select", "train", "evaluate", "promote"} <= loaded.keys()
    assert loaded["score"].component_spec.inputs.keys() == {"score_uri"}
    needed = {name for name, given in loaded["prepare"].component_spec.inputs.items() if not given.optional}
    assert needed == {"recipe"}, "everything but the recipe may be left out"

    @dsl.pipeline
    def theirs(recipe: str):
        loaded["prepare"](recipe=recipe)

    assert "prepare" in theirs.pipeline_spec.root.dag.tasks


@pytest.mark.slow
def test_the_example_pipeline_hands_over_what_selection_kept(tmp_path):
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}/src:{ROOT}:{ROOT / 'examples' / 'own_pipeline'}",
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", RUN, str(tmp_path / "kfp"), str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    (selection,) = (tmp_path / "runs").glob("*/rounds/0001/select/selection.parquet")
    chosen = [row for row in read_table(selection, "selection") if row["kept"]]
    (kept,) = (tmp_path / "kfp").glob("**/hand-over/kept")
    handed = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(row["prompt_id"], row["branch"], row["score"]) for row in handed] == [
        (row["prompt_id"], row["branch"], row["score"]) for row in chosen
    ]
    assert {row["branch"] for row in handed} == {"general", "domain"}
    assert not list((tmp_path / "runs").glob("*/rounds/0001/train/manifest.json")), "nothing is trained"
