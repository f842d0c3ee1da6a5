"""What the versions of a whole registry point to: for `camopd gc`, which removes nothing of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import unquote

from camopd.retention import Reference
from camopd.store import is_s3
from camopd.tracking.mlflow_tracker import MlflowTracker, _asks


@_asks
def version_references(tracker: MlflowTracker) -> list[Reference]:
    """Every location that a version of any registered model names, as its source or in a tag.

    Raises:
        TrackingError: the server did not answer, or refused.
    """
    found: list[Reference] = []
    token = None
    while True:
        page = tracker._client.search_model_versions(page_token=token)
        for version in page:
            by = f"version {version.version} of {version.name}"
            named = {normalised(text) for text in (version.source or "", *version.tags.values())} - {""}
            found += [Reference(by, location=location) for location in sorted(named)]
        token = page.token
        if not token:
            return found


def normalised(text: str) -> str:
    """A location in the one form in which locations are compared: links resolved, no scheme of files; empty for other texts."""
    if text.lower().startswith("file://"):
        text = unquote(text[len("file://") :])
    if text.lower().startswith(("s3://", "s3a://")):
        text = "s3://" + text.partition("://")[2]
    if is_s3(text):
        return text.rstrip("/")
    if text.startswith(("/", "~/", "./", "../")):
        return os.path.realpath(os.path.expanduser(text))
    return ""


def locations_in(value: object) -> list[str]:
    """Every text in JSON that is a location, normalised."""
    if isinstance(value, str):
        return [place] if (place := normalised(value)) else []
    if isinstance(value, dict):
        value = list(value.values())
    return [place for item in value for place in locations_in(item)] if isinstance(value, Sequence) else []
