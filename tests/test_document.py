"""Recipe files: where they lie, on which line a mistake stands, and what their relative locations mean."""

from __future__ import annotations

import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.config import Recipe, load_recipe
from camopd.recipe.document import SHIPPED, absolute, key_lines, to_toml
from camopd.recipe.values import Model, PromptSource, Teacher, Uri
from camopd.store import Store
from tests.test_config import MINIMAL, problems_of

# --- Recipe files ---------------------------------------------------------------------------------------------------------

BROKEN = """# every mistake below is one of the reader's

name = "Upper"
student = \"\"\"/models/domain\"\"\"
num_rounds = 0

[[branches]]
name = "general"
role = "recover"
teacher = ""
prompts = "/p.jsonl"
tasks = [
  "a",
  "b"
]
mas = 0.4

[[branches]]
name = "domain"
role = "retian"

[train]
learning_rate = "fast"
ratio_low = 9
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_mistake_is_named_with_its_line(tmp_path: Path, newline: str) -> None:
    path = tmp_path / "micro.toml"
    path.write_bytes(BROKEN.replace("\n", newline).encode())
    assert problems_of(path, {"seed": -1}).keys() == {
        "micro.toml:3 (name)",
        "micro.toml:5 (num_rounds)",
        "micro.toml:10 (branches.general.teacher)",
        "micro.toml:16 (branches.general.mas)",
        "micro.toml:20 (branches.domain.role)",
        "micro.toml:18 (branches.domain.prompts)",  # missing: the line of its table
        "micro.toml:23 (train.learning_rate)",
        "micro.toml:22 (train.ratio_high)",  # the default, below the ratio_low that was set
        "seed",
    }


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ('student = "/a"\nname = broken\n', "recipe:2", "not TOML"),
        ('student = "/a"\nstudent = "/b"\n', "recipe:2", "not TOML"),
        ('name = "x\n', "recipe:1", "not TOML"),
        ("a = [1,\n2\n", "recipe:3", "not TOML"),
        ('student = "/a"\nbranches = 3\n', "recipe:2 (branches)", "list is expected"),
        ('student = "/a"\n[branches.general]\nrole = "recover"\n', "recipe:2 (branches)", "list is expected"),
        ('student = "/a"\ntrain = 3\n' + MINIMAL.replace("student", "notes", 1), "recipe:2 (train)", "table is expected"),
        (MINIMAL.replace("general", "domain"), "recipe:4 (branches)", "names must differ"),
        (MINIMAL.replace("recover", "retain"), "recipe:4 (branches)", "nothing to recover"),
        ("name = 'x'\nbranches = []\n", "recipe (student)", "is missing"),
    ],
)
def test_text_that_is_no_recipe(text: str, where: str, words: str) -> None:
    assert words in problems_of(text)[where]


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.toml").write_text(MINIMAL)
    assert load_recipe("mine").student == "/models/domain"
    assert "mine" in problems_of("yours")["yours"]
    assert "cannot be read" in problems_of(tmp_path / "none.toml")[str(tmp_path / "none.toml")]
    (tmp_path / "latin.toml").write_bytes(b"# one\nname = 'caf\xe9'\n")
    assert "UTF-8" in problems_of(tmp_path / "latin.toml")["latin.toml:2"]
    assert "no valid bucket" in problems_of("s3://B!/x.toml")["s3://B!/x.toml"]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(tmp_path / "a.toml") == load_recipe(MINIMAL)


def test_key_lines_of_statements_over_several_lines() -> None:
    text = 'a = """\n[b]\nc = 1\n"""\n\n# d = 1\n[b]\nc = { x = 1, y = [\n  2 ] }\n[[e]]\n[[e]]\nf.g = 1'
    assert key_lines(text) == {
        ("a",): 1,
        ("b",): 7,
        ("b", "c"): 8,
        ("b", "c", "x"): 8,
        ("b", "c", "y"): 8,
        ("b", "c", "y", 0): 8,
        ("e",): 10,
        ("e", 0): 10,
        ("e", 1): 11,
        ("e", 1, "f"): 12,
        ("e", 1, "f", "g"): 12,
    }


# --- Locations ------------------------------------------------------------------------------------------------------------

EVERY_LOCATION = """
student = "./student"
base = "./base"
output = "../runs"
branches = [{ name = "general", role = "recover", teacher = "./teacher", prompts = "./p.jsonl" }]
prompts.chat_template = "./t.jinja"
evaluate.task_dir = "./tasks"
"""


def locations(recipe: Recipe) -> list[str]:
    """Every value of a field that is a location, found by its type."""

    def of(section: object, model: type) -> list[str]:
        locations = (Uri, Model, PromptSource, Teacher)
        hints = typing.get_type_hints(model, include_extras=True)
        kinds = {name: (hint, *typing.get_args(hint)) for name, hint in hints.items()}
        return [getattr(section, name) for name, kind in kinds.items() if any(one in kind for one in locations)]

    sections = [recipe, *recipe.branches, recipe.prompts, recipe.rollout, recipe.score, recipe.train, recipe.evaluate]
    return [value for section in sections for value in of(section, type(section))]


def test_locations_in_a_file_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.toml").write_text(EVERY_LOCATION)
    monkeypatch.chdir(tmp_path)
    found = locations(load_recipe("a", {"evaluate.task_dir": "./mine"}))
    beside = {str(tmp_path / "recipes" / name) for name in ("student", "base", "teacher", "p.jsonl", "t.jinja")}
    assert set(found) == beside | {str(tmp_path / "runs"), str(tmp_path / "mine")}


def test_a_teacher_in_place_of_a_prompt_file_is_no_location(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(EVERY_LOCATION.replace("./p.jsonl", "teacher"))
    assert load_recipe(tmp_path / "a.toml").branch("general").prompts == "teacher"


def test_locations_in_text_are_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(EVERY_LOCATION).student == str(tmp_path / "student")
    assert load_recipe(MINIMAL).output == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("location", "base", "expected"),
    [
        ("./a", "/x/y", "/x/y/a"),
        ("../a", "/x/y", "/x/a"),
        ("..", "/x/y", "/x"),
        ("/a", "/x/y", "/a"),
        ("s3://bucket/a", "/x", "s3://bucket/a"),
        ("./a/b", "s3://bucket/x/y", "s3://bucket/x/y/a/b"),
        ("../a", "s3://bucket/x/y", "s3://bucket/x/a"),
        ("a/b", "/x", "a/b"),  # s3 key or file? not for us to guess
        ("~/a", "/x", str(Path("~/a").expanduser())),
    ],
)
def test_absolute(location: str, base: str, expected: str) -> None:
    assert absolute(location, base) == expected


@pytest.mark.slow
def test_a_recipe_in_s3_with_its_data_beside_it(s3_prefix: str) -> None:
    store = Store()
    store.write(f"{s3_prefix}/recipes/a.toml", EVERY_LOCATION.encode())
    recipe = load_recipe(f"{s3_prefix}/recipes/a.toml", store=store)
    assert recipe.student == f"{s3_prefix}/recipes/student"
    assert recipe.output == f"{s3_prefix}/runs"
    assert "cannot be read" in problems_of(f"{s3_prefix}/none.toml")[f"{s3_prefix}/none.toml"]


# --- Written again --------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(st.text(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False))
TABLES = st.dictionaries(st.text(), st.one_of(SCALARS, st.lists(SCALARS), st.dictionaries(st.text(), SCALARS)))


@given(st.dictionaries(st.text(), st.one_of(SCALARS, st.lists(SCALARS), TABLES, st.lists(TABLES, min_size=1))))
def test_tables_written_as_toml_are_read_as_they_were(values: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(values)) == values


def test_recipes_written_again_say_the_same() -> None:
    for path in SHIPPED.glob("*.toml"):
        values = tomllib.loads(path.read_text())
        assert tomllib.loads(to_toml(values)) == values
