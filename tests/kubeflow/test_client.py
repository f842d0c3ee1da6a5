"""The connection: who asks, and one sentence for whatever goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubernetes.config import kube_config

from camopd.errors import ClusterError
from camopd.kubeflow import client
from camopd.kubeflow.client import ApiError, connect
from tests.fixtures.kfp_api import KfpApi, served
from tests.fixtures.kfp_rules import Refused
from tests.fixtures.kfp_server import Page
from tests.kubeflow.conftest import ROOT


def refusal(host: str, namespace: str = "") -> ApiError:
    with pytest.raises(ApiError) as error:
        connect(host, namespace)
    assert "\n" not in str(error.value)
    return error.value


def answering(api: KfpApi, error: Exception) -> str:
    def before(method: str, path: str) -> None:
        raise error

    api.before = before
    return api.host


def test_a_server_without_users(kfp: KfpApi) -> None:
    connection = connect(kfp.host + "/")
    assert (connection.multi_user, connection.namespace, connection.version, connection.caution()) == (False, "", "2.17.0", "")
    assert connection.run_link("abc") == f"{kfp.host}/#/runs/details/abc"
    assert connection.runs.run_service_list_runs().runs is None


@pytest.mark.parametrize(
    ("tag", "warned"), [("2.16.1", True), ("v2.5.0", True), ("2.17.3", False), ("3.0.0", False), ("unknown", False)]
)
def test_an_older_backend_is_told(kfp: KfpApi, tag: str, warned: bool) -> None:
    kfp.tag = tag
    assert ("2.17 or later" in connect(kfp.host).caution()) is warned


def test_the_host_comes_from_the_environment(kfp: KfpApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("KFP_HOST", kfp.host)
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example.org/pipeline")
    assert connect().run_link("abc") == "https://kubeflow.example.org/pipeline/#/runs/details/abc"
    monkeypatch.delenv("KFP_HOST")
    assert "does not answer" in str(refusal(""))


def test_a_proxy_on_the_way(kfp: KfpApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_PROXY", kfp.host)
    assert connect("http://kubeflow.invalid").version == "2.17.0"


def test_the_way_of_a_kubeconfig(kfp_teams: KfpApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the proxy of Kubernetes' API server, with its token."""
    kfp_teams.prefix = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "clusters": [{"name": "here", "cluster": {"server": kfp_teams.host}}],
        "users": [{"name": "me", "user": {"token": "token-a"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))  # read at import
    connection = connect(namespace="team-a")
    assert connection.runs.run_service_list_runs(**connection.owned).runs is None
    assert connection.run_link("abc") == ""  # where the UI is, only the cluster knows


def test_the_usual_path_of_kubeflow(kfp: KfpApi) -> None:
    kfp.prefix = "/pipeline"
    assert connect(f"{kfp.host}/pipeline/#/runs").run_link("abc") == f"{kfp.host}/pipeline/#/runs/details/abc"
    assert "ends with /pipeline" in str(refusal(kfp.host))


def test_nothing_names_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ClusterError, match="give --host or KFP_HOST"):
        connect()
    assert capsys.readouterr().out == ""


def test_a_token_is_read_again_for_every_request(kfp_teams: KfpApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("token-a\n")
    monkeypatch.setenv("KFP_TOKEN_FILE", str(token))
    connection = connect(kfp_teams.host, "team-a")
    assert connection.renewable
    assert connection.runs.run_service_list_runs(**connection.owned).runs is None
    token.write_text("expired")
    with pytest.raises(ApiError) as error:
        connection.runs.run_service_list_runs(**connection.owned)
    assert error.value.status == 401
    token.write_text("token-a")
    connection.runs.run_service_list_runs(**connection.owned)


@pytest.mark.parametrize(
    "environment",
    [{"KFP_TOKEN": "token-a"}, {"KFP_COOKIES": "session=a"}, {"KF_PIPELINES_SA_TOKEN_PATH": "projected"}],
)
def test_every_way_to_say_who_one_is(kfp_teams: KfpApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment) -> None:
    (tmp_path / "projected").write_text("token-a")
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    connection = connect(kfp_teams.host, "team-a")
    assert connection.experiments.experiment_service_list_experiments(**connection.owned).experiments is None


def test_nobody_asks(kfp_teams: KfpApi) -> None:
    error = refusal(kfp_teams.host, "team-a")
    assert error.status == 401
    assert "KFP_TOKEN" in str(error)


def test_a_namespace_is_needed_where_there_are_users(kfp_teams: KfpApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_TOKEN", "token-a")
    with pytest.raises(ClusterError, match="--namespace or KFP_NAMESPACE"):
        connect(kfp_teams.host)
    monkeypatch.setenv("KFP_NAMESPACE", "team-b")
    connection = connect(kfp_teams.host)
    with pytest.raises(ApiError, match="kubeflow-edit") as error:
        connection.runs.run_service_list_runs(**connection.owned)
    assert error.value.status == 403


def test_a_login_page_is_no_empty_list(kfp: KfpApi) -> None:
    connection = connect(kfp.host)
    answering(kfp, Page())
    with pytest.raises(ApiError, match="login page") as error:
        connection.pipelines.pipeline_service_list_pipelines()
    assert error.value.status == 401
    assert "login page" in str(refusal(kfp.host))
    error = refusal(answering(kfp, Page(status=403)))  # oauth2-proxy's
    assert (error.status, "login page" in str(error)) == (401, True)


def test_a_redirect_is_followed_by_nobody(kfp: KfpApi) -> None:
    assert "login page" in str(refusal(answering(kfp, Page(location="/dex/auth?client_id=kubeflow-oidc-authservice&state=s"))))
    error = refusal(answering(kfp, Page(location="https://elsewhere.example.org/pipeline/apis/v2beta1/healthz?token=s")))
    assert "to https://elsewhere.example.org/pipeline: give that address" in str(error)


def test_a_path_without_the_api(kfp: KfpApi) -> None:
    assert "ends with /pipeline" in str(refusal(f"{kfp.host}/pipelines"))
    assert "ends with /pipeline" in str(refusal(answering(kfp, Page("<html>404</html>", 404))))


def test_no_answer(kfp: KfpApi) -> None:
    assert "speak TLS" in str(refusal(kfp.host.replace("http", "https")))
    assert "name that no DNS knows" in str(refusal("http://nowhere.invalid"))
    assert "broke the connection" in str(refusal(answering(kfp, ConnectionError())))
    kfp.server.stop()
    error = refusal(kfp.host)
    assert error.passing
    assert "does not answer: check --host" in str(error)
    kfp.server.start()


def test_a_server_that_hangs(kfp: KfpApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.1)
    kfp.before = lambda method, path: time.sleep(0.5)
    assert "does not answer in time" in str(refusal(kfp.host))


def test_a_fault_of_the_server_may_pass(kfp: KfpApi) -> None:
    error = refusal(answering(kfp, Refused(503, "upstream connect error")))
    assert (error.status, error.passing) == (503, True)
    assert "upstream connect error" in str(error)


def test_a_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with served(KfpApi(), (certificate, key)) as api:
        assert "KFP_CA_FILE" in str(refusal(api.host))
        monkeypatch.setenv("KFP_CA_FILE", str(certificate))
        assert connect(api.host).version == "2.17.0"
        monkeypatch.setenv("KFP_CA_FILE", str(tmp_path / "other.pem"))
        with pytest.raises(ClusterError, match=r"other\.pem, which is not there"):
            connect(api.host)


def test_nothing_is_kept_printed_or_logged(kfp_teams: KfpApi, tmp_path: Path) -> None:
    """kfp's own client would make a file in the user's home, print links, and warn."""
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"HOME": str(home), "KFP_TOKEN": "token-a", "PYTHONPATH": f"{ROOT / 'src'}"}
    code = "from camopd.kubeflow.client import connect; c = connect({!r}, 'team-a'); c.runs.run_service_list_runs(**c.owned)"
    command = [sys.executable, "-c", code.format(kfp_teams.host)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert list(home.rglob("*")) == []


def test_kfp_is_an_extra() -> None:
    code = "import sys; sys.modules['kfp'] = None\nimport camopd.kubeflow.client"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ClusterError: kfp is not installed" in done.stderr
    assert "pip install 'camopd[kfp]'" in done.stderr
