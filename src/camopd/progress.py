"""How far a stage is: one line every two seconds for people, or a JSON line for a program that shows it.

With CAMOPD_PROGRESS set to a file, each update is appended there as one JSON object: stage, round, rounds, branch, done,
total, unit, tokens_per_second. Without it a line goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time


class Progress:
    """Counts finished work of one stage.

    Args:
        stage: one of the seven words.
        total: how much there is to do, in ``unit``.
        unit: what is counted: samples, steps, prompts.
        round_number: the round and ``num_rounds`` of how many, where the stage belongs to one.
        branch: the branch at work, where there is one; may change by ``advance``.
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
        every: float = 2.0,
    ) -> None:
        self._fixed = {"stage": stage, "round": round_number, "rounds": num_rounds, "unit": unit}
        self._total, self._branch, self._every = total, branch, every
        self._done = self._tokens = 0
        self._begun = self._said = time.monotonic()
        self._say()

    def advance(self, count: int, *, tokens: int = 0, branch: str | None = None) -> None:
        """Add finished work; says so when the last word is long enough ago, and always at the end."""
        self._done += count
        self._tokens += tokens
        self._branch = self._branch if branch is None else branch
        if self._done >= self._total or time.monotonic() - self._said >= self._every:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        rate = self._tokens / max(self._said - self._begun, 1e-9)
        record = {
            **self._fixed,
            "branch": self._branch,
            "done": self._done,
            "total": self._total,
            "tokens_per_second": round(rate, 1),
            "time": time.time(),
        }
        target = os.environ.get("CAMOPD_PROGRESS")
        if target:
            with open(target, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
            return
        where = f" round {record['round']}/{record['rounds']}" if record["round"] else ""
        branch = f" {self._branch}" if self._branch else ""
        speed = f", {rate:,.0f} tokens/s" if self._tokens else ""
        print(f"{record['stage']}{where}{branch}: {self._done}/{self._total} {record['unit']}{speed}", file=sys.stderr)
