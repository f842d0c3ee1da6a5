"""Case 07: stores that speak S3, with the habits that broke others, against a real server and a gateway that misbehaves."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from camopd.errors import MissingError, StoreError
from camopd.store import MANIFEST, Manifest, Store, content_id_of, join
from camopd.store.s3 import S3Backend, s3_client
from tests.fixtures.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from tests.fixtures.s3_gateway import RESET, Answer, Gateway, Request, gateway_to

pytestmark = pytest.mark.slow

CASE = Path(__file__).parent / "cases" / "07-s3-compatible-endpoint"
BEHAVIOUR = {rule["when"]: rule["then"] for rule in json.loads((CASE / "server_behaviour.json").read_text(encoding="utf-8"))}
LARGE = os.urandom(1 << 20) * 20  # three parts of 8, 8 and 4 MiB
NAMES = [
    "prompts.jsonl",
    "réseau d'huile/v1+2/prompts.jsonl",
    "with%20percent/x.jsonl",
    'quote " and <angle> & amp.txt',
    "日本語/ﬁ é e\u0301.txt",
    "a  b/ c /~!*()@$,:;=.txt",
]


@pytest.fixture
def gateway(s3_server: S3Server, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with gateway_to(s3_server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.endpoint)
        yield running


def writer(files: dict[str, bytes]) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return {}

    return write


def produce(store: Store, uri: str, files: dict[str, bytes]) -> Manifest:
    return store.produce(uri, stage="train", config={}, inputs={}, write=writer(files))


def produce_elsewhere(uri: str, files: dict[str, bytes], tmp_path: Path) -> Manifest:
    """On another machine, so that nothing of it is in this one's cache."""
    return produce(Store(cache=tmp_path / "elsewhere"), uri, files)


def put(store: Store, uri: str, files: dict[str, bytes]) -> None:
    """Objects as another program would leave them: no manifest."""
    for name, data in files.items():
        store.write(join(uri, name), data)


def open_uploads(server: S3Server, uri: str) -> list[str]:
    uploads = server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return [upload["Key"] for upload in uploads if f"s3://{BUCKET}/{upload['Key']}".startswith(uri)]


def once(matches: Callable[[Request], bool], answer: Answer, number: int = 1) -> Callable[[Request], Answer | None]:
    """Answer the ``number``-th matching request, and only that one."""
    lock, seen = Lock(), 0

    def rule(request: Request) -> Answer | None:
        nonlocal seen
        with lock:
            seen += matches(request)
            return answer if seen == number and matches(request) else None

    return rule


# --- Names and prefixes ---------------------------------------------------------------------------------------------------


def test_names_come_back_exactly_as_they_went(s3_prefix: str) -> None:
    store, files = Store(), {name: name.encode() for name in NAMES}
    manifest = produce(store, join(s3_prefix, "réseau + d'huile"), files)
    uri = join(s3_prefix, "réseau + d'huile")
    assert [file.name for file in store.list(uri)] == sorted(NAMES) == [file.name for file in manifest.files]
    assert store.verify(uri, deep=True) == []
    place = store.fetch(uri)
    assert {name: (place / name).read_bytes() for name in NAMES} == files
    for name in NAMES:
        assert store.stat(join(uri, name)) is not None
        assert store.fetch(join(uri, name)).read_bytes() == files[name]


def test_a_bucket_with_dots(s3_prefix: str, s3_server: S3Server) -> None:
    s3_server.client().create_bucket(Bucket="my.dotted.bucket")
    produce(Store(), "s3://my.dotted.bucket/x", {"a": b"1"})
    assert Store().verify("s3://my.dotted.bucket/x", deep=True) == []


def test_a_prefix_holds_nothing_of_its_neighbours(s3_prefix: str) -> None:
    store = Store()
    put(store, s3_prefix, {"domain-a/x": b"1", "domain-ab/y": b"2", "domain-a.txt": b"3"})
    uri = join(s3_prefix, "domain-a")
    assert [file.name for file in store.list(uri)] == ["x"]
    assert [path.name for path in store.fetch(uri).iterdir() if path.name != MANIFEST] == ["x"]


def test_folder_markers_and_hidden_names_are_nobodys_content(s3_prefix: str, s3_server: S3Server) -> None:
    store, client, key = Store(), s3_server.client(), s3_prefix.partition(f"{BUCKET}/")[2]
    client.put_object(Bucket=BUCKET, Key=f"{key}/model/")
    client.put_object(Bucket=BUCKET, Key=f"{key}/model/sub/")
    put(store, join(s3_prefix, "model"), {"config.json": b"{}", ".gitattributes": b"", ".cache/lock": b""})
    assert [file.name for file in store.list(join(s3_prefix, "model"))] == ["config.json"]


def test_more_objects_than_one_page_of_a_listing(s3_prefix: str, s3_server: S3Server) -> None:
    client, key = s3_server.client(), s3_prefix.partition(f"{BUCKET}/")[2]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.put_object(Bucket=BUCKET, Key=f"{key}/{i:04d}"), range(1005)))
    assert len(Store().list(s3_prefix)) == 1005


# --- The client -----------------------------------------------------------------------------------------------------------


def test_a_server_of_ones_own_gets_path_style_and_no_checksums(monkeypatch: pytest.MonkeyPatch, s3_prefix: str) -> None:
    for line in (CASE / "endpoint.env").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            monkeypatch.setenv(*line.split("=", 1))
    for _ in range(2):
        config = s3_client().meta.config
        assert (config.request_checksum_calculation, config.response_checksum_validation) == ("when_required", "when_required")
        assert config.s3["addressing_style"] == "path"
        assert config.retries == {"mode": "standard", "total_max_attempts": 8}
        assert s3_client().meta.region_name == "us-east-1"
        monkeypatch.delenv("S3_ADDRESSING_STYLE", raising=False)  # the second time without it: path is also the default


def test_the_endpoint_of_a_profile_counts_as_well(monkeypatch: pytest.MonkeyPatch, s3_prefix: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\nregion = eu-west-3\nendpoint_url = http://objectstore.storage.svc:9000\n")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    client = s3_client()
    assert client.meta.endpoint_url == "http://objectstore.storage.svc:9000"
    assert client.meta.region_name == "eu-west-3"
    assert client.meta.config.request_checksum_calculation == "when_required"


def test_amazon_keeps_the_defaults_of_boto3(monkeypatch: pytest.MonkeyPatch, s3_prefix: str) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    client = s3_client()
    assert client.meta.region_name == "eu-central-1"
    assert client.meta.config.request_checksum_calculation == "when_supported"
    for bucket, host in [("models", "//models.s3"), ("my.dotted.bucket", "/my.dotted.bucket/")]:  # no certificate matches dots
        assert host in client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": "x"})


def test_settings_may_be_chosen(monkeypatch: pytest.MonkeyPatch, s3_prefix: str) -> None:
    chosen = {"S3_ADDRESSING_STYLE": "virtual", "AWS_MAX_ATTEMPTS": "3", "AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported"}
    for name, value in {**chosen, "AWS_ENDPOINT_URL_S3": "http://store:9000"}.items():
        monkeypatch.setenv(name, value)
    client = s3_client()
    assert client.generate_presigned_url("get_object", {"Bucket": "models", "Key": "x"}).startswith(
        "http://models.store:9000/x?"
    )
    assert client.meta.config.retries["total_max_attempts"] == 3
    assert client.meta.config.request_checksum_calculation == "when_supported"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("S3_ADDRESSING_STYLE", "dns", "S3_ADDRESSING_STYLE is 'dns'; write path, virtual or auto"),
        ("AWS_MAX_ATTEMPTS", "many", "AWS_MAX_ATTEMPTS is 'many'"),
        ("AWS_MAX_ATTEMPTS", "0", "AWS_MAX_ATTEMPTS is '0'"),
        ("AWS_ENDPOINT_URL_S3", "minio:9000", r"AWS_ENDPOINT_URL_S3 \(http://host:port\)"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "never", "when_required"),
        ("AWS_PROFILE", "nobody", "nobody"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, s3_prefix: str, name: str, value: str, words: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=words):
        s3_client()


# --- What the servers of the case do --------------------------------------------------------------------------------------


def test_every_behaviour_of_the_case_is_tried() -> None:
    assert BEHAVIOUR == {
        "PutObject or UploadPart has header x-amz-sdk-checksum-algorithm or aws-chunked trailer": "411 MissingContentLength",
        "Host is bucket-style": "DNS failure",
        "3rd UploadPart": "connection reset once",
        "token older than 900 s": "400 ExpiredToken",
        "PutObject with If-None-Match": "501 NotImplemented",
        "HeadObject without ListBucket right on a missing key": "403",
    }


def refuse_checksums(request: Request) -> Answer | None:
    trailer = "aws-chunked" in request.headers.get("content-encoding", "") or "x-amz-trailer" in request.headers
    if request.method == "PUT" and (trailer or "x-amz-sdk-checksum-algorithm" in request.headers):
        return Answer.error(411, "MissingContentLength")
    return None


def test_uploads_pass_where_checksums_are_refused(gateway: Gateway, s3_prefix: str) -> None:
    gateway.before = refuse_checksums
    produce(Store(), s3_prefix, {"small": b"1", "large": LARGE})
    assert Store().verify(s3_prefix, deep=True) == []
    assert sum(request.is_part for request in gateway.requests) == 3
    assert {request.headers["host"] for request in gateway.requests} == {gateway.endpoint.removeprefix("http://")}


def test_a_refused_checksum_is_explained(gateway: Gateway, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    gateway.before = refuse_checksums
    with pytest.raises(StoreError, match="set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        Store().write(join(s3_prefix, "x"), b"1")


def test_one_reset_is_retried(gateway: Gateway, s3_prefix: str) -> None:
    gateway.before = once(lambda request: request.is_part, RESET, number=3)
    produce(Store(), s3_prefix, {"large": LARGE})
    assert sum(request.is_part for request in gateway.requests) == 4
    assert Store().verify(s3_prefix, deep=True) == []


def test_a_given_up_upload_is_aborted(
    gateway: Gateway, s3_prefix: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    gateway.before = lambda request: RESET if request.query.get("partNumber") == ["3"] else None
    with pytest.raises(StoreError, match=f"{s3_prefix}/large: {gateway.endpoint} does not answer"):
        produce(Store(), s3_prefix, {"large": LARGE})
    assert any(request.is_part for request in gateway.requests)
    assert open_uploads(s3_server, s3_prefix) == []
    assert Store().manifest(s3_prefix) is None


KILLED = """
import sys
from pathlib import Path
from camopd.store import Store

def write(folder):
    (folder / "large").write_bytes(Path(sys.argv[2]).read_bytes())
    return {}

Store().produce(sys.argv[1], stage="train", config={}, inputs={}, write=write)
"""


def test_parts_of_a_killed_upload_are_freed_by_the_next(
    gateway: Gateway, s3_prefix: str, s3_server: S3Server, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(LARGE)
    child = subprocess.Popen([sys.executable, "-c", KILLED, s3_prefix, str(large)])

    def kill_at_the_second_part(request: Request) -> Answer | None:
        if request.query.get("partNumber") == ["2"] and child.returncode is None:
            child.send_signal(signal.SIGKILL)
        return None

    gateway.before = kill_at_the_second_part
    assert child.wait() == -signal.SIGKILL
    assert len(open_uploads(s3_server, s3_prefix)) == 1
    assert Store().manifest(s3_prefix) is None
    produce(Store(), s3_prefix, {"large": LARGE})
    assert open_uploads(s3_server, s3_prefix) == []
    assert Store().verify(s3_prefix, deep=True) == []


class TokenService:
    """Credentials as a pod's role gets them: short-lived, each answer with another token."""

    def __init__(self, lifetime: float) -> None:
        self.lifetime, self.issued = lifetime, dict[str, float]()

    def __call__(self, request: Request) -> Answer | None:
        if request.path == "/credentials":
            token = f"token-{len(self.issued)}"
            self.issued[token] = time.monotonic()
            expires = datetime.now(UTC) + timedelta(minutes=5)  # within boto3's 10 minutes, so it asks anew for each request
            record = {
                "AccessKeyId": ACCESS_KEY,
                "SecretAccessKey": SECRET_KEY,
                "Token": token,
                "Expiration": expires.isoformat(),
            }
            return Answer(200, json.dumps(record).encode(), {"Content-Type": "application/json"})
        issued = self.issued.get(request.headers["x-amz-security-token"])
        if issued is None or time.monotonic() - issued > self.lifetime:
            return Answer.error(400, "ExpiredToken")
        return None


@pytest.fixture
def tokens(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> TokenService:
    service = TokenService(lifetime=2.0)
    gateway.before = service
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{gateway.endpoint}/credentials")
    return service


def test_an_upload_outlives_its_first_token(gateway: Gateway, tokens: TokenService, s3_prefix: str) -> None:
    store = Store()
    store.write(join(s3_prefix, "first"), b"1")
    first = gateway.requests[-1].headers["x-amz-security-token"]
    time.sleep(tokens.lifetime + 0.1)
    produce(store, join(s3_prefix, "model"), {"large": LARGE})
    of_parts = {request.headers["x-amz-security-token"] for request in gateway.requests if request.is_part}
    assert first not in of_parts
    assert len(of_parts) > 1


def test_an_expired_token_is_explained(
    gateway: Gateway, tokens: TokenService, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in [("ACCESS_KEY_ID", ACCESS_KEY), ("SECRET_ACCESS_KEY", SECRET_KEY), ("SESSION_TOKEN", "of yesterday")]:
        monkeypatch.setenv(f"AWS_{name}", value)
    store = Store()
    with pytest.raises(StoreError, match="the credentials have expired") as error:
        produce(store, s3_prefix, {"x": b"1"})
    with pytest.raises(
        StoreError, match="refused without a reason; most often the credentials have expired"
    ):  # HEAD has no body
        store.stat(s3_prefix)
    assert "of yesterday" not in str(error.value)
    assert SECRET_KEY not in str(error.value)


def test_without_if_none_match_the_guard_is_weaker_and_says_so(
    gateway: Gateway, s3_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.before = lambda request: Answer.error(501, "NotImplemented") if "if-none-match" in request.headers else None
    store, place = Store(), join(s3_prefix, "stop.json")
    with caplog.at_level(logging.WARNING, logger="camopd.store.s3"):
        assert store.write(place, b"1", if_absent=True)
        assert not store.write(place, b"2", if_absent=True)
    assert store.read(place) == b"1"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("camopd")]
    assert [message.partition(":")[0] for message in ours] == [gateway.endpoint.partition(":")[0]]
    assert "has no If-None-Match" in caplog.text
    assert produce(store, join(s3_prefix, "run"), {"x": b"1"}) == store.require(join(s3_prefix, "run"))


def test_if_none_match_keeps_the_first(s3_prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    store, place = Store(), join(s3_prefix, "stop.json")
    assert store.write(place, b"1", if_absent=True)
    assert not store.write(place, b"1", if_absent=True)
    assert not [record for record in caplog.records if record.name.startswith("camopd")]


def test_a_repeated_write_finds_its_own_first_attempt(gateway: Gateway, s3_prefix: str) -> None:
    """The object was written, but the answer was lost; the second attempt of the same request meets a 412."""
    lost = once(lambda request: "if-none-match" in request.headers, RESET)
    gateway.after = lambda request, answer: lost(request) or answer
    assert Store().write(join(s3_prefix, "x"), b"1", if_absent=True)
    assert sum("if-none-match" in request.headers for request in gateway.requests) == 2


def test_403_for_a_missing_key_is_missing_or_no_permission(gateway: Gateway, s3_prefix: str) -> None:
    def hide(request: Request, answer: Answer) -> Answer:
        return Answer.error(403, "AccessDenied") if answer.status == 404 else answer

    gateway.after = hide
    for method in ("stat", "read", "manifest", "content_id", "fetch"):
        with pytest.raises(StoreError, match=f"{s3_prefix}.*missing or no permission.*s3:ListBucket"):
            getattr(Store(), method)(s3_prefix)


# --- What goes wrong is said ----------------------------------------------------------------------------------------------


def test_missing_objects_and_prefixes(s3_prefix: str) -> None:
    store = Store()
    assert store.stat(s3_prefix) is None
    assert store.list(s3_prefix) == []
    assert store.manifest(s3_prefix) is None
    for method in ("read", "fetch", "content_id"):
        with pytest.raises(MissingError, match=s3_prefix):
            getattr(store, method)(s3_prefix)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer; check AWS_ENDPOINT_URL_S3"),
        ({"AWS_ENDPOINT_URL_S3": "http://nowhere.invalid"}, "http://nowhere.invalid does not answer"),
        ({"AWS_ACCESS_KEY_ID": "unknown"}, "access key is not known.*AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "other"}, "secret does not belong to the access key"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "[Cc]redentials.*set AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "[Cc]redentials.*set AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_settings_are_explained(
    s3_prefix: str, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str | None], words: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name, value in settings.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=words):
        Store().manifest(s3_prefix)


def test_a_missing_bucket_is_named(s3_prefix: str) -> None:
    for call in (Store().content_id, Store().manifest):
        with pytest.raises(StoreError, match=r"there is no bucket no-such-bucket at http://127\.0\.0\.1.*create it"):
            call("s3://no-such-bucket/x")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (301, "PermanentRedirect", "lies in another region than us-east-1; set AWS_DEFAULT_REGION"),
        (503, "SlowDown", "overloaded or failing"),
        (403, "RequestTimeTooSkewed", "clock"),
        (418, "Teapot{0}", r"refused: Teapot\{0\} by the test"),
    ],
)
def test_other_refusals_are_explained(
    gateway: Gateway, s3_prefix: str, monkeypatch: pytest.MonkeyPatch, status: int, code: str, words: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    answer = Answer.error(status, code)
    answer.headers["x-amz-bucket-region"] = "eu-west-3"
    gateway.before = lambda request: answer
    with pytest.raises(StoreError, match=words):
        Store().read(s3_prefix)


# --- Downloads ------------------------------------------------------------------------------------------------------------


def gets(gateway: Gateway, name: str) -> int:
    return sum(request.method == "GET" and request.path.endswith(name) for request in gateway.requests)


def test_a_copy_is_downloaded_once_and_carries_the_identity(gateway: Gateway, s3_prefix: str, tmp_path: Path) -> None:
    store, uri = Store(), join(s3_prefix, "train")
    manifest = produce_elsewhere(uri, {"x.bin": b"1", "sub/large.bin": LARGE}, tmp_path)
    put(store, join(s3_prefix, "copy"), {"x.bin": b"1"})
    first = store.fetch(uri)
    assert (first / "sub" / "large.bin").read_bytes() == LARGE
    asked = gets(gateway, "x.bin"), gets(gateway, "large.bin")
    assert min(asked) >= 1
    assert Store().fetch(uri) == first
    assert (gets(gateway, "x.bin"), gets(gateway, "large.bin")) == asked
    assert store.content_id(str(first)) == store.content_id(uri) == manifest.content_id
    foreign = store.fetch(join(s3_prefix, "copy"))
    assert store.content_id(str(foreign)) == store.content_id(join(s3_prefix, "copy"))
    assert sorted(os.listdir(tmp_path / "cache")) == sorted([first.name, foreign.name])


def test_a_single_object_is_a_file(s3_prefix: str) -> None:
    store, uri = Store(), join(s3_prefix, "prompts.jsonl")
    store.write(uri, b"{}")
    path, before = store.fetch(uri), store.content_id(uri)
    assert (path.name, path.read_bytes()) == ("prompts.jsonl", b"{}")
    store.write(uri, b"[]")
    assert store.fetch(uri).read_bytes() == b"[]"
    assert store.content_id(uri) != before
    assert path.read_bytes() == b"{}"


def test_partial_and_damaged_copies_are_never_used(s3_prefix: str, tmp_path: Path) -> None:
    store = Store()
    produce_elsewhere(s3_prefix, {"a": b"1234", "b": b"5678"}, tmp_path)
    place = store.fetch(s3_prefix)
    for name, data in [("a", None), ("b", b""), (MANIFEST, None)]:
        (place / name).unlink()
        if data is not None:
            (place / name).write_bytes(data)
        if name == MANIFEST:  # as a killed download would leave it
            (place / "a").write_bytes(b"4321")
        assert store.fetch(s3_prefix) == place
        assert {file: (place / file).read_bytes() for file in ("a", "b")} == {"a": b"1234", "b": b"5678"}


@pytest.mark.parametrize("name", ["x.bin", "large.bin"])
def test_a_bad_download_is_repeated_once(gateway: Gateway, s3_prefix: str, name: str, tmp_path: Path) -> None:
    store, good = Store(), {"x.bin": b"good", "large.bin": LARGE}[name]
    produce_elsewhere(s3_prefix, {name: good}, tmp_path)

    def is_body(request: Request) -> bool:
        return request.method == "GET" and request.path.endswith(name)

    bad = once(is_body, RESET)

    def spoil(request: Request, answer: Answer) -> Answer:
        return replace(answer, body=b"!" + answer.body[1:]) if bad(request) else answer

    gateway.after = spoil
    assert store.fetch(join(s3_prefix, name)).read_bytes() == good


def test_a_download_that_stays_bad_is_an_error_and_not_kept(gateway: Gateway, s3_prefix: str, tmp_path: Path) -> None:
    store, uri = Store(), join(s3_prefix, "train")
    produce_elsewhere(uri, {"x.bin": b"good"}, tmp_path)
    store.write(join(uri, "x.bin"), b"evil")
    for place in (uri, join(uri, "x.bin")):
        with pytest.raises(StoreError, match=r"x\.bin was downloaded twice and has another sha256 than its manifest says"):
            store.fetch(place)
    assert store.verify(uri, deep=True) == [f"{uri}/x.bin has another sha256 than its manifest says"]
    store.write(join(uri, "x.bin"), b"longer")
    with pytest.raises(StoreError, match="6 bytes, not 4"):
        store.fetch(uri)
    assert os.listdir(tmp_path / "cache") == []


def test_an_answer_that_breaks_off_is_read_again(gateway: Gateway, s3_prefix: str) -> None:
    store, place = Store(), join(s3_prefix, "x")
    store.write(place, b"0123456789")
    cut = once(lambda request: request.method == "GET", RESET)
    gateway.after = lambda request, answer: (
        Answer(answer.status, answer.body, answer.headers, sent=4) if cut(request) else answer
    )
    assert store.read(place) == b"0123456789"
    assert (store.read(place, 2, 3), store.read(place, 8, 5), store.read(place, 10, 5)) == (b"234", b"89", b"")
    gateway.after = lambda request, answer: replace(answer, sent=4)
    with pytest.raises(StoreError, match=f"{place}: "):
        store.read(place)


def test_content_that_changes_under_a_download_is_not_taken(gateway: Gateway, s3_prefix: str, tmp_path: Path) -> None:
    store = Store()
    put(store, s3_prefix, {"a": b"1", "b": b"1"})
    change = once(lambda request: request.method == "GET" and request.path.endswith("/b"), RESET)

    def rewrite(request: Request) -> Answer | None:
        if change(request):
            store.write(join(s3_prefix, "a"), b"2")
        return None

    gateway.before = rewrite
    with pytest.raises(StoreError, match="changed while it was downloaded"):
        store.fetch(s3_prefix)
    assert (store.fetch(s3_prefix) / "a").read_bytes() == b"2"


def test_a_download_cannot_leave_the_cache(s3_prefix: str, tmp_path: Path) -> None:
    """Names come from the server's listing or from a manifest, which somebody else may have written."""
    store, files = Store(), [{"name": "x", "size": 1, "sha256": hashlib.sha256(b"1").hexdigest()}]
    record = {"stage": "x", "content_id": "sha256:../escaped", "files": files}
    put(store, s3_prefix, {MANIFEST: json.dumps(record).encode(), "x": b"1"})
    assert store.fetch(s3_prefix).parent == tmp_path / "cache"
    files[0]["name"] = "../../escaped"
    put(store, s3_prefix, {MANIFEST: json.dumps(record).encode()})
    with pytest.raises(StoreError, match="cannot be a file below a folder"):
        store.fetch(s3_prefix)


def test_several_fetch_at_once(s3_prefix: str, tmp_path: Path) -> None:
    produce_elsewhere(s3_prefix, {"a": b"1" * 1000, "large": LARGE}, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(lambda _: Store().fetch(s3_prefix), range(4)))
    assert len(places) == 1
    assert (places.pop() / "large").read_bytes() == LARGE
    assert len(os.listdir(tmp_path / "cache")) == 1


# --- Two runs at once -----------------------------------------------------------------------------------------------------


def store_that_is_overtaken(event: str, other: Callable[[], object]) -> Store:
    """A store whose first request of a kind comes just after something that another run does."""
    client = s3_client()
    waiting = [other]

    def overtake(**_: Any) -> None:
        if waiting:
            waiting.pop()()

    client.meta.events.register(f"before-call.s3.{event}", overtake)
    return Store(s3=S3Backend(client))


@pytest.mark.parametrize("event", ["PutObject", "CreateMultipartUpload", "UploadPart"])
def test_two_runs_with_the_same_content_agree(s3_prefix: str, s3_server: S3Server, event: str) -> None:
    files = {"large": LARGE, "small": b"1"}
    made: list[Manifest] = []
    store = store_that_is_overtaken(event, lambda: made.append(produce(Store(), s3_prefix, files)))
    assert produce(store, s3_prefix, files) == made[0] == store.require(s3_prefix)
    assert store.verify(s3_prefix, deep=True) == []
    assert open_uploads(s3_server, s3_prefix) == []


def test_two_runs_with_different_content_are_never_mixed_in_silence(s3_prefix: str) -> None:
    store = store_that_is_overtaken("PutObject", lambda: produce(Store(), s3_prefix, {"a": b"theirs"}))
    with pytest.raises(StoreError, match="by two runs at once, with different content; remove it"):
        produce(store, s3_prefix, {"a": b"ours"})


def test_a_run_that_finishes_while_the_other_works_counts(s3_prefix: str) -> None:
    store, theirs = Store(), list[Manifest]()

    def write(folder: Path) -> dict[str, Any]:
        theirs.append(produce(Store(), s3_prefix, {"a": b"theirs"}))
        return writer({"a": b"ours"})(folder)

    assert store.produce(s3_prefix, stage="train", config={}, inputs={}, write=write) == theirs[0]
    assert store.read(join(s3_prefix, "a")) == b"theirs"


def test_a_finished_prefix_is_never_written_again(gateway: Gateway, s3_prefix: str) -> None:
    first = produce(Store(), s3_prefix, {"a": b"1"})
    assert first.content_id == content_id_of(first.files)
    before = len(gateway.requests)
    assert produce(Store(), s3_prefix, {"a": b"2"}) == first
    assert {request.method for request in gateway.requests[before:]} == {"GET"}
    assert "DELETE" not in {request.method for request in gateway.requests}
