"""docs/operations.md quotes what the program says: looked up in the source, but for two sections on clusters."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
CLUSTERS = ("Pods that do not start, or are killed", "The chart")  # Kubernetes' own words stand there beside ours
ANY = "…"


def sentences() -> list[str]:
    """The text of every string of the source, with ``…`` for what is filled in at run time."""
    found = []
    for file in (*(ROOT / "src").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else ANY for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quotations() -> list[tuple[str, str]]:
    """Section and quoted sentence of the first column of each row."""
    found, section = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| `") and section not in CLUSTERS:
            found += [(section, text) for text in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    return found


SOURCE = sentences()


def says(text: str) -> bool:
    """Whether a sentence of the source fits: each part between two ``…`` of the page stands in it, in that order."""
    parts = [re.escape(part.strip()) for part in text.split(ANY) if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(sentence) for sentence in SOURCE)


@pytest.mark.parametrize(("section", "text"), quotations())
def test_the_program_says_what_the_page_quotes(section, text):
    assert says(text), f"{text!r} (in {section}) is not in the source any more"


def test_a_sentence_that_nobody_says_is_seen():
    assert not says("the … is made of cheese")
    assert len(quotations()) > 40
