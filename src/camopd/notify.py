"""Telling people how a recovery ended: one small JSON to a webhook, which Slack and its kin show as it is.

The address is a secret (whoever knows it can write to the channel), so that nothing here shows more of it than its host. A
webhook that is dead, slow or refuses costs one line in the log and ten seconds at most; it never fails a run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

from camopd.errors import CamopdError
from camopd.store import Store, digest, join

WEBHOOK = "CAMOPD_WEBHOOK_URL"
SECONDS = 10.0  # in all, whatever the webhook does
ATTEMPTS = 2
ATTEMPT_SECONDS = 4.5  # of connecting and of waiting for an answer
BUSY = (408, 429, 500, 502, 503, 504)  # statuses that a second attempt may not meet
LONGEST = 1000  # characters of a reason

Status = Literal["success", "waiting", "refused", "failed", "skipped", "approved", "rejected", "rolled-back"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """What happened, for people and machines. Sentences of ours and locations alone: no prompt, no answer, no data.

    Attributes:
        status: ``success``, ``waiting`` (for an approval), ``refused`` (evaluated, but the alias was not moved), ``failed``,
            ``skipped``; ``approved``, ``rejected`` and ``rolled-back`` are what people did.
        headline: the same in a few words that go on from the run's name: ``was promoted``.
        run: the run's name, or the model's where no run is meant.
        run_uri: the run's prefix.
        report: location of report.html.
        model: registered model.
        version: its version.
        alias: the alias that was moved or was to be.
        reason: why; cut at 1,000 characters.
        next: what to do now.
        pipeline_run: id of the pipeline run.
        pipeline_url: page of the pipeline run.
    """

    status: Status
    headline: str
    run: str = ""
    run_uri: str = ""
    report: str = ""
    model: str = ""
    version: int | None = None
    alias: str = ""
    reason: str = ""
    next: str = ""
    pipeline_run: str = ""
    pipeline_url: str = ""

    @property
    def text(self) -> str:
        """A few lines for people."""
        version = f"version {self.version}" if self.version is not None else ""
        model = ", ".join(part for part in (self.model, version, self.alias and f"alias {self.alias}") if part)
        lines = {
            "Model": model,
            "Reason": self.reason,
            "Report": self.report,
            "Next": self.next,
            "Pipeline run": self.pipeline_url or self.pipeline_run,
        }
        first = f"camopd: {self.run} {self.headline}" if self.run else f"camopd: {self.headline}"
        return "\n".join([first, *(f"{name}: {value}" for name, value in lines.items() if value)])

    def payload(self) -> dict[str, Any]:
        """The JSON: ``text`` as Slack reads it (its three signs escaped), and every field that has a value as it is."""
        short = replace(self, reason=self.reason if len(self.reason) <= LONGEST else f"{self.reason[:LONGEST]} ...")
        fields = {name: value for name, value in asdict(short).items() if value not in ("", None)}
        shown = short.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return _without_passwords({"text": shown, **fields})


def _without_passwords(fields: dict[str, Any]) -> dict[str, Any]:
    """Hide user and password of every URI."""
    return {k: re.sub(r"//[^/\s'\"]+@", "//***@", v) if isinstance(v, str) else v for k, v in fields.items()}


def send_once(message: Message, place: str, moment: float, store: Store) -> None:
    """Send a message unless the same one has arrived: an exit handler may run twice. Never raises, like ``send``.

    Args:
        message: what to tell.
        place: prefix that takes the record, ``<place>/notified/<digest>.json``; empty keeps none.
        moment: when it happened, where that makes it another event than one that reads the same.
        store: where the record lies.
    """
    if not os.environ.get(WEBHOOK, "").strip():
        return
    name = digest([message.payload(), moment]).removeprefix("sha256:")[:12]
    record = join(place, "notified", f"{name}.json") if place else ""
    try:
        if record and store.stat(record) is not None:
            return
    except (CamopdError, OSError):
        record = ""  # a store that fails is what there is to tell
    if send(message) and record:
        with contextlib.suppress(CamopdError, OSError):
            store.write(record, json.dumps(message.payload(), indent=1, ensure_ascii=False).encode(), if_absent=True)


def send(message: Message) -> bool:
    """Post a message to the webhook of CAMOPD_WEBHOOK_URL. Never raises, and returns within about ten seconds.

    False: it did not arrive, as the log says, or no webhook is set. A request whose answer is lost may have arrived.
    """
    url = os.environ.get(WEBHOOK, "").strip()  # files of secrets often end with a line break
    if not url:
        return False
    outcome: list[str] = []
    # In a thread, since name resolution knows no time limit, nor does an answer that comes byte by byte.
    thread = threading.Thread(target=lambda: outcome.append(_deliver(url, message)), daemon=True)
    thread.start()
    thread.join(SECONDS)
    problem = outcome[0] if outcome else f"it gave no answer within {SECONDS:.0f} s"
    if problem:
        log.warning("%s was not told by the webhook of %s: %s", message.status, WEBHOOK, problem)
    return not problem


def _deliver(url: str, message: Message) -> str:
    """Post it, twice where that may help; why it did not arrive, or nothing. Never a word of the address but its host."""
    import urllib3
    from urllib3.exceptions import HTTPError, LocationParseError, ReadTimeoutError

    try:
        address = urllib3.util.parse_url(url)
    except LocationParseError:
        return f"{WEBHOOK} is not an address; write https://host/path"
    if address.scheme not in ("http", "https") or not address.host:
        return f"{WEBHOOK} is no http(s) address; write https://host/path"
    headers = {"Content-Type": "application/json"}
    if address.auth:
        headers |= urllib3.util.make_headers(basic_auth=unquote(address.auth))
    body = json.dumps(message.payload(), ensure_ascii=False).encode()
    problem = ""
    with _unlogged(address.request_uri), _manager(address.scheme, address.host) as http:
        for _ in range(ATTEMPTS):
            try:
                # The body is not read: a status says it all, and who sends it slowly is not waited for.
                with http.request("POST", url, body=body, headers=headers, redirect=False, preload_content=False) as response:
                    status = response.status
            except ReadTimeoutError:
                return f"{address.host} gave no answer within {ATTEMPT_SECONDS} s; the message may have arrived"
            except (HTTPError, OSError, ValueError) as error:  # their texts quote the address
                problem = f"{address.host} cannot be reached ({_kind(error)})"
                continue
            if 200 <= status < 300:
                return ""
            problem = f"{address.host} answers with status {status}"
            if 300 <= status < 400:
                return f"{problem}; redirects are not followed, so set the address that it leads to"
            if status not in BUSY:
                return f"{problem}; see that the address is right and still in use"
    return problem


def _manager(scheme: str, host: str) -> Any:
    """Connections by way of the environment's proxy, if there is one for this host."""
    import urllib3

    how: dict[str, Any] = {"retries": False, "timeout": urllib3.Timeout(total=ATTEMPT_SECONDS)}
    proxy = getproxies().get(scheme)
    if proxy and not proxy_bypass(host):
        return urllib3.ProxyManager(proxy, **how)
    return urllib3.PoolManager(**how)


def _kind(error: Exception) -> str:
    """The innermost error's name: ``ConnectionRefusedError``, ``gaierror``, ``SSLCertVerificationError``."""
    seen = [error]
    while True:
        inner = (seen[-1].__cause__, getattr(seen[-1], "reason", None), *seen[-1].args)
        found = next((one for one in inner if isinstance(one, Exception) and one not in seen), None)
        if found is None:
            return type(seen[-1]).__name__
        seen.append(found)


@contextlib.contextmanager
def _unlogged(target: str) -> Iterator[None]:
    """Keep path and query of the address out of urllib3's own log lines, which quote them at level DEBUG."""
    speaker = logging.getLogger("urllib3.connectionpool")

    def is_harmless(record: logging.LogRecord) -> bool:
        return target == "/" or target not in record.getMessage()

    speaker.addFilter(is_harmless)
    try:
        yield
    finally:
        speaker.removeFilter(is_harmless)
