"""What travels to the server: the recipe as text, and the run form.

The recipe always travels as text, in the field ``input_recipe``, so that what was checked is what runs. A value given by ``-s``
goes into the run form where that has a field for it; any other is written into the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camopd.config import OUTPUT as OUTPUT_VARIABLE
from camopd.config import Recipe, load_recipe, recipe_text
from camopd.errors import InputError, Problem
from camopd.kubeflow.spec import Spec, inputs_of, variable_of
from camopd.recipe.document import SHIPPED, read_document
from camopd.recipe.explain import did_you_mean
from camopd.recipe.parameters import FORM_FIELDS, ROLE_FIELDS
from camopd.store import Store, is_s3

RECIPE, OUTPUT = "input_recipe", "output_uri"
IN_IMAGE = "/app"  # every image holds recipes/ and examples/micro there
SWITCHES = {"output_promote"}  # fields whose values are not those of the key that they stand for
_WORDS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Wish:
    """A run that is asked for.

    Attributes:
        recipe: as read here, with its locations on this machine.
        sent: as the pods will read it.
        form: the run form's parameters, the recipe's text among them.
        shipped: whether the recipe is one of those that the images hold.
    """

    recipe: Recipe
    sent: Recipe
    form: Mapping[str, Any]
    shipped: bool


def wish(source: str, values: Mapping[str, str], spec: Spec, *, store: Store) -> Wish:
    """Read a recipe and spread the values over run form and text.

    Args:
        source: a recipe's name, file or s3:// URI.
        values: by run-form field or dotted key.
        spec: the pipeline that is to run, whose form it is.
        store: reads an s3:// source.

    Raises:
        InputError: every problem of recipe and values.
    """
    inputs = inputs_of(spec)
    missing = [
        Problem("--pipeline", f"its run form has no {name}, so it is not camopd's", "")
        for name in (RECIPE, OUTPUT)
        if name not in inputs
    ]
    if missing:
        raise InputError(missing)
    form, dotted, problems = _spread(values, inputs)
    named = {problem.where for problem in problems} | {
        key for key in inputs if key not in FORM_FIELDS and key not in ROLE_FIELDS
    }
    own = {key: value for key, value in values.items() if key not in named}  # what the pipeline alone knows is not the recipe's
    own |= {} if OUTPUT in own or "output" in own else _clusters_output(spec)
    try:
        recipe = load_recipe(source, own, store=store)
    except InputError as error:
        raise InputError([*error.problems, *problems]) from None
    if problems:
        raise InputError(problems)
    base = Path(read_document(source, store).base)
    shipped = "/" not in source and base in (SHIPPED, Path(IN_IMAGE, SHIPPED.name))  # in a checkout, in an image
    text = recipe_text(source, dotted, home=f"{IN_IMAGE}/{SHIPPED.name}" if shipped else None, store=store)
    form |= {RECIPE: text, OUTPUT: form.get(OUTPUT, recipe.output)}
    known = {key: value for key, value in form.items() if key in FORM_FIELDS or key in ROLE_FIELDS}
    return Wish(recipe, load_recipe(text, known), form, shipped)


def _clusters_output(spec: Spec) -> dict[str, str]:
    """The output that the cluster's pods are told, where they are: it goes before the recipe's."""
    told = variable_of(spec, "prepare", OUTPUT_VARIABLE)
    return {OUTPUT: told} if is_s3(told) else {}


def _spread(
    values: Mapping[str, str], inputs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """The run form's values, those of the text, and what is wrong with their names and kinds."""
    fields = {dotted: field for field, dotted in FORM_FIELDS.items() if field in inputs and field not in SWITCHES}
    form: dict[str, Any] = {}
    dotted: dict[str, str] = {}
    problems = []
    for key, value in values.items():
        if key == RECIPE:
            problems.append(Problem(key, "is the recipe itself", "give it as the argument"))
        elif key in inputs or key in fields:
            try:
                form[fields.get(key, key)] = typed(value, inputs[fields.get(key, key)])
            except ValueError as error:
                problems.append(Problem(key, str(error)))
        elif key in FORM_FIELDS or key in ROLE_FIELDS:
            other = f"say {FORM_FIELDS[key]}, which travels in the recipe, or upload" if key in FORM_FIELDS else "upload"
            what = "the pipeline on the server is older and its run form has no such field"
            problems.append(Problem(key, what, f"{other} this version's pipeline with --pipeline pipelines/recovery.yaml"))
        else:
            dotted[key] = value
    unknown = [key for key in dotted if "." not in key and key not in Recipe.model_fields]
    problems += [
        Problem(key, "there is no such parameter", did_you_mean(key, [*inputs, *Recipe.model_fields])) for key in unknown
    ]
    return form, {key: value for key, value in dotted.items() if key not in unknown}, problems


def typed(value: str, field: Mapping[str, Any]) -> Any:
    """The value as the API wants it, which refuses text for a number. Raises ValueError with the reason."""
    kind = field.get("parameterType", "STRING")
    if kind == "BOOLEAN":
        if value.strip().lower() not in _WORDS:
            raise ValueError(f"true or false is expected, not {value!r}")
        return _WORDS[value.strip().lower()]
    if kind == "STRING":
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    kinds: dict[str, tuple[type, ...]] = {
        "NUMBER_INTEGER": (int,),
        "NUMBER_DOUBLE": (int, float),
        "LIST": (list,),
        "STRUCT": (dict,),
    }
    if isinstance(parsed, bool) or not isinstance(parsed, kinds.get(kind, ())):
        raise ValueError(f"{kind.lower().replace('_', ' ')} is expected, not {value!r}")
    return parsed
