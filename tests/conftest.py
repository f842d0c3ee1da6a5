"""Shared fixtures: real servers on free ports of 127.0.0.1, each in a file of its own."""

import os

from hypothesis import settings

pytest_plugins = [
    "tests.fixtures.s3",
    "tests.fixtures.mlflow_server",
    "tests.fixtures.kubernetes_api",
    "tests.fixtures.webhook",
]

# On CI the same examples every time, so that red means the change; at home new ones, which is how new cases are found.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
