"""The kinds of value that a recipe holds: what a person may type in TOML, on the command line or in the pipeline's run form."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from camopd.recipe.registered import check_registered, is_registered
from camopd.recipe.served import check_served, is_served
from camopd.store.uris import check_uri

MAX_EXACT_INT = 2**53  # JSON numbers of the KFP API are doubles: a larger integer arrives changed
MAX_NAME_LENGTH = 256  # of a registered model
TEACHER = "teacher"  # in place of a prompt file: the branch's teacher makes up the prompts
MAX_ALIAS_LENGTH = 255  # mlflow.utils.validation.MAX_REGISTERED_MODEL_ALIAS_LENGTH


def _integer(value: Any) -> Any:
    """Accept 3, 3.0, "3" and "3.0" (KFP turns ints inside lists and structs into floats); refuse 0.5, True and 2**53 + 1."""
    if isinstance(value, bool):
        raise ValueError("a whole number is expected, not true or false")
    if isinstance(value, str):
        value = _parsed(value, "a whole number")
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"a whole number is expected, not {value!r}")
        if abs(value) >= MAX_EXACT_INT:  # 2^53 + 1 arrives as the double 2^53
            raise ValueError(f"{value:.0f} is not below 2^53: it may have been rounded on its way; choose a smaller number")
        value = int(value)
    if isinstance(value, int) and abs(value) > MAX_EXACT_INT:
        raise ValueError(f"{value} is above 2^53 and would not survive the pipeline's JSON; choose a smaller number")
    return value


def _number(value: Any) -> Any:
    """Accept 1e-6 and "1e-6"; refuse True and text."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return _parsed(value, "a number") if isinstance(value, str) else value


def _parsed(text: str, expected: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text.strip())
        except ValueError:
            continue
    raise ValueError(f"{expected} is expected, not {text[:80]!r}")


def _uri(value: Any) -> Any:
    return check_uri(value) if isinstance(value, str) else value


def _model(value: Any) -> Any:
    return check_registered(value) if isinstance(value, str) and is_registered(value) else _uri(value)


def _teacher(value: Any) -> Any:
    return check_served(value) if isinstance(value, str) and is_served(value) else _model(value)


def _prompt_source(value: Any) -> Any:
    return value if value == TEACHER else _uri(value)


def _list(value: Any) -> Any:
    """Accept a list and the JSON text of a list; refuse comma-separated text and show the form that is right."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    if isinstance(parsed, list):
        return parsed
    right = json.dumps([part.strip() for part in value.split(",") if part.strip()], ensure_ascii=False)
    raise ValueError(f"a list is expected, written as JSON: {right}")


def _model_name(text: str) -> str:
    """The registry's rule: not blank, no '/' or ':', and nothing a path would swallow."""
    if not text.strip():
        raise ValueError("a registered model needs a name")
    if text != text.strip() or not text.isprintable():
        raise ValueError("a registered model's name has no blanks around it and no control characters")
    if "/" in text or ":" in text or text in (".", ".."):
        raise ValueError(
            f"{text[:80]!r} cannot name a registered model: '/' and ':' are not allowed; use letters, digits, - _ ."
        )
    if len(text) > MAX_NAME_LENGTH:
        raise ValueError(f"a registered model's name has at most {MAX_NAME_LENGTH} characters, this one has {len(text)}")
    return text


def _alias(text: str) -> str:
    """The registry's rule, ASCII only; 'latest' and v<digits> are its own."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text) or len(text) > MAX_ALIAS_LENGTH:
        raise ValueError(f"{text[:80]!r} cannot be an alias: use 1 to {MAX_ALIAS_LENGTH} of the characters A-Z a-z 0-9 _ -")
    if text.lower() == "latest" or re.fullmatch(r"[vV]\d+", text):
        raise ValueError(f"the alias {text!r} is reserved by MLflow; choose a word such as champion")
    return text


def _tracking_uri(text: str) -> str:
    if not text.strip() or text != text.strip():
        raise ValueError("the tracking URI is blank or has blanks around it; leave it out to use MLFLOW_TRACKING_URI")
    if urlsplit(text).password is not None:  # a recipe is copied into the run's folder and the report
        raise ValueError(
            "the tracking URI carries a password; leave it out here and set MLFLOW_TRACKING_URI in the environment"
        )
    return text


Int = Annotated[int, BeforeValidator(_integer)]
Float = Annotated[float, BeforeValidator(_number)]
Uri = Annotated[str, BeforeValidator(_uri)]
Model = Annotated[str, BeforeValidator(_model)]
Teacher = Annotated[str, BeforeValidator(_teacher)]
PromptSource = Annotated[str, BeforeValidator(_prompt_source)]
Names = Annotated[tuple[Annotated[str, Field(pattern=r"\S")], ...], BeforeValidator(_list)]
ModelName = Annotated[str, AfterValidator(_model_name)]
Alias = Annotated[str, AfterValidator(_alias)]
TrackingUri = Annotated[str, AfterValidator(_tracking_uri)]
