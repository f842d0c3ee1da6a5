"""A model that a registry knows: how it is named in place of a location. Light imports only.

``models:/NAME@alias``, ``models:/NAME/7`` and ``models:/NAME#tag=value``, the newest version that has the tag. The first two
are MLflow's own; by tag it knows no URI.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEME = "models:/"
FORMS = "models:/NAME@alias, models:/NAME/7 or models:/NAME#tag=value"


@dataclass(frozen=True)
class Reference:
    """Which version of which registered model is meant; one of the three ways is set."""

    name: str
    version: int | None = None
    alias: str = ""
    tag: tuple[str, str] | None = None


def is_registered(location: str) -> bool:
    """Whether a model's location is a name in the registry."""
    return location.startswith(SCHEME)


def check_registered(text: str) -> str:
    """The text as it is, or ValueError with the reason and the right forms."""
    reference_of(text)
    return text


def reference_of(text: str) -> Reference:
    """``models:/icd-coder@ready -> Reference("icd-coder", alias="ready")``. Raises ValueError for what is none of the forms."""
    rest = text.removeprefix(SCHEME)
    if text != text.strip() or not text.isprintable() or rest.startswith("/"):
        raise ValueError(f"{text[:80]!r} names no registered model; write {FORMS}")
    name, by_tag, tag = rest.partition("#")
    key, equals, value = tag.partition("=")
    if by_tag:
        if not _is_name(name) or not key or not equals or not value:
            raise ValueError(f"{text[:80]!r} names no tag of a registered model; write models:/NAME#tag=value")
        return Reference(name, tag=(key, value))
    name, slash, version = rest.partition("/")
    if slash:
        if not _is_name(name) or not version.isascii() or not version.isdigit() or int(version) < 1:
            raise ValueError(f"{text[:80]!r} names no version; write {FORMS}: stages and 'latest' are not followed")
        return Reference(name, version=int(version))
    name, at, alias = rest.rpartition("@")
    if not at or not alias or not _is_name(name):
        raise ValueError(f"{text[:80]!r} does not say which version is meant; write {FORMS}")
    return Reference(name, alias=alias)


def _is_name(name: str) -> bool:
    return bool(name.strip()) and not set("/:") & set(name)
