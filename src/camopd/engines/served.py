"""A model that somebody else serves: requests to an OpenAI-compatible server, with patience where it may help.

The client is urllib3, which boto3 brings along: it keeps connections open, waits ever longer between attempts with some
randomness, and does what a Retry-After header says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util import Retry, Timeout

from camopd.errors import EngineError
from camopd.recipe.served import API_KEY, split_served

ATTEMPTS = 8  # after the first; about three minutes of waiting in all, in which a server may have been started again
BACKOFF = 1.0  # seconds before the second attempt but one; then twice as long each time, and up to a second of chance
LONGEST_WAIT = 60  # seconds between attempts; a Retry-After may ask for twice as many
ANSWER = 600.0  # seconds for one answer: a long prompt may wait behind those of others
CONNECT = 10.0  # seconds
BUSY = (408, 429, 500, 502, 503, 504)  # statuses that a later attempt may not meet
TOGETHER = 64  # requests in flight at most
SHOWN = 300  # characters of a server's own words in our message


class Server:
    """One server. Safe to use from several threads.

    Args:
        location: ``http://host:8000/v1``, with ``#model`` or without. The key is in the environment (``API_KEY``), if at all.
        attempts: after the first; None is ``ATTEMPTS``.
    """

    def __init__(self, location: str, *, attempts: int | None = None) -> None:
        self.base, self.wanted = split_served(location)
        self._attempts = ATTEMPTS if attempts is None else attempts
        key = os.environ.get(API_KEY)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        again = Retry(
            self._attempts,
            backoff_factor=BACKOFF,
            backoff_max=LONGEST_WAIT,
            backoff_jitter=BACKOFF,
            retry_after_max=2 * LONGEST_WAIT,
            status_forcelist=BUSY,
            allowed_methods=None,  # every question may be asked twice
            raise_on_status=False,
        )
        timeout = Timeout(connect=CONNECT, read=ANSWER)
        self._http = urllib3.PoolManager(maxsize=TOGETHER, headers=headers, retries=again, timeout=timeout)

    def close(self) -> None:
        self._http.clear()

    def models(self) -> dict[str, int | None]:
        """Name of each served model, with the longest sequence that it takes where the server says so.

        Raises:
            EngineError: it cannot be reached, or is no such server.
        """
        found = self._ask("GET", f"{self.base}/models")
        try:
            return {str(model["id"]): model.get("max_model_len") for model in found["data"]}
        except (KeyError, TypeError, AttributeError):
            raise EngineError(f"{self.base}/models is not a list of models; is this an OpenAI-compatible server?") from None

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of a completion.

        Raises:
            EngineError: the server refuses, or keeps failing.
        """
        found = self._ask("POST", f"{self.base}/completions", body)
        try:
            return dict(found["choices"][0])
        except (KeyError, IndexError, TypeError, ValueError):
            raise EngineError(f"{self.base}/completions gave no completion; is this an OpenAI-compatible server?") from None

    def tokenize(self, model: str, text: str) -> list[int] | None:
        """The ids that the server makes of a text, without special tokens; None where it has no such service (vLLM has)."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        response = self._request("POST", self.base.removesuffix("/v1") + "/tokenize", body)
        try:
            return [int(token) for token in json.loads(response.data)["tokens"]] if response.status == 200 else None
        except (ValueError, KeyError, TypeError):
            return None

    def _ask(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> Any:
        response = self._request(method, url, body)
        if response.status != 200:
            raise EngineError(f"{url} {refusal(response.status, words(response.data), self._attempts)}")
        try:
            return json.loads(response.data)
        except ValueError:
            raise EngineError(f"{url} answers with something that is not JSON; is this an OpenAI-compatible server?") from None

    def _request(self, method: str, url: str, body: Mapping[str, Any] | None) -> urllib3.BaseHTTPResponse:
        try:
            return self._http.request(method, url, body=None if body is None else json.dumps(body), redirect=False)
        except HTTPError as error:
            reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
            what = " ".join(str(reason).rpartition(">: ")[2].rpartition("): ")[2].split())[:SHOWN]
            attempts = f" in {self._attempts + 1} attempts" if isinstance(error, MaxRetryError) else ""
            raise EngineError(f"{url} gives no answer{attempts}: {what}; see that the server runs and can be reached") from None


def refusal(status: int, said: str, attempts: int) -> str:
    """What a status means for who reads it."""
    if status in (401, 403):
        return f"refuses the key (status {status}); set {API_KEY} in the environment"
    if status in BUSY:
        return f"still answers with status {status} after {attempts + 1} attempts{said}; see the server's log"
    return f"refuses (status {status}){said}"


def words(body: bytes) -> str:
    """The message of an error's body, after a colon; empty when it has none."""
    try:
        record = json.loads(body)
        message = record.get("error", record)
        message = message.get("message", "") if isinstance(message, dict) else message
    except (ValueError, AttributeError):
        message = ""
    return f": {' '.join(str(message).split())[:SHOWN]}" if message else ""
