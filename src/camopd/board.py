"""What a running pipeline is doing, and how people see it: from the lines that the stages write (camopd.progress) where one can
read them, from the steps that a server tells of (camopd.kubeflow.steps) where not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Tail:
    """Reads the JSON lines that were added to a file since the last look; a half-written line waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The new lines, in order; none when the file is not there yet."""
        if not self._path.exists():
            return
        with self._path.open("rb") as handle:
            handle.seek(self._offset)
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


@dataclass
class Board:
    """Where a run stands, as far as its progress lines tell.

    Attributes:
        num_rounds: rounds of the run; 0 where nobody has said.
        lines: the latest line of the stage at work; by branch and shard where they sample and score side by side.
        began: when each round was first heard of; ``num_rounds + 1`` stands for what follows the last.
    """

    num_rounds: int
    lines: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)

    def update(self, line: Mapping[str, Any]) -> None:
        """Take in a line; the first of another stage takes the place of all that is known of the one before."""
        number = line["round"] or (self.num_rounds + 1 if line["stage"] in ("evaluate", "promote") else 0)
        if number:
            self.began.setdefault(number, line["time"])
        if any((known["stage"], known["round"]) != (line["stage"], line["round"]) for known in self.lines.values()):
            self.lines = {}
        self.lines[line["branch"] if line["stage"] in ("rollout", "score") else ""] = line

    def finished(self) -> bool:
        """Whether all that is known of the stage at work is done."""
        return all(line["done"] >= line["total"] for line in self.lines.values())

    def rounds_done(self) -> int:
        """Rounds behind us, those of earlier starts included."""
        return max(self.began, default=1) - 1

    def seconds_left(self, now: float) -> float | None:
        """Time to the end of the last round, from the mean of the finished ones; then to the end of the evaluation.

        None as long as nothing has been finished to judge by.
        """
        current = max(self.began, default=0)
        if current > self.num_rounds:
            (line,) = self.lines.values()  # branches are told apart only while they score
            spent = line["time"] - self.began[current]
            return spent / line["done"] * (line["total"] - line["done"]) - (now - line["time"]) if line["done"] else None
        if not self.num_rounds:
            return None
        times = [self.began[number + 1] - began for number, began in self.began.items() if number + 1 in self.began]
        if not times:
            return None
        each = sum(times) / len(times)
        return max(each - (now - self.began[current]), 0) + each * (self.num_rounds - current)

    def sentence(self) -> str:
        """``round 3/10  score  general 12/64 samples, domain 8/64 samples  1,250 tokens/s``; a total of 0 is not shown."""
        if not self.lines:
            return "starting"
        lines = list(self.lines.values())
        of = f"/{self.num_rounds}" if self.num_rounds else ""
        place = f"round {lines[0]['round']}{of}" if lines[0]["round"] else ""
        counted = [line for line in lines if line["total"]]
        work = ", ".join(f"{line['branch']} {line['done']}/{line['total']} {line['unit']}".strip() for line in counted)
        speed = sum(line["tokens_per_second"] for line in lines)
        parts = [place, lines[0]["stage"], work, f"{speed:,.0f} tokens/s" if speed else "", lines[0].get("note", "")]
        return "  ".join(part for part in parts if part)

    def picture(self, seconds: float, now: float) -> Table:
        """The live display: a bar over the rounds, what is at work, time spent and time left."""
        bar = ProgressBar(total=self.num_rounds or None, completed=self.rounds_done(), width=60)
        picture = Table.grid()
        for row in (bar, Text(self.sentence()), Text(self.times(seconds, now), style="dim")):
            picture.add_row(row)
        return picture

    def times(self, seconds: float, now: float) -> str:
        """``elapsed 1:05, about 2:10 left in the rounds``."""
        left = self.seconds_left(now)
        if left is None:
            return f"elapsed {clock(seconds)}, time left not known yet"
        part = "rounds" if self.rounds_done() < self.num_rounds else "evaluation"
        return f"elapsed {clock(seconds)}, about {clock(left)} left in the {part}"


def clock(seconds: float) -> str:
    """Minutes and seconds: ``2:05``."""
    whole = max(round(seconds), 0)
    return f"{whole // 60}:{whole % 60:02d}"
