"""The table of values in the chart's README, from the comments of its values.yaml: python scripts/chart_readme.py

A comment that begins with ``# --`` describes the value below it, to the end of the comment. A value is what has such a comment;
what lies below it is its own business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "camopd"
BEGIN, END = "<!-- values -->\n", "<!-- /values -->\n"


def described(text: str) -> Iterator[tuple[str, Any, str]]:
    """Key, default and description of each value. Raises ValueError for one that has no comment."""
    yield from _described(yaml.compose(text), yaml.safe_load(text), text.splitlines(), "")


def _described(table: yaml.MappingNode, values: Any, lines: Sequence[str], path: str) -> Iterator[tuple[str, Any, str]]:
    for key, node in table.value:
        name = f"{path}{key.value}"
        comment = _comment(lines[: key.start_mark.line])
        if comment:
            yield name, values[key.value], comment
        elif isinstance(node, yaml.MappingNode) and node.value:
            yield from _described(node, values[key.value], lines, f"{name}.")
        else:
            raise ValueError(f"values.yaml, line {key.start_mark.line + 1}: {name} has no comment `# -- ...` above it")


def _comment(above: Sequence[str]) -> str:
    found: list[str] = []
    for line in reversed(above):
        if not line.lstrip().startswith("#"):
            break
        found.insert(0, line.strip().removeprefix("#").strip())
        if found[0].startswith("-- "):
            return " ".join(found).removeprefix("-- ")
    return ""


def with_table(readme: str, values: str) -> str:
    """The README with the table of these values between its marks."""
    rows = [
        f"| `{key}` | `{json.dumps(default)}` | {text.replace('|', chr(92) + '|')} |"
        for key, default, text in described(values)
    ]
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    table = "\n".join(["| value | default | what it is |", "|---|---|---|", *rows])
    return f"{head}{BEGIN}\n{table}\n\n{END}{tail}"


if __name__ == "__main__":
    readme = CHART / "README.md"
    text = with_table(readme.read_text(encoding="utf-8"), (CHART / "values.yaml").read_text(encoding="utf-8"))
    readme.write_text(text, encoding="utf-8")
