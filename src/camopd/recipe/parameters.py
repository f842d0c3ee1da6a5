"""Values typed outside the recipe: in the pipeline's run form, or by ``--set`` on the command line."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from camopd.errors import Problem
from camopd.recipe.document import KeyPath
from camopd.recipe.explain import did_you_mean

AS_IN_RECIPE = "recipe"  # the value of a run-form field that leaves the recipe's own value alone

# The run form shows fields in alphabetical order and without a description, so their names carry both.
FORM_FIELDS = {
    "input_domain_model_uri": "student",
    "method_learning_rate": "train.learning_rate",
    "method_name": "method",
    "method_num_rounds": "num_rounds",
    "method_seed": "seed",
    "output_alias": "promote.alias",
    "output_model_name": "promote.model_name",
    "output_notes": "notes",
    "output_promote": "promote.policy",
    "output_uri": "output",
}
SWITCH = "output_promote"  # the form has no list of words to choose from: off is "never", on is as the recipe says
_SWITCHED = {"true": True, "1": True, "false": False, "0": False}
ROLE_FIELDS = {  # of the single branch that has the role
    "input_domain_prompts_uri": ("retain", "prompts"),
    "input_general_model_uri": ("recover", "teacher"),
    "input_general_prompts_uri": ("recover", "prompts"),
}


def apply_parameters(
    values: Mapping[str, Any], parameters: Mapping[str, Any], recipe: type[BaseModel], branch: type[BaseModel]
) -> tuple[dict[str, Any], dict[KeyPath, str], list[Problem]]:
    """Put parameters into a recipe's values; types are left to the recipe's validation.

    Args:
        values: the recipe's tables as parsed.
        parameters: value by form field or by dotted key (``train.learning_rate``, ``branches.general.mass``).
        recipe: the model of a whole recipe, which tells the keys.
        branch: the model of one branch.

    Returns:
        The new values, which parameter each changed key came from, and what is wrong with the parameters' names.
    """
    changed = copy.deepcopy(dict(values))
    listed = changed.get("branches")
    branches = [entry if isinstance(entry, dict) else {} for entry in listed] if isinstance(listed, list) else []
    keys = dotted_keys(recipe, branch, [str(entry.get("name")) for entry in branches])
    origins: dict[KeyPath, str] = {}
    problems = []
    for parameter, value in parameters.items():
        if isinstance(value, str) and value == AS_IN_RECIPE:
            continue
        if parameter == SWITCH:
            if (on := _SWITCHED.get(str(value).strip().lower())) is None:
                problems.append(Problem(parameter, f"true or false is expected, not {value!r:.80}", "off registers nothing"))
            if on is not False:
                continue
            value = "never"
        path = _target(parameter, keys, branches)
        if isinstance(path, Problem):
            problems.append(path)
        elif path in origins:
            problems.append(Problem(parameter, f"sets the same key as {origins[path]}", "give one of the two"))
        else:
            origins[path] = parameter
            _put(changed, path, value)
    return changed, origins, problems


def dotted_keys(recipe: type[BaseModel], branch: type[BaseModel], branch_names: Sequence[str]) -> dict[str, KeyPath]:
    """Every key that can be set: ``{"train.learning_rate": ("train", "learning_rate"), "branches.general.mass": ...}``."""
    keys: dict[str, KeyPath] = {}
    for path in _key_paths(recipe):
        if path == ("branches",):
            rows = [
                (f"branches.{entry}.{key}", ("branches", i, key))
                for i, entry in enumerate(branch_names)
                for key in branch.model_fields
            ]
            keys.update(rows)
        else:
            keys[".".join(map(str, path))] = path
    return keys


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The table that a setting is, whether it may be left out or not; None where it is a value."""
    choices = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _key_paths(table: type[BaseModel], path: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in table.model_fields.items():
        section = None if name == "branches" else section_of(field)
        if section is None:
            yield (*path, name)
        else:
            yield from _key_paths(section, (*path, name))


def _target(parameter: str, keys: Mapping[str, KeyPath], branches: list[dict[str, Any]]) -> KeyPath | Problem:
    if parameter in ROLE_FIELDS:
        role, key = ROLE_FIELDS[parameter]
        having = [i for i, entry in enumerate(branches) if entry.get("role") == role]
        if len(having) == 1:
            return ("branches", having[0], key)
        choices = [f"branches.{branches[i].get('name')}.{key}" for i in having]
        what = f"{len(having)} branches have the role {role}, so it is not clear which is meant"
        return Problem(parameter, what, "use " + " or ".join(choices) if choices else f"add a branch with role = {role!r}")
    dotted = FORM_FIELDS.get(parameter, parameter)
    if dotted in keys:
        return keys[dotted]
    return Problem(parameter, "there is no such parameter", did_you_mean(parameter, [*FORM_FIELDS, *ROLE_FIELDS, *keys]))


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    table: Any = values
    for part in path[:-1]:
        table = table.setdefault(part, {}) if isinstance(table, dict) else table[part]
    if isinstance(table, dict):  # else the recipe has no table there, which its validation says
        table[path[-1]] = value
