"""The connection to the KFP API: kfp's own client and its ways to say who one is; what goes wrong becomes one sentence.

kfp.Client keeps a file in the user's home, prints, has no timeouts, and takes a login page for an empty list: not here.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import urllib3

from camopd.errors import ClusterError

try:
    import kfp
    import kfp_server_api
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH, ServiceAccountTokenVolumeCredentials
except ModuleNotFoundError as error:
    raise ClusterError(f"{error.name} is not installed, which talks to Kubeflow Pipelines: pip install 'camopd[kfp]'") from None

TIMEOUT = 30.0  # seconds of one request
MIN_VERSION = (2, 17)  # of the backend: what the compiled pipeline was read against
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
WHO = (
    "set KFP_TOKEN_FILE or KFP_TOKEN to a token, or KFP_COOKIES to your browser's session (authservice_session=... or "
    "oauth2_proxy_kubeflow=...); in a pod mount a service-account token for pipelines.kubeflow.org and name its path in "
    f"{KF_PIPELINES_SA_TOKEN_ENV}"
)


class ApiError(ClusterError):
    """The KFP API did not answer, or not as was hoped.

    Attributes:
        status: HTTP's number; 0 where there was no answer, or none of the API's.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passing(self) -> bool:
        """Whether the same question may be answered later."""
        return self.status in (0, 401, 429) or self.status >= 500


@dataclass(frozen=True)
class Connection:
    """A KFP API that has answered.

    Attributes:
        host: its address, for people; empty where kfp found one by itself.
        ui: where the UI is; empty where only the cluster knows.
        namespace: of experiments and runs; empty where the server has no users.
        multi_user: whether it has.
        version: of the backend, as far as it tells: ``2.17.0``.
        renewable: whether the token is read anew for every request.
        pipelines, uploads, experiments, runs, recurring: kfp_server_api's services.
    """

    host: str
    ui: str
    namespace: str
    multi_user: bool
    version: str
    renewable: bool
    pipelines: Any
    uploads: Any
    experiments: Any
    runs: Any
    recurring: Any

    @property
    def owned(self) -> dict[str, str]:
        """The namespace as an argument of the services, where there is one."""
        return {"namespace": self.namespace} if self.namespace else {}

    def caution(self) -> str:
        """A sentence where the backend is known to be older than what was tried, else nothing."""
        found = re.match(r"v?(\d+)\.(\d+)", self.version)
        if found is None or (int(found[1]), int(found[2])) >= MIN_VERSION:
            return ""
        return f"{self.host or 'The KFP API'} is version {self.version}; 2.17 or later is needed: ask for an upgrade"

    def run_link(self, run_id: str) -> str:
        """The run's page in the UI; empty where the UI's address is not known."""
        return f"{self.ui}/#/runs/details/{run_id}" if self.ui else ""

    def get(self, path: str) -> Any:
        """What the API says at a path that its client has no method for. Raises ApiError."""
        return _ask(self.runs.api_client, path)


def connect(host: str = "", namespace: str = "") -> Connection:
    """Connect as the environment says and ask for the server's health.

    Host: the argument, KFP_HOST, KF_PIPELINES_ENDPOINT; else kfp's own ways (the service in the cluster, the kubeconfig's).
    Who asks: KFP_TOKEN_FILE (read again for every request), KFP_TOKEN, KFP_COOKIES, a projected service-account token, and what
    kfp.Client reads from the environment for Google's proxy. KFP_CA_FILE: the authority of the server's certificate.
    KFP_PROXY: the HTTP proxy on the way.

    Args:
        host: address of the API or of the UI, such as ``https://kubeflow.example.org/pipeline``.
        namespace: of experiments and runs; else KFP_NAMESPACE, else in a pod its own. Ignored by a server without users.

    Raises:
        ApiError: no answer, or a refusal.
        ClusterError: nothing says where the API is, or a file that is named cannot be read.
    """
    host = _with_scheme(host or os.environ.get("KFP_HOST", "") or os.environ.get("KF_PIPELINES_ENDPOINT", ""))
    token_file = _token_file()
    client = _client(host, token_file)
    api_client = client._run_api.api_client  # kfp.Client has no other way to the services' models
    api_client.rest_client = _Rest(api_client.configuration)
    health = _ask(api_client, "/apis/v2beta1/healthz")
    if not isinstance(health, Mapping):
        raise ApiError(_not_the_api(api_client.configuration.host))
    multi_user = bool(health.get("multi_user"))
    return Connection(
        host=host,
        ui=(os.environ.get("KF_PIPELINES_UI_ENDPOINT") or host).rstrip("/"),
        namespace=_namespace(namespace) if multi_user else "",
        multi_user=multi_user,
        version=str(health.get("tag_name", "")),
        renewable=bool(token_file),
        pipelines=kfp_server_api.PipelineServiceApi(api_client),
        uploads=kfp_server_api.PipelineUploadServiceApi(api_client),
        experiments=kfp_server_api.ExperimentServiceApi(api_client),
        runs=kfp_server_api.RunServiceApi(api_client),
        recurring=kfp_server_api.RecurringRunServiceApi(api_client),
    )


# --- Who asks whom --------------------------------------------------------------------------------------------------------


class _Client(kfp.Client):
    """kfp's client without its file in the user's home, which it would read and, with many users, write."""

    def _load_context_setting_or_default(self) -> None:
        self._context_setting = {"namespace": "asked for in connect"}  # not empty, or it would ask and write


def _client(host: str, token_file: str) -> kfp.Client:
    ca_file = os.environ.get("KFP_CA_FILE") or None
    if ca_file and not Path(ca_file).is_file():
        raise ClusterError(f"KFP_CA_FILE names {ca_file}, which is not there; give the authority's certificate as a PEM file")
    with _quiet():
        client = _Client(
            host=host or None,
            existing_token=None if token_file else os.environ.get("KFP_TOKEN") or None,
            credentials=ServiceAccountTokenVolumeCredentials(token_file) if token_file else None,
            cookies=os.environ.get("KFP_COOKIES") or None,
            ssl_ca_cert=ca_file,
            proxy=os.environ.get("KFP_PROXY") or None,
        )
    if not host and client._existing_config.host == kfp_server_api.Configuration().host:  # its default: nothing was found
        raise ClusterError("nothing says where Kubeflow Pipelines is: give --host or KFP_HOST, such as http://localhost:8888")
    client._existing_config.retries = False  # waiting is the caller's; a redirect is an answer, see _Rest
    _keep_host(client._existing_config)
    return client


def _keep_host(config: Any) -> None:
    """By kubeconfig kfp's host ends with a slash, and each look at the token sets it to the cluster's own, without the path."""
    host, refresh = config.host.rstrip("/"), config.refresh_api_key_hook

    def refreshed(current: Any) -> None:
        refresh(current)
        current.host, current.refresh_api_key_hook = host, refreshed

    config.host = host
    if refresh is not None:
        config.refresh_api_key_hook = refreshed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """kfp tells of an old server, a token that is not mounted, a kubeconfig that is not there: we do, where it matters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _token_file() -> str:
    """The file with the token; empty where none is named and no projected one is there."""
    named = os.environ.get("KFP_TOKEN_FILE") or os.environ.get(KF_PIPELINES_SA_TOKEN_ENV)
    if named:
        if not Path(named).is_file():
            raise ClusterError(
                f"{named} is to hold the token for Kubeflow Pipelines and is not there; write it, or unset its variable"
            )
        return named
    given = os.environ.get("KFP_TOKEN") or os.environ.get("KFP_COOKIES")
    return KF_PIPELINES_SA_TOKEN_PATH if not given and Path(KF_PIPELINES_SA_TOKEN_PATH).is_file() else ""


def _namespace(given: str) -> str:
    found = given or os.environ.get("KFP_NAMESPACE", "")
    if not found and NAMESPACE_FILE.is_file():
        found = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    if not found:
        raise ClusterError(
            "this Kubeflow has many users, so it must be said whose run it is: give --namespace or KFP_NAMESPACE"
        )
    return found


def _with_scheme(host: str) -> str:
    if not host:
        return ""
    return (host if "://" in host else f"https://{host}").split("#")[0].rstrip("/")


# --- What goes wrong ------------------------------------------------------------------------------------------------------


class _Rest(kfp_server_api.rest.RESTClientObject):  # type: ignore[misc]
    """Requests with a timeout, whose failures are ApiErrors. HTML in place of JSON is one of them."""

    def request(self, method: str, url: str, **options: Any) -> Any:
        options["_request_timeout"] = options.get("_request_timeout") or (TIMEOUT, TIMEOUT)  # a float alone is not heeded
        try:
            response = super().request(method, url, **options)
        except kfp_server_api.ApiException as error:
            _raise(error, url)
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(f"{_address(url)} {_no_answer(error)}") from None
        if "html" in (response.urllib3_response.headers.get("Content-Type") or ""):
            raise ApiError(_login(url), 401)
        return response


def _raise(error: kfp_server_api.ApiException, url: str) -> NoReturn:
    status, headers, body = error.status or 0, {k.lower(): v for k, v in dict(error.headers or {}).items()}, error.body or ""
    place = _address(url)
    if status == 0:  # urllib3's SSLError is told so
        raise ApiError(f"{place} {_tls(str(error.reason))}") from None
    if 300 <= status < 400:
        target = headers.get("location", "")
        if re.search(r"dex|login|oauth|auth|signin", target):
            raise ApiError(_login(url), 401) from None
        raise ApiError(
            f"{place} sends elsewhere, to {_address(target) or 'nowhere'}: give that address as the host", 404
        ) from None
    if status in (401, 403) and "html" in headers.get("content-type", ""):  # a proxy's, not the API's
        raise ApiError(_login(url), 401) from None
    message = _message(body)
    if status == 401:
        raise ApiError(f"{place} does not know who asks (401): {WHO}", 401) from None
    if status == 403:
        fix = f"ask for a role in that namespace (kubeflow-edit), give another by --namespace, or ask as somebody else: {WHO}"
        raise ApiError(f"{place} does not allow it (403{f', {message}' if message else ''}): {fix}", 403) from None
    if status in (404, 405) and message in ("", "Not Found"):
        raise ApiError(_not_the_api(url), 404) from None
    raise ApiError(f"{place} refused ({status}): {message or 'without a reason'}", status) from None


def _ask(api_client: Any, path: str) -> Any:
    return api_client.call_api(path, "GET", response_type="object", auth_settings=["Bearer"], _return_http_data_only=True)


def _message(body: str | bytes) -> str:
    """The reason in the API's answer; empty where the answer is not the API's."""
    try:
        told = json.loads(body)
    except ValueError:
        return ""
    found = (told.get("message") or told.get("error_message") or "") if isinstance(told, dict) else ""
    return " ".join(str(found).split())[:500]


def _no_answer(error: urllib3.exceptions.HTTPError) -> str:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, urllib3.exceptions.SSLError):
        return _tls(str(reason))
    known = {
        urllib3.exceptions.NameResolutionError: "has a name that no DNS knows",
        urllib3.exceptions.NewConnectionError: "does not answer",
        urllib3.exceptions.ConnectTimeoutError: "does not answer in time",
        urllib3.exceptions.ReadTimeoutError: "does not answer in time",
        urllib3.exceptions.ProtocolError: "broke the connection",
    }
    what = next(
        (sentence for kind, sentence in known.items() if isinstance(reason, kind)), f"cannot be asked ({type(reason).__name__})"
    )
    return f"{what}: check --host or KFP_HOST, and that the port-forward or the VPN is up"


def _tls(reason: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return "has a certificate that is not trusted: give its authority's by KFP_CA_FILE"
    if "WRONG_VERSION_NUMBER" in reason or "record layer" in reason.lower():
        return "does not speak TLS: write http:// before the host, if that is meant"
    return f"cannot be asked by TLS ({reason[:200]}): check the host's port and certificate"


def _login(url: str) -> str:
    return f"{_address(url)} answers with a login page, so it does not know who asks, or no longer: {WHO}"


def _not_the_api(url: str) -> str:
    return f"{_address(url)} has no KFP API at this path: in Kubeflow the host ends with /pipeline, as in https://kubeflow.example.org/pipeline"


def _address(url: str) -> str:
    """Host and path before the API's own, without user, query and fragment."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path.split('/apis/')[0].rstrip('/')}" if host else ""
