"""Node affinity as Kubernetes spells it, checked: KFP hands it on as it is, and a wrong one shows when a pod is made."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel


class _Verbatim(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


class Requirement(_Verbatim):
    """What a node's label or field must be like."""

    key: str = Field(min_length=1)
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    values: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _values_as_the_operator_wants(self) -> Self:
        wanted = {"Exists": range(1), "DoesNotExist": range(1), "Gt": range(1, 2), "Lt": range(1, 2)}
        if len(self.values) not in wanted.get(self.operator, range(1, 10**6)):
            raise ValueError("In and NotIn take values, Gt and Lt one, Exists and DoesNotExist none")
        return self


class NodeTerm(_Verbatim):
    """Requirements that hold together."""

    match_expressions: tuple[Requirement, ...] = ()
    match_fields: tuple[Requirement, ...] = ()


class Preference(_Verbatim):
    """Nodes that are better than others."""

    weight: int = Field(ge=1, le=100)
    preference: NodeTerm


class NodeTerms(_Verbatim):
    """Terms of which one must hold."""

    node_selector_terms: tuple[NodeTerm, ...] = Field(min_length=1)


class NodeAffinity(_Verbatim):
    """``affinity.nodeAffinity`` of a pod. KFP passes no other affinity on."""

    required_during_scheduling_ignored_during_execution: NodeTerms | None = None
    preferred_during_scheduling_ignored_during_execution: tuple[Preference, ...] = ()

    def as_kubernetes(self) -> dict[str, Any]:
        """The object as it stands in a pod."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
