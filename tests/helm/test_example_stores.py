"""examples/cluster/stores.yaml: what Kubernetes takes, and commands that do what a trial needs of them."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.exceptions import BotoCoreError, ClientError

from tests.fixtures.s3 import free_ports
from tests.helm.conftest import ROOT
from tests.helm.test_chart import validated

FILE = ROOT / "examples" / "cluster" / "stores.yaml"
OBJECTS = {(entry["kind"], entry["metadata"]["name"]): entry for entry in yaml.safe_load_all(FILE.read_text(encoding="utf-8"))}


def container(name: str) -> dict:
    (found,) = OBJECTS["Deployment", name]["spec"]["template"]["spec"]["containers"]
    return found


@contextmanager
def started(command: list[str], folder: Path):
    """The container's program here, for the time of the block."""
    program = Path(sys.executable).with_name(command[0])
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, *command[1:]], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def patiently(ask, *errors):
    deadline = time.monotonic() + 90
    while True:
        try:
            return ask()
        except errors:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def test_kubernetes_takes_every_field(tools, tmp_path):
    (tmp_path / "stores.yaml").write_text(FILE.read_text(encoding="utf-8"))
    for version in ("1.33", "1.35", "1.37"):
        assert not validated(tools, version, tmp_path)


@pytest.mark.slow
def test_the_object_store_takes_the_documented_keys_and_makes_its_bucket(tmp_path):
    ports = free_ports(8)
    file = tmp_path / "s3.json"
    file.write_text(OBJECTS["Secret", "seaweedfs"]["stringData"]["s3.json"])
    (tmp_path / "data").mkdir()
    asked = container("seaweedfs")
    arguments = [arg.replace("/data", f"{tmp_path}/data").replace("/etc/seaweedfs/s3.json", str(file)) for arg in asked["args"]]
    arguments = [f"-s3.port={ports[0]}" if arg.startswith("-s3.port=") else arg for arg in arguments]
    roles = ("master.port", "volume.port", "filer.port", "master.port.grpc", "volume.port.grpc", "filer.port.grpc")
    arguments += [f"-{role}={port}" for role, port in zip(roles, ports[1:7], strict=True)]  # a pod has them all to itself
    arguments += [f"-s3.port.grpc={ports[7]}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-ip=127.0.0.1"]
    arguments += [f"-filer.localSocket={tmp_path}/f", f"-s3.localSocket={tmp_path}/s"]
    with started([*asked["command"], *arguments], tmp_path):
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{ports[0]}",
            region_name="us-east-1",
            aws_access_key_id="camopd",
            aws_secret_access_key="only-for-a-trial",
        )
        patiently(lambda: client.put_object(Bucket="camopd", Key="runs/x", Body=b"1"), BotoCoreError, ClientError)
        assert client.get_object(Bucket="camopd", Key="runs/x")["Body"].read() == b"1"


@pytest.mark.slow
def test_mlflow_answers_to_the_name_of_its_service_and_to_no_other(tmp_path):
    (port,) = free_ports(1)
    asked = container("mlflow")
    arguments = [arg.replace("/data", str(tmp_path)).replace("=5000", f"={port}") for arg in asked["args"]]
    arguments = ["--host=127.0.0.1" if arg.startswith("--host=") else arg for arg in arguments]

    def ask(host: str) -> dict:
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=10) as answer:
            return json.load(answer)

    with started([*asked["command"], *arguments], tmp_path):
        found = patiently(lambda: ask("mlflow.camopd.svc:5000"), urllib.error.URLError)
        assert found["experiments"][0]["name"] == "Default"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            ask("somebody.example")
