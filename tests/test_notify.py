"""The webhook: what it is told, and that whatever it does costs a run a line in the log and no more than its time."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from camopd import announce, notify, workflow
from camopd import outcome as outcomes
from camopd import plan as layout
from camopd.errors import CamopdError, InputError
from camopd.notify import Message, send, send_once
from camopd.outcome import Recorded, ending_of
from camopd.promote import release_uri
from camopd.rounds import record_stop
from camopd.store import Store, join
from tests.finished import make_plan, make_run
from tests.fixtures.webhook import Webhook

PROMOTED = Message(
    "success",
    "was promoted",
    run="icd-coder-0123456789ab",
    run_uri="s3://models/runs/icd-coder-0123456789ab",
    report="s3://models/runs/icd-coder-0123456789ab/evaluation/12345678/report.html",
    model="icd-coder",
    version=3,
    alias="champion",
    next="Load it as models:/icd-coder@champion.",
)
SECRETS = ("T0SECRET", "B0SECRET", "key=", "SECRET")


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The one line that camopd logged; no line of anybody holds a part of the address but its host."""
    assert not any(secret in caplog.text for secret in SECRETS)
    (record,) = (record for record in caplog.records if record.name == "camopd.notify")
    return record.getMessage()


def test_the_json_is_for_people_and_machines(webhook: Webhook, caplog) -> None:
    assert send(PROMOTED)
    (sent,) = webhook.sent
    text = sent.pop("text")
    assert text == (
        "camopd: icd-coder-0123456789ab was promoted\n"
        "Model: icd-coder, version 3, alias champion\n"
        "Report: s3://models/runs/icd-coder-0123456789ab/evaluation/12345678/report.html\n"
        "Next: Load it as models:/icd-coder@champion."
    )
    assert sent == {
        "status": "success",
        "headline": "was promoted",
        "run": PROMOTED.run,
        "run_uri": PROMOTED.run_uri,
        "report": PROMOTED.report,
        "model": "icd-coder",
        "version": 3,
        "alias": "champion",
        "next": PROMOTED.next,
    }
    (head,) = webhook.heads
    assert head[0] == "/services/T0SECRET/B0SECRET?key=SECRET"
    assert head[1]["Content-Type"] == "application/json"
    assert not any(secret in caplog.text for secret in SECRETS)


def test_slack_reads_no_mention_and_nobody_a_password(webhook: Webhook) -> None:
    reason = "<!channel> 3 < 4 & https://me:hunter2@mlflow.local/x refused " + "a" * 2000
    assert send(replace(PROMOTED, reason=reason))
    (sent,) = webhook.sent
    assert "&lt;!channel&gt; 3 &lt; 4 &amp; https://***@mlflow.local/x" in sent["text"]
    assert sent["reason"].startswith("<!channel> 3 < 4 & https://***@mlflow.local/x")
    assert "hunter2" not in json.dumps(sent)
    assert len(sent["reason"]) < 1020


def test_without_an_address_nothing_is_sent_and_nothing_said(monkeypatch, caplog) -> None:
    monkeypatch.delenv("CAMOPD_WEBHOOK_URL", raising=False)
    assert not send(PROMOTED)
    assert not caplog.records


@pytest.mark.parametrize("end", ["\n", "  \r\n"])
def test_a_line_break_at_the_end_of_a_secret_is_not_the_address(webhook: Webhook, monkeypatch, end) -> None:
    monkeypatch.setenv("CAMOPD_WEBHOOK_URL", webhook.url + end)
    assert send(PROMOTED)


@pytest.mark.parametrize("url", ["ftp://host/T0SECRET", "T0SECRET", "/B0SECRET", "http://[T0SECRET", "https:///T0SECRET"])
def test_another_kind_of_address_is_a_line_without_it(monkeypatch, caplog, url) -> None:
    monkeypatch.setenv("CAMOPD_WEBHOOK_URL", url)
    assert not send(PROMOTED)
    assert "CAMOPD_WEBHOOK_URL is no" in said(caplog)


@pytest.mark.parametrize(
    ("answers", "arrives", "requests", "words"),
    [
        ([500], True, 2, ""),
        ([429, 503], False, 2, "127.0.0.1 answers with status 503"),
        ([404], False, 1, "status 404; see that the address is right and still in use"),
        ([403], False, 1, "status 403"),
        ([204], True, 1, ""),
    ],
)
def test_a_second_try_where_it_may_help(webhook: Webhook, caplog, answers, arrives, requests, words) -> None:
    webhook.answers.extend(answers)
    assert send(PROMOTED) is arrives
    assert len(webhook.sent) == requests
    assert arrives or words in said(caplog)


def test_a_redirect_is_not_followed(webhook: Webhook, caplog) -> None:
    webhook.answers.append(302)
    webhook.location = webhook.url
    assert not send(PROMOTED)
    assert len(webhook.sent) == 1
    assert "status 302; redirects are not followed" in said(caplog)


def test_a_dead_one_is_a_line(monkeypatch, webhook: Webhook, caplog) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("CAMOPD_WEBHOOK_URL", f"http://127.0.0.1:{free.getsockname()[1]}/T0SECRET")
        assert not send(PROMOTED)
    assert "127.0.0.1 cannot be reached (ConnectionRefusedError)" in said(caplog)


def test_an_unknown_host_is_a_line(monkeypatch, webhook: Webhook, caplog) -> None:
    monkeypatch.setenv("CAMOPD_WEBHOOK_URL", "https://nobody.invalid/T0SECRET")
    assert not send(PROMOTED)
    assert "nobody.invalid cannot be reached (" in said(caplog)


@pytest.mark.parametrize("manner", ["delay", "drip"])
def test_a_slow_one_is_left(webhook: Webhook, monkeypatch, caplog, manner) -> None:
    monkeypatch.setattr(notify, "ATTEMPT_SECONDS", 0.4)
    monkeypatch.setattr(notify, "SECONDS", 1.0)
    setattr(webhook, manner, {"delay": 3, "drip": 0.1}[manner])
    begun = time.monotonic()
    assert not send(PROMOTED)
    assert time.monotonic() - begun < 1.5
    assert "no answer within" in said(caplog)
    assert len(webhook.sent) == 1  # who did not answer may have got it


def test_a_certificate_of_nobody_is_not_trusted(tmp_path, monkeypatch, webhook: Webhook, caplog) -> None:
    certificate = certificate_of_localhost(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with HTTPServer(("127.0.0.1", 0), AlwaysFine) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("CAMOPD_WEBHOOK_URL", f"https://localhost:{server.server_port}/T0SECRET")
        assert not send(PROMOTED)
        assert "localhost cannot be reached (SSLCertVerificationError)" in said(caplog)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert send(PROMOTED)
        server.shutdown()


class AlwaysFine(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def certificate_of_localhost(folder: Path) -> Path:
    """Key and self-signed certificate in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.now(UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
    built = built.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(private + built.sign(key, SHA256()).public_bytes(Encoding.PEM))
    return path


def test_the_proxy_of_the_environment_is_asked(webhook: Webhook, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", webhook.url.partition("/services")[0])
    monkeypatch.setenv("CAMOPD_WEBHOOK_URL", "http://hooks.invalid/T0SECRET")
    assert send(PROMOTED)
    assert webhook.heads[0][0] == "http://hooks.invalid/T0SECRET"
    monkeypatch.setenv("no_proxy", "hooks.invalid")
    assert not send(PROMOTED)


def test_a_user_and_password_in_the_address_are_sent_as_such(webhook: Webhook, monkeypatch) -> None:
    monkeypatch.setenv("CAMOPD_WEBHOOK_URL", webhook.url.replace("http://", "http://me:a%40b@"))
    assert send(PROMOTED)
    assert webhook.heads[0][1]["authorization"] == "Basic bWU6YUBi"  # me:a@b


# --- Once ----------------------------------------------------------------------------------------------------------------


def test_what_has_arrived_is_not_sent_again(webhook: Webhook, tmp_path) -> None:
    store, place = Store(), str(tmp_path)
    webhook.answers.append(404)
    for _ in range(3):
        send_once(PROMOTED, place, 0.0, store)
    assert len(webhook.sent) == 2  # refused, then taken
    (record,) = store.list(join(place, "notified"))
    assert json.loads(store.read(join(place, "notified", record.name))) == webhook.sent[1]
    send_once(PROMOTED, place, 1.0, store)
    send_once(replace(PROMOTED, pipeline_run="another"), place, 0.0, store)
    assert len(webhook.sent) == 4


def test_a_store_that_fails_does_not_keep_the_word(webhook: Webhook, tmp_path) -> None:
    (tmp_path / "notified").write_text("a file where the folder should be")
    send_once(PROMOTED, str(tmp_path), 0.0, Store())
    assert len(webhook.sent) == 1


# --- What runs tell ------------------------------------------------------------------------------------------------------


def release(plan: layout.Plan, store: Store, status: str, version: int | None, *reasons: str) -> None:
    record = {"status": status, "model_name": "icd", "version": version, "alias": "champion", "reasons": reasons}
    store.write(join(release_uri(plan, store), "release.json"), json.dumps(record).encode())


@pytest.mark.parametrize(
    ("status", "version", "reasons", "told", "headline", "next_"),
    [
        ("promoted", 3, [], "success", "was promoted", "Load it as models:/icd@champion."),
        ("superseded", 4, ["the alias champion points to version 3 now"], "refused", "was not promoted", "Compare"),
        ("refused", None, ["the policy is never"], "refused", "was not promoted", "Read the report"),
        (
            "candidate",
            4,
            ["general recovered 0.61 (0.55 to 0.70)"],  # what the gate saw: what to do is under "next"
            "waiting",
            "passed the gate and waits for an approval",
            "Read the report; then camopd approve icd --version 4 --by YOU --why TEXT, or camopd reject.",
        ),
        ("disabled", None, ["no registry"], "success", "passed the gate; nothing is registered", ""),
    ],
)
def test_the_end_of_a_run(tmp_path, webhook: Webhook, status, version, reasons, told, headline, next_) -> None:
    store = Store()
    plan = make_run(str(tmp_path), store)
    release(plan, store, status, version, *reasons)
    announce.tell(ending_of(plan.run_uri, succeeded=True, store=store), store=store, job="kfp-1")
    (sent,) = webhook.sent
    assert (sent["status"], sent["headline"]) == (told, headline)
    assert (sent.get("version"), sent.get("reason", "")) == (version, "; ".join(reasons))
    assert sent.get("next", "").startswith(next_)
    assert sent["report"].endswith("report.html")
    assert sent["pipeline_run"] == "kfp-1"
    assert sent["run_uri"] == plan.run_uri


def test_a_gate_that_says_no(tmp_path, webhook: Webhook) -> None:
    store = Store()
    plan = make_run(str(tmp_path), store, passed=False)
    announce.tell(ending_of(plan.run_uri, succeeded=True, store=store), store=store)
    assert webhook.sent[0]["status"] == "refused"
    assert webhook.sent[0]["reason"] == "the gate said no: domain retained 0.80, below 0.95"


def fail(plan: layout.Plan, store: Store, reason: str) -> None:
    uri = layout.rollout_uri(plan.rounds[0])
    with pytest.raises(CamopdError), Recorded(plan.run_uri, stage="rollout", output_uri=uri, store=store):
        raise CamopdError(reason)


def test_the_exit_handler_tells_once_also_when_it_runs_again(tmp_path, webhook: Webhook) -> None:
    store = Store()
    plan = make_plan(str(tmp_path), store)
    with outcomes.job_record("micro", str(tmp_path), "kfp-1", stage="prepare", store=store) as record:
        record["run"] = plan.run_uri
    fail(plan, store, "the disk is full")
    pages = [workflow.outcome("micro", str(tmp_path), job="kfp-1", succeeded=False, store=store) for _ in range(2)]
    assert pages[0] == pages[1]
    assert "the disk is full" in pages[0]
    (sent,) = webhook.sent
    assert (sent["status"], sent["headline"], sent["reason"]) == ("failed", "failed in rollout", "the disk is full")
    assert sent["next"].startswith("Mend what the reason names.")
    fail(plan, store, "the disk is full")  # a later attempt of the same pipeline run
    workflow.outcome("micro", str(tmp_path), job="kfp-1", succeeded=False, store=store)
    assert len(webhook.sent) == 2


def test_a_run_that_stops_itself(tmp_path, webhook: Webhook) -> None:
    store = Store()
    plan = make_plan(str(tmp_path), store)
    record_stop(plan.run_uri, stage="train", round_number=1, reason="the loss of step 3 is not finite", store=store)
    announce.tell(ending_of(plan.run_uri, succeeded=False, store=store), store=store)
    (sent,) = webhook.sent
    assert (sent["status"], sent["headline"]) == ("failed", "stopped itself")
    assert sent["reason"] == "round 1, train: the loss of step 3 is not finite"
    assert "stop.json" in sent["next"]


def test_a_pipeline_that_fails_in_prepare_is_told_once(tmp_path, webhook: Webhook) -> None:
    store = Store()
    with pytest.raises(InputError), outcomes.job_record("micro", str(tmp_path), "kfp-2", stage="prepare", store=store):
        raise InputError([])
    for _ in range(2):
        workflow.outcome("micro", str(tmp_path), job="kfp-2", succeeded=False, store=store)
    (sent,) = webhook.sent
    assert (sent["status"], sent["headline"]) == ("failed", "failed in prepare")


def test_a_tick_that_finds_nothing_new_is_told_to_nobody(tmp_path, webhook: Webhook) -> None:
    store = Store()
    with outcomes.job_record("micro", str(tmp_path), "kfp-4", stage="resolve", store=store) as record:
        record["skipped"] = "nothing new since version 3"
    page = workflow.outcome("micro", str(tmp_path), job="kfp-4", succeeded=True, store=store)
    assert "The recovery was not started" in page
    assert "nothing new since version 3" in page
    assert webhook.sent == []


def test_a_dead_webhook_changes_nothing(tmp_path, webhook: Webhook) -> None:
    store = Store()
    plan = make_run(str(tmp_path), store, passed=False)
    webhook.answers.extend([500, 500])
    with outcomes.job_record("micro", str(tmp_path), "kfp-3", stage="prepare", store=store) as record:
        record["run"] = plan.run_uri
    assert "The recovery finished" in workflow.outcome("micro", str(tmp_path), job="kfp-3", succeeded=True, store=store)


def test_a_run_on_one_machine_tells_what_it_meets(tmp_path, webhook: Webhook) -> None:
    with pytest.raises(InputError):
        workflow.run("micro", {"output": str(tmp_path), "branches.general.teacher": str(tmp_path / "nowhere")})
    (sent,) = webhook.sent
    assert (sent["status"], sent["headline"]) == ("failed", "failed in prepare")
    assert "nowhere" in sent["reason"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("'the text of a prompt'"), "ValueError, see the log of this step"),
        (SystemExit(143), "ended by SIGTERM, as when a pod is evicted or a run is stopped"),
        (KeyboardInterrupt(), None),
    ],
)
def test_an_end_by_something_else(tmp_path, webhook: Webhook, error, reason) -> None:
    with pytest.raises(type(error)), announce.telling(Store()):
        raise error
    assert [sent["reason"] for sent in webhook.sent] == ([reason] if reason else [])
