"""The traps of lightweight components: a body runs alone in a pod, with nothing of its module around it."""

import ast
import builtins
import dis
import importlib
import inspect
import pkgutil
import textwrap
from types import CodeType

import pytest

import components

NAMES = sorted(module.name for module in pkgutil.iter_modules(components.__path__))
MODULES = [importlib.import_module(f"components.{name}") for name in NAMES]
WITH_TORCH = {"evaluate", "recover", "rollout", "score", "train"}
FUNCTIONS = {name: getattr(module, name).python_func for name, module in zip(NAMES, MODULES, strict=True)}


def loaded_globals(code: CodeType) -> set[str]:
    """Names that a function and the functions inside it look up outside themselves."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*map(loaded_globals, inner))


def test_there_is_one_component_a_stage():
    assert set(NAMES) == {
        "begin", "evaluate", "gather", "prepare", "promote", "recover", "report_outcome", "resolve", "rollout", "score",
        "select", "spread", "train",
    }  # fmt: skip


def test_the_check_for_globals_sees_one():
    assert loaded_globals((lambda: (len([1]), [NAMES for _ in "a"])).__code__) == {"len", "NAMES"}


@pytest.mark.parametrize("name", NAMES)
def test_a_body_uses_no_name_of_its_module(name):
    assert loaded_globals(FUNCTIONS[name].__code__) <= set(dir(builtins))


@pytest.mark.parametrize("name", NAMES)
def test_a_body_is_thin_and_imports_one_function_of_the_package(name):
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(FUNCTIONS[name]))).body
    statements = function.body[1:]  # without the docstring
    imports = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imports] == ["camopd.workflow"]
    assert len(imports[0].names) == 1
    assert sum(node.end_lineno - node.lineno + 1 for node in statements) <= 10


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_signatures_are_in_the_form_that_kfp_reads(module):
    source = inspect.getsource(module)
    assert "from __future__ import annotations" not in source
    assert "typing." not in source


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_described(name):
    function = FUNCTIONS[name]
    spec = getattr(importlib.import_module(f"components.{name}"), name).component_spec
    assert spec.description
    text = inspect.getdoc(function)
    assert all(f"{argument}: " in text.partition("Args:")[2] for argument in inspect.signature(function).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_installed_when_a_pod_starts(name):
    container = getattr(importlib.import_module(f"components.{name}"), name).component_spec.implementation.container
    assert container.image == (components.TRAINER if name in WITH_TORCH else components.CORE)
    assert "pip install" not in " ".join(container.command)


@pytest.mark.parametrize("name", NAMES)
def test_no_artifact_is_pointed_at_a_place_of_ours(name):
    """The launcher uploads by an artifact's uri and downloads it into every consumer, weights and all."""
    assert ".uri =" not in inspect.getsource(FUNCTIONS[name])
    artifacts = [p for p in inspect.signature(FUNCTIONS[name]).parameters.values() if "Input[" in str(p.annotation)]
    assert artifacts == []
