"""A recipe's validation errors in words that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_EXPECTED = {
    "bool_parsing": "true or false is expected",
    "bool_type": "true or false is expected",
    "string_type": "text is expected",
    "tuple_type": "a list is expected",
    "model_type": "a table is expected",
    "float_type": "a number is expected",
    "int_type": "a whole number is expected",
    "finite_number": "a finite number is expected",
}


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``did you mean 'x'?``, or the names that exist when none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)


def explained(detail: ErrorDetails, fields: Mapping[str, FieldInfo]) -> tuple[str, str]:
    """What is wrong, and how to mend it.

    Args:
        detail: one of ``ValidationError.errors()``.
        fields: the settings of the table that holds the key.
    """
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    key = str(detail["loc"][-1])
    meaning = f"{key}: {fields[key].description}" if key in fields else ""
    shown = repr(given)[:80]
    if kind == "value_error":
        return str(context["error"]), ""
    if kind == "missing":
        return "is missing", f"set {meaning}"
    if kind == "extra_forbidden":
        return "there is no such setting", did_you_mean(key, list(fields))
    if kind == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return f"{shown} is not one of {', '.join(allowed)}", did_you_mean(given, allowed) if isinstance(given, str) else ""
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return f"{shown} must be {word} {context[bound]:g}", meaning
    if kind == "string_pattern_mismatch":
        return f"{shown} does not match {context['pattern']}", meaning
    return f"{_EXPECTED.get(kind, detail['msg'])}, not {shown}", meaning
