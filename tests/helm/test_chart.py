"""The chart as a whole: what Helm and Kubernetes say of it, its names, its labels, its documents."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from camopd import __version__
from scripts.chart_readme import described, with_table
from tests.helm.conftest import CHART, NAMED, Helm, env_of, one, pods_in

SOUNDS_SECRET = re.compile(r"(?i)(^|_)(SECRET|PASSWORD|TOKEN|API_KEY|ACCESS_KEY|WEBHOOK)(_|$)")
VERSIONS = ("1.33", "1.35", "1.37")


def validated(tools: Path, version: str, folder: Path) -> str:
    """What the strict validator says of the manifests in a folder; nothing where all is well."""
    command = [str(tools / "validate" / "bin" / "kubernetes-validate"), "-k", version, "--strict", "--quiet"]
    done = subprocess.run([*command, *map(str, sorted(folder.glob("*.yaml")))], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr if done.returncode or "FAILED" in done.stdout + done.stderr else "").strip()


def test_lint_finds_nothing(each_helm):
    for name, values in NAMED.items():
        done = each_helm.run("lint", "--strict", CHART, values=values)
        assert done.returncode == 0, f"{name}: {done.stdout}"
        assert "icon is recommended" in done.stdout
        assert done.stdout.count("[INFO]") == 1, done.stdout


def test_kubernetes_takes_every_object_and_every_field(each_helm, tools, tmp_path):
    (tmp_path / "rendered").mkdir()
    for name, values in NAMED.items():
        (tmp_path / "rendered" / f"{name}.yaml").write_text(each_helm.text(values), encoding="utf-8")
    for version in VERSIONS:
        assert validated(tools, version, tmp_path / "rendered") == "", version


def test_the_validator_sees_an_unknown_field_and_a_wrong_type(helm, tools, tmp_path):
    (tmp_path / "rendered").mkdir()
    for change in ("backoffLimits: 2", 'backoffLimit: "two"'):
        text = helm.text().replace("backoffLimit: 2", change)
        (tmp_path / "rendered" / "broken.yaml").write_text(text, encoding="utf-8")
        assert "backoffLimit" in validated(tools, VERSIONS[0], tmp_path / "rendered"), change


@pytest.mark.parametrize("name", NAMED)
def test_both_helms_say_the_same(name, tools, tmp_path):
    assert Helm(tools / "helm", tmp_path).render(NAMED[name]) == Helm(tools / "helm3", tmp_path).render(NAMED[name])


@pytest.mark.parametrize("values", [{}, {"nameOverride": "n" * 60}, {"fullnameOverride": "f" * 60}])
def test_names_and_labels_are_short_enough_with_the_longest_release(helm, values):
    release = "r" * 53  # Helm's own limit
    objects = helm.render(NAMED["full"] | values, release=release)
    names = [entry["metadata"]["name"] for entry in objects]
    assert max(map(len, names)) <= 63
    jobs = [entry["metadata"]["name"] for entry in objects if entry["kind"] == "Job"]
    assert max(map(len, jobs)) <= 57, "a pod's name is six letters longer"
    assert not [name for name in names if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)]
    for entry in objects:
        assert max(len(value) for value in entry["metadata"]["labels"].values()) <= 63


def test_every_object_says_whose_it_is(helm):
    for entry in helm.render(NAMED["full"], release="nightly"):
        labels = entry["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "nightly"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/version"] == __version__
        assert labels["cost-centre"] == "nlp"
        assert labels["app.kubernetes.io/component"] in ("runs", "sync", "test", "network")
        assert entry["metadata"]["annotations"]["contact"] == "nlp@example.com"
        assert entry["metadata"]["namespace"] == "ml"


def test_a_release_that_names_the_chart_is_not_named_twice(helm):
    assert one(helm.render(release="camopd-eu"), "ConfigMap", "camopd-eu")
    assert one(helm.render(release="nightly"), "ConfigMap", "nightly-camopd")


def test_no_object_holds_a_secret_and_what_sounds_like_one_is_a_reference(helm):
    for values in NAMED.values():
        objects = helm.render(values)
        assert not [entry for entry in objects if entry["kind"] == "Secret"]
        assert not [entry for entry in objects if entry["kind"].startswith("Cluster")]
        plain = [entry for pod in pods_in(objects).values() for entry in env_of(pod) if "value" in entry]
        assert {entry["name"] for entry in plain if SOUNDS_SECRET.search(entry["name"])} <= {"KF_PIPELINES_SA_TOKEN_PATH"}


# --- As a part of another chart -------------------------------------------------------------------------------------------


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A chart with camopd in it under two aliases."""
    folder = tmp_path / "platform"
    shutil.copytree(Path(__file__).with_name("parent"), folder)
    shutil.copytree(CHART, folder / "charts" / "camopd")
    return folder


def test_it_works_twice_in_a_parent_chart(each_helm, parent):
    objects = each_helm.render(chart=parent, release="platform")
    names = [(entry["kind"], entry["metadata"]["name"]) for entry in objects]
    assert len(set(names)) == len(names), "no object twice"
    files = {
        entry["metadata"]["name"]: json.loads(entry["data"]["sync.json"]) for entry in objects if entry["kind"] == "ConfigMap"
    }
    assert {name: (file["owner"], file["pools"]["all"]["env"]["CAMOPD_OUTPUT"]) for name, file in files.items()} == {
        "platform-recovery": ("ml/platform-recovery", "s3://bucket/one"),
        "platform-second": ("ml/platform-second", "s3://bucket/two"),
    }
    for pod in pods_in(objects).values():
        assert pod["spec"]["containers"][0]["image"] == f"registry.example/camopd/core:{__version__}", "global goes first"
    whose = {
        tuple(pod["metadata"]["labels"][f"app.kubernetes.io/{key}"] for key in ("name", "instance"))
        for pod in pods_in(objects).values()
    }
    assert whose == {("recovery", "platform"), ("second", "platform")}


def test_a_parent_s_condition_leaves_it_out(helm, parent):
    assert {
        entry["metadata"]["labels"]["app.kubernetes.io/name"]
        for entry in helm.render({"second": {"enabled": False}}, chart=parent)
    } == {"recovery"}


def test_a_parent_s_values_are_held_to_the_schema(helm, parent):
    done = helm.run("template", "platform", parent, values={"recovery": {"pool": {}}})
    assert done.returncode != 0
    assert "'pool' not allowed" in done.stderr


# --- Its documents --------------------------------------------------------------------------------------------------------


def test_the_readme_s_table_is_that_of_the_values():
    readme, values = ((CHART / name).read_text(encoding="utf-8") for name in ("README.md", "values.yaml"))
    assert with_table(readme, values) == readme, "run `make chart`"


def test_a_value_without_a_comment_is_named():
    with pytest.raises(ValueError, match=r"line 4: a\.c has no comment"):
        list(described("a:\n  # -- What b is\n  b: 1\n  c: 2\n"))


def test_the_readme_names_every_image(helm):
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    images = {f"{image['registry']}/{image['repository']}" for image in values["images"].values()}
    table = (CHART / "README.md").read_text(encoding="utf-8").partition("## Air-gapped")[2].partition("## Values")[0]
    assert set(re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE)) == images


def test_the_readme_s_examples_are_taken(helm):
    blocks = re.findall(r"(?s)```yaml\n(.*?)```", (CHART / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 2
    for block in blocks:
        helm.render(yaml.safe_load(block.replace("sha256:...", f"sha256:{'0' * 64}")))


def test_the_chart_is_of_the_version_of_the_package():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == __version__


def test_every_key_of_the_schema_has_a_default():
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

    def missing(table, given, path):
        while "$ref" in table:
            table = schema["definitions"][table["$ref"].rpartition("/")[2]]
        for name, entry in table.get("properties", {}).items():
            if name not in given:
                yield f"{path}{name}"
            elif isinstance(given[name], dict) and given[name]:
                yield from missing(entry, given[name], f"{path}{name}.")

    assert set(missing(schema, values, "")) == {"global", "enabled"}
