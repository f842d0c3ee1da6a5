"""Shared fixtures: real servers on free ports of 127.0.0.1, each in a file of its own."""

pytest_plugins = ["tests.fixtures.s3", "tests.fixtures.mlflow_server"]
