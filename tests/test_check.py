"""`camopd check`, against the real servers: what works is told, and what does not, all of it at once."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from camopd.check import check
from camopd.cli import app
from camopd.errors import InputError
from camopd.store import Store
from tests.fixtures.s3 import S3Server

NOBODY = "http://me:s3cret@127.0.0.1:9"  # the port of `discard`, where nothing listens


def test_what_is_not_there_is_told_at_once_and_without_passwords(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        check({"MLFLOW_TRACKING_URI": NOBODY}, store=Store())
    assert str(caught.value).startswith("2 problems")
    assert "CAMOPD_OUTPUT: is not set" in str(caught.value)
    assert "MLFLOW_TRACKING_URI: http://***@127.0.0.1:9 does not answer" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_cluster_without_mlflow_is_told_so(tmp_path: Path) -> None:
    output, tracking = check({"CAMOPD_OUTPUT": str(tmp_path)}, store=Store())
    assert output == f"Output {tmp_path}: written and read back"
    assert "nothing is registered" in tracking


@pytest.mark.slow
def test_the_verb_tries_both_servers_and_leaves_one_object(
    s3_server: S3Server, s3_prefix: str, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMOPD_OUTPUT", f"{s3_prefix}/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    for _ in range(2):
        told = CliRunner().invoke(app, ["check"])
        assert told.exit_code == 0, told.output
        assert (
            told.output
            == f"Output {s3_prefix}/runs: written and read back\nMLflow {mlflow_server}: answers, the registry too\n"
        )
    bucket, _, key = s3_prefix.removeprefix("s3://").partition("/")
    objects = s3_server.client().list_objects_v2(Bucket=bucket, Prefix=key)["Contents"]
    assert [entry["Key"] for entry in objects] == [f"{key}/runs/.camopd-check"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    told = CliRunner().invoke(app, ["check"])
    assert isinstance(told.exception, InputError)
    assert "CAMOPD_OUTPUT: " in str(told.exception)
    assert "AWS_SECRET_ACCESS_KEY" in str(told.exception)
