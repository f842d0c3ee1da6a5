"""A recipe on the example's models with a few prompts and tokens: seconds a run, every stage real."""

from pathlib import Path

import pytest

MICRO = Path("examples/micro").absolute()
RECIPE = f"""
name = "graph"
student = "{MICRO}/domain"
num_threads = 1
[[branches]]
name = "general"
role = "recover"
teacher = "{MICRO}/general"
prompts = "{MICRO}/prompts/general.jsonl"
tasks = ["micro_seen"]
[[branches]]
name = "domain"
role = "retain"
teacher = "{MICRO}/general" # a teacher that scores above zero: the gate's shares are defined, and it passes
prompts = "{MICRO}/prompts/domain.jsonl"
tasks = ["micro_seen"]
[rollout]
prompts_per_step = 4
max_new_tokens = 4
max_empty_fraction = 1.0
[evaluate]
task_dir = "{MICRO}/tasks"
limit = 4
curve_points = 0
bootstrap = 100
[gate]
min_recovered = -1e9
min_retained = 0.0
"""


@pytest.fixture
def small_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path
