"""Prompt files as people really have them (case 01)."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd.errors import InputError
from camopd.inputs import prompts
from camopd.inputs.prompts import Prompt, Rejected, count_lines, read_prompts
from tests.folders import CASES

MESSY = CASES / "01-jsonl-messy"
ROW = b'{"id": "a", "prompt": "x"}\n'


def read(path: Path) -> list[Prompt | Rejected]:
    return list(read_prompts(path, path.name))


def read_bytes(folder: Path, content: bytes) -> list[Prompt | Rejected]:
    (folder / "p.jsonl").write_bytes(content)
    return read(folder / "p.jsonl")


def one(folder: Path, row: Any) -> Prompt | Rejected:
    (item,) = read_bytes(folder, (row if isinstance(row, str) else json.dumps(row)).encode("utf-8", "surrogatepass"))
    return item


# --- The case -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.jsonl.gz", "renamed-gzip.jsonl"])
def test_the_messy_file(name: str) -> None:
    items = read(MESSY / name)
    accepted = {item.id: item for item in items if isinstance(item, Prompt)}
    made_up = accepted.keys() - {"g-001", "g-002", "7", "g-012", "g-014", "g-015", "g-018"}
    assert len(accepted) == 8
    assert {accepted[name].line for name in made_up} == {11}
    assert accepted["g-001"].text == "Why does a kiln need a slow cool-down after a glaze firing?"
    assert "\u2028" in (accepted["g-012"].text or "")
    assert accepted["g-014"].question == "Which one wins?"
    assert accepted["g-014"].notes == ("both fields",)
    assert [turn["role"] for turn in accepted["g-015"].messages] == ["user"]
    assert accepted["g-015"].notes == ("answer dropped",)
    assert {(item.line, item.id, item.reason) for item in items if isinstance(item, Rejected)} == {
        (5, "g-003", "null prompt"),
        (6, "g-004", "whitespace-only prompt"),
        (7, "g-005", "empty messages"),
        (8, "g-006", "null content"),
        (9, "g-002", "duplicate id"),
        (12, "g-009", "invalid UTF-8"),
        (13, None, "not an object"),
        (14, "g-011", "truncated or invalid JSON"),
        (16, "g-013", "lone surrogate"),
        (19, "g-016", "NaN is not JSON"),
        (20, "g-017", "no known prompt field"),
    }


def test_no_message_quotes_a_row() -> None:
    said = " ".join(str(item.problem("f")) for item in read(MESSY / "prompts.jsonl") if isinstance(item, Rejected))
    assert not any(
        word in said for word in ("Broken byte", "different text", "cut off in the mid", "surrogate here", "unknown field name")
    )


@pytest.mark.parametrize("name", ["empty.jsonl", "only-blank.jsonl"])
def test_a_file_without_rows(name: str) -> None:
    with pytest.raises(InputError, match="no prompts"):
        read(MESSY / name)


# --- Whole files ----------------------------------------------------------------------------------------------------------


def test_a_json_array_is_named_as_such() -> None:
    with pytest.raises(InputError, match="JSON array; one object a line") as caught:
        read(MESSY / "array.json")
    assert caught.value.problems[0].where == "array.json"  # not its line 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n', "JSON array"),
        (b'[{"prompt": "a"},\n {"prompt": "b"}]\n', "JSON array"),
        (b'["a", "b"]\n', "JSON array"),
        (b"[]", "JSON array"),
        (b'\n\n  [{"prompt": "a"}]', "JSON array"),
        (b'{\n  "prompts": [\n  ]\n}\n', "object over several lines"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"PK\x03\x04\x14", "zip"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (gzip.compress(ROW * 5000, mtime=0)[:-20], "damaged or cut off"),
        (b"\x1f\x8b\x08 nonsense", "damaged or cut off"),
        (b"\x1f\x8b", "damaged or cut off"),
        (gzip.compress(b"", mtime=0), "no prompts"),
        (b"\xef\xbb\xbf\r\n", "no prompts"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_bytes(tmp_path, content)


def test_a_list_in_the_first_of_several_rows_is_that_rows_mistake(tmp_path: Path) -> None:
    first, second = read_bytes(tmp_path, b'["a", "b"]\n' + ROW)
    assert isinstance(first, Rejected)
    assert (first.line, first.reason) == (1, "not an object")
    assert isinstance(second, Prompt)


def test_gzip_members_one_after_another_are_one_file(tmp_path: Path) -> None:
    content = gzip.compress(b'{"prompt": "a"}\n') + gzip.compress(b'{"prompt": "b"}\n')
    assert [item.question for item in read_bytes(tmp_path, content) if isinstance(item, Prompt)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "lines"), [(b"a\nb", 2), (b"a\nb\n", 2), (b"", 0), (b"\n\n", 2), (gzip.compress(b"a\nb", mtime=0), 2)]
)
def test_count_lines(tmp_path: Path, content: bytes, lines: int) -> None:
    (tmp_path / "p").write_bytes(content)
    assert count_lines(tmp_path / "p") == lines


def test_a_row_without_end_is_rejected_in_bounded_memory(tmp_path: Path) -> None:
    with (tmp_path / "p.jsonl").open("wb") as handle:
        handle.write(b'{"id": "long", "prompt": "')
        for _ in range(8):
            handle.write(b"x" * prompts.MAX_ROW_BYTES)
        handle.write(b'"}\n' + ROW)
    tracemalloc.start()
    long, short = read(tmp_path / "p.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(long, Rejected)
    assert (long.reason, long.line) == ("row too long", 1)
    assert isinstance(short, Prompt)
    assert short.line == 2
    assert peak < 5 * prompts.MAX_ROW_BYTES


# --- Rows -----------------------------------------------------------------------------------------------------------------


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": 3}, "prompt is not text"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "prompt is not text"),
        ({"prompt": ""}, "whitespace-only prompt"),
        ({"prompt": "\u00a0\u3000\n"}, "whitespace-only prompt"),
        ({"prompt": None, "messages": None}, "null prompt"),
        ({"text": "a"}, "no known prompt field"),
        ({}, "no known prompt field"),
        ({"id": True, "prompt": "a"}, "id is neither text nor a whole number"),
        ({"id": 1.5, "prompt": "a"}, "id is neither text nor a whole number"),
        ({"id": ["a"], "prompt": "a"}, "id is neither text nor a whole number"),
        ({"id": " ", "prompt": "a"}, "blank id"),
        ('{"id": "\\ud800", "prompt": "a"}', "lone surrogate"),
        ('{"prompt": "a \\udc00"}', "lone surrogate"),
        ('{"messages": [{"role": "system", "content": "\\ud83d"}, {"role": "user", "content": "a"}]}', "lone surrogate"),
        ({"messages": "a"}, "messages is not a list"),
        ({"messages": ["a"]}, "a message is not an object"),
        ({"messages": [], "prompt": "a"}, "empty messages"),
        (turns(("user", 3)), "content is not text"),
        (turns(("user", [{"type": "text", "text": "a"}])), "content in parts is not supported"),
        (turns(("user", {"text": "a"})), "content in parts is not supported"),
        ({"messages": [{"role": "user"}]}, "null content"),
        ({"messages": [{"content": "a"}]}, "unknown role"),
        (turns(("User", "a")), "unknown role"),
        (turns(("developer", "a"), ("user", "b")), "unknown role"),
        (turns(("user", "a"), ("tool", "b"), ("user", "c")), "tool use is not supported"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "user", "content": "a"}]},
            "tool use is not supported",
        ),
        (turns(("assistant", "a")), "no user turn to answer"),
        (turns(("system", "a")), "no user turn to answer"),
        (turns(("user", "a"), ("system", "b")), "no user turn to answer"),
        (turns(("user", " \n")), "whitespace-only prompt"),
        ("nonsense", "truncated or invalid JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "truncated or invalid JSON"),
        ('{"prompt": "a", "weight": Infinity}', "NaN is not JSON"),
        ('{"prompt": "a", "weight": -Infinity}', "NaN is not JSON"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "truncated or invalid JSON"),
        ('{"prompt": "a", "n": ' + "[" * 100_000, "truncated or invalid JSON"),
        ("null", "not an object"),
        ("3", "not an object"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: Any, reason: str) -> None:
    item = one(tmp_path, row)
    assert isinstance(item, Rejected)
    assert item.reason == reason


@pytest.mark.parametrize(
    ("row", "id_", "question"),
    [
        ({"id": 0, "prompt": "a"}, "0", "a"),
        ({"id": -12, "prompt": "a"}, "-12", "a"),
        ({"id": None, "prompt": "a"}, None, "a"),
        ({"id": "x", "prompt": None, **turns(("user", "a"))}, "x", "a"),  # what pandas makes of absent fields
        ({"id": "x", "prompt": "a", "messages": None}, "x", "a"),
        (turns(("system", ""), ("user", "a")), None, "a"),
        (turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("assistant", None)), None, "c"),
        ('{"prompt": "\\ud83e\\ude7a"}', None, "🩺"),
        ({"prompt": "a\rb\u2028c\u0085d\fe"}, None, "a\rb\u2028c\u0085d\fe"),
        ({"prompt": " a "}, None, " a "),
    ],
)
def test_rows_that_can(tmp_path: Path, row: Any, id_: str | None, question: str) -> None:
    item = one(tmp_path, row)
    assert isinstance(item, Prompt)
    assert item.question == question
    if id_ is not None:
        assert item.id == id_


def test_made_up_ids_come_from_the_content_alone(tmp_path: Path) -> None:
    a, b = b'{"prompt": "a"}\n', b'{"prompt": "b"}\n'
    first, second = (
        {i.question: i.id for i in read_bytes(tmp_path, c) if isinstance(i, Prompt)} for c in (a + b, b"\n" + b + a)
    )
    assert first == second
    assert len(set(first.values())) == 2
    third = read_bytes(tmp_path, a + b + a)[2]
    assert isinstance(third, Rejected)
    assert (third.reason, third.line) == ("duplicate id", 3)


def test_text_and_number_are_one_id(tmp_path: Path) -> None:
    assert isinstance(read_bytes(tmp_path, b'{"id": 7, "prompt": "a"}\n{"id": "7", "prompt": "b"}')[1], Rejected)


def test_an_id_inside_a_broken_row_is_told_only_when_it_is_the_rows_own(tmp_path: Path) -> None:
    assert one(tmp_path, '{"id": "x", "prompt": "cut').id == "x"
    assert one(tmp_path, '{"prompt": "a", "id": "x", "b": ').id is None
    assert one(tmp_path, '{"id": "\\ud800", "prompt": "cut').id is None
    assert read_bytes(tmp_path, b'{"id": "\xff", "prompt": "a"}')[0].id is None


# --- Whatever comes -------------------------------------------------------------------------------------------------------


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["user", "assistant", "system"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["id", "prompt", "messages", "role", "content"]), inner, max_size=4),
    ),
    max_leaves=12,
)
lines = st.one_of(st.binary(max_size=40), json_values.map(lambda value: json.dumps(value).encode()))


@given(content=st.lists(lines, max_size=12), packed=st.booleans())
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_read_the_same_way_twice_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], packed: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "p.jsonl"
    text = b"\n".join(content)
    path.write_bytes(gzip.compress(text) if packed else text)
    try:
        items = read(path)
    except InputError:
        return
    assert items == read(path)
    accepted = [item for item in items if isinstance(item, Prompt)]
    assert len({item.id for item in accepted}) == len(accepted)
    assert [item.line for item in items] == sorted({item.line for item in items})
    for item in accepted:
        json.dumps([item.id, item.text, item.messages], allow_nan=False, ensure_ascii=False).encode()
        assert item.question.strip()
