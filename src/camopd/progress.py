"""How far a stage is: a line that counts up in a terminal, one every two seconds in a log, or JSON for a program that shows it.

With CAMOPD_PROGRESS set to a file, each update is appended there as one JSON object: stage, round, rounds, branch, done,
total, unit, tokens_per_second, waiting_share (of the time so far, for the store). Without it the line goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable


class Progress:
    """Counts finished work of one stage.

    Args:
        stage: one of the seven words.
        total: how much there is to do, in ``unit``.
        unit: what is counted: samples, steps, prompts.
        round_number: the round and ``num_rounds`` of how many, where the stage belongs to one.
        branch: the branch at work, where there is one; may change by ``advance``.
        done: what an earlier attempt has finished.
        waited: seconds that were spent waiting for the store until now, ``Store.waited``.
    """

    def __init__(
        self,
        stage: str,
        *,
        total: int,
        unit: str,
        round_number: int = 0,
        num_rounds: int = 0,
        branch: str = "",
        done: int = 0,
        waited: Callable[[], float] = lambda: 0.0,
        every: float = 2.0,
    ) -> None:
        self._fixed = {"stage": stage, "round": round_number, "rounds": num_rounds, "unit": unit}
        self._total, self._branch, self._every = total, branch, every
        self._before = self._done = done
        self._tokens, self._note = 0, ""
        self._waited, self._waited_before = waited, waited()
        self._begun = self._said = time.monotonic()
        self._say()

    def advance(self, count: int, *, tokens: int = 0, branch: str | None = None, note: str = "") -> None:
        """Add finished work; says so when the last word is long enough ago, and always at the end.

        Args:
            count: finished since the last call, in ``unit``.
            tokens: their tokens.
            branch: the branch at work, when it has changed.
            note: what else a person wants to see now.
        """
        self._done += count
        self._tokens += tokens
        self._branch = self._branch if branch is None else branch
        self._note = note
        if self._done >= self._total or time.monotonic() - self._said >= self._every:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        seconds = max(self._said - self._begun, 1e-9)
        record = {
            **self._fixed,
            "branch": self._branch,
            "done": self._done,
            "total": self._total,
            "tokens_per_second": round(self._tokens / seconds, 1),
            "waiting_share": round(self._waiting_share(seconds), 3),
            "time": time.time(),
        }
        target = os.environ.get("CAMOPD_PROGRESS")
        if target:
            with open(target, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
            return
        counts_up = sys.stderr.isatty()
        end = "\n" if not counts_up or self._done >= self._total else ""
        print(("\r\x1b[K" if counts_up else "") + self._line(seconds), end=end, file=sys.stderr, flush=True)

    def _waiting_share(self, seconds: float) -> float:
        return (self._waited() - self._waited_before) / seconds

    def _line(self, seconds: float) -> str:
        """``recover: 37/192 steps, 410 tokens/s, 12 s left, gap general 0.832``"""
        fixed = self._fixed
        where = f" round {fixed['round']}/{fixed['rounds']}" if fixed["round"] else ""
        branch = f" {self._branch}" if self._branch else ""
        parts = [f"{fixed['stage']}{where}{branch}: {self._done}/{self._total} {fixed['unit']}"]
        if self._tokens:
            parts.append(f"{self._tokens / seconds:,.0f} tokens/s")
        share = self._waiting_share(seconds)
        if share >= 0.01:
            parts.append(f"{share:.0%} of the time waiting for the store")
        if self._before < self._done < self._total:
            parts.append(f"{seconds * (self._total - self._done) / (self._done - self._before):,.0f} s left")
        return ", ".join(parts + [self._note] * bool(self._note))
