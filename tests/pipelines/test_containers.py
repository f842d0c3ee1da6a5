"""What a container of the pipeline sees of this machine. That it runs: tests/images."""

from pathlib import Path

from camopd.config import load_recipe
from pipelines.containers import absolute_form, folders_of
from tests.integration.runs import ROOT


def test_a_container_sees_what_the_recipe_names(tmp_path):
    recipe = load_recipe("recipes/micro.toml", {"output": str(tmp_path / "out")})
    folders = folders_of(recipe, "recipes/micro.toml", f"sqlite:///{tmp_path}/db/mlflow.db", tmp_path / "kfp")
    micro = ROOT / "examples/micro"
    named = ("domain", "general", "prompts/domain.jsonl", "prompts/general.jsonl", "tasks")
    assert folders.read == tuple(sorted([*(str(micro / name) for name in named), str(ROOT / "recipes/micro.toml")]))
    assert folders.write == tuple(str(tmp_path / name) for name in ("kfp", "out", "db"))
    assert folders.volumes()[str(tmp_path / "out")] == {"bind": str(tmp_path / "out"), "mode": "rw"}
    assert folders.volumes()[str(micro / "domain")]["mode"] == "ro"


def test_what_lies_on_s3_is_not_mounted():
    recipe = load_recipe("recipes/medical-8b.toml")
    folders = folders_of(recipe, "medical-8b", "http://mlflow:5000", Path(".cache/x"))
    assert (folders.read, folders.write) == ((), (str(ROOT / ".cache/x"),))


def test_locations_are_absolute_since_a_container_has_another_working_folder():
    form = {"output_uri": "runs", "input_domain_model_uri": "s3://b/m", "method_seed": "2", "output_promote": False}
    recipe, absolute = absolute_form("recipes/micro.toml", form)
    assert recipe == str(ROOT / "recipes/micro.toml")
    assert absolute == {**form, "output_uri": str(ROOT / "runs")}
    assert absolute_form("micro", {}) == ("micro", {})
