"""Tokenizers that only look alike (case 03), and chat templates (case 04)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from camopd.inputs.checks import read_facts
from camopd.inputs.prompts import Prompt, Rejected, read_prompts
from camopd.inputs.tokens import Encoded, Encoder, check_same_tokenizer, encoded, load_tokenizer, num_ids
from tests.folders import CASES, TOKENIZERS, model_folder

TEMPLATES = CASES / "04-chat-template" / "templates"
PROBE = (TOKENIZERS / "probe.txt").read_text(encoding="utf-8")


def load(folder: Path) -> tuple[Any, list[str]]:
    facts, problems = read_facts("branches.general.teacher", "/models/a", folder)
    assert not problems
    tokenizer, problems = load_tokenizer(facts)
    return tokenizer, [str(problem) for problem in problems]


def compare(student: Path, teacher: Path, texts: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    problems, warnings = check_same_tokenizer(
        "branches.general.teacher", "/models/t", load(student)[0], load(teacher)[0], texts
    )
    return [str(problem) for problem in problems], warnings


def edit_tokenizer(folder: Path, change: dict[str, Any]) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    return folder


# --- Case 03 --------------------------------------------------------------------------------------------------------------


def test_the_students_tokenizer() -> None:
    tokenizer, problems = load(TOKENIZERS / "student")
    assert not problems
    assert num_ids(tokenizer) == 14
    assert encoded(tokenizer, PROBE) == list(range(4, 14))


def test_a_wider_head_is_accepted() -> None:
    assert load(TOKENIZERS / "teacher-same-tokenizer-wider-head")[1] == []
    assert compare(TOKENIZERS / "student", TOKENIZERS / "teacher-same-tokenizer-wider-head") == ([], [])


def test_another_order_is_rejected_by_the_first_token_that_differs() -> None:
    (problem,), warnings = compare(TOKENIZERS / "student", TOKENIZERS / "teacher-same-size-other-order")
    assert "token 'pump' has id 4 in the student and has id 13 in /models/t" in problem
    assert not warnings


def test_tokens_that_only_the_teacher_has_are_a_warning() -> None:
    problems, (warning,) = compare(TOKENIZERS / "student", TOKENIZERS / "teacher-one-added-token")
    assert not problems
    assert "'<think>' (id 14)" in warning


def test_tokens_that_only_the_student_has_are_rejected() -> None:
    (problem,), _ = compare(TOKENIZERS / "teacher-one-added-token", TOKENIZERS / "student")
    assert "token '<think>' has id 14 in the student and does not exist" in problem


def test_a_tokenizer_larger_than_its_head_is_rejected() -> None:
    _, (problem,) = load(TOKENIZERS / "teacher-tokenizer-larger-than-head")
    assert "tokenizer has 20 ids, embedding has 16 rows" in problem


def test_a_class_that_ignores_tokenizer_json_is_found(tmp_path: Path) -> None:
    """transformers makes a Qwen2Tokenizer for model_type qwen2, which gives other ids and no error."""
    folder = model_folder(tmp_path / "model", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    _, (problem,) = load(folder)
    assert "Qwen2Tokenizer gives other ids than tokenizer.json" in problem


LOWERCASE = {"type": "Lowercase"}
RARE_WORD = {"type": "Replace", "pattern": {"String": "zebra"}, "content": "pump"}


@pytest.mark.parametrize(("normalizer", "texts"), [(LOWERCASE, ()), (RARE_WORD, ("a zebra",))])
def test_the_same_tokens_for_other_text_are_rejected(
    tmp_path: Path, normalizer: dict[str, Any], texts: tuple[str, ...]
) -> None:
    teacher = edit_tokenizer(model_folder(tmp_path / "model"), {"normalizer": normalizer})
    (problem,), _ = compare(TOKENIZERS / "student", teacher, texts)
    assert "the same text becomes other ids" in problem


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "None"}}', "cannot be read"),
        ("tokenizer_config.json", "[]", "cannot be loaded"),
        ("tokenizer_config.json", "{", "cannot be loaded"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    tokenizer, (problem,) = load(folder)
    assert tokenizer is None
    assert words in problem


# --- Case 04 --------------------------------------------------------------------------------------------------------------


def encoder_of(template: str | None, *, enable_thinking: bool | None = None) -> Encoder:
    tokenizer, _ = load(TOKENIZERS / "student")
    text = None if template is None else (TEMPLATES / template).read_text(encoding="utf-8")
    return Encoder(tokenizer, chat_template=text, enable_thinking=enable_thinking)


def encode(encoder: Encoder, *rows: Prompt | Rejected) -> list[Encoded | Rejected]:
    (batch,) = encoder.encode([rows])
    return batch


def encode_case(encoder: Encoder) -> dict[str, Encoded | Rejected]:
    rows = [row for row in read_prompts(CASES / "04-chat-template" / "messages.jsonl", "m") if isinstance(row, Prompt)]
    return {row.id: item for row, item in zip(rows, encode(encoder, *rows), strict=True)}


def test_without_a_template_only_plain_prompts_pass() -> None:
    found = encode_case(encoder_of(None))
    assert [name for name, item in found.items() if isinstance(item, Rejected)] == ["c-1", "c-2", "c-3"]
    assert {item.reason for item in found.values() if isinstance(item, Rejected)} == {"needs a chat template"}
    assert isinstance(found["c-4"], Encoded)


def test_bos_of_the_template_is_not_doubled() -> None:
    bos = Tokenizer.from_file(str(TOKENIZERS / "student" / "tokenizer.json")).token_to_id("<s>")
    for name, item in encode_case(encoder_of("with-bos.jinja")).items():
        assert isinstance(item, Encoded)
        assert (item.ids[0] == bos) == (name != "c-4")
        assert item.ids[1] != bos


def test_strict_roles_reject_their_rows_alone_with_the_templates_words() -> None:
    found = encode_case(encoder_of("strict-roles.jinja"))
    assert isinstance(found["c-1"], Encoded)
    for name in ("c-2", "c-3"):
        item = found[name]
        assert isinstance(item, Rejected)
        assert (item.id, item.reason, item.detail) == (
            name,
            "refused by the chat template",
            "roles must alternate user/assistant",
        )


def test_the_thinking_switch_changes_prompts_and_identity() -> None:
    encoders = [encoder_of("thinking.jinja", enable_thinking=value) for value in (None, False, True)]
    texts = [encode_case(encoder)["c-1"].text for encoder in encoders]
    assert texts[0].endswith("<|assistant|>")
    assert texts[1] == texts[0] + "<think>\n\n</think>\n\n"
    assert texts[2] == texts[0]
    assert len({encoder.template_id for encoder in encoders}) == 3
    assert encoders[0].template_id == encoder_of("thinking.jinja").template_id != encoder_of("with-bos.jinja").template_id


def bos_tokenizer(folder: Path, *, eos: bool = False) -> Path:
    """A tokenizer that writes BOS (and EOS) around text by itself, as Llama's does."""
    model_folder(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = " </s>" if eos else ""
    tokenizer.post_processor = TemplateProcessing(single=f"<s> $A{ends}", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("eos", [False, True])
def test_a_plain_prompt_gets_the_tokenizers_bos_once_and_no_padding_or_truncation(tmp_path: Path, eos: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bos_tokenizer(tmp_path / "model", eos=eos))
    encoder = Encoder(tokenizer, chat_template=None, enable_thinking=None)
    plain = Prompt("a", 1, "pump seal leak heat", ())
    rendered = Prompt("b", 2, "<s>pump", ())
    doubled = Prompt("c", 3, "<s><s>pump", ())
    first, second, third = encode(encoder, plain, rendered, doubled)
    assert first.ids == [1, 4, 5, 6, 7]
    assert second.ids == [1, 4]
    assert third == Rejected(3, "doubled BOS", "c", third.detail)


def test_a_template_that_doubles_bos_is_rejected(tmp_path: Path) -> None:
    tokenizer, _ = load(TOKENIZERS / "student")
    encoder = Encoder(tokenizer, chat_template="{{ bos_token }}{{ bos_token }}{{ messages[0].content }}", enable_thinking=None)
    (item,) = encode(encoder, Prompt("a", 1, None, ({"role": "user", "content": "pump"},)))
    assert item.reason == "doubled BOS"


@pytest.mark.parametrize("template", ["", "{# nothing #}", "{% if false %}a{% endif %}"])
def test_a_prompt_of_no_tokens_is_rejected(template: str) -> None:
    tokenizer, _ = load(TOKENIZERS / "student")
    encoder = Encoder(tokenizer, chat_template=template or "{{ '' }}", enable_thinking=None)
    (item,) = encode(encoder, Prompt("a", 1, None, ({"role": "user", "content": "pump"},)))
    assert item == Rejected(1, "has no tokens", "a")


def test_a_template_error_that_quotes_the_prompt_is_not_shown() -> None:
    tokenizer, _ = load(TOKENIZERS / "student")
    encoder = Encoder(tokenizer, chat_template="{{ messages[0].content | int + messages[0].content }}", enable_thinking=None)
    (item,) = encode(encoder, Prompt("a", 1, None, ({"role": "user", "content": "secret words"},)))
    assert isinstance(item, Rejected)
    assert "secret" not in str(item.problem("f"))


def test_a_template_with_a_syntax_error_is_refused_at_once() -> None:
    tokenizer, _ = load(TOKENIZERS / "student")
    with pytest.raises(ValueError, match="not Jinja: line 2"):
        Encoder(tokenizer, chat_template="a\n{% if %}", enable_thinking=None)


def test_truncation_keeps_the_end_and_the_bos() -> None:
    encoder = encoder_of("with-bos.jinja")
    assert encoder.truncated([4, 5, 6, 7], 2) == [6, 7]
    assert encoder.truncated([1, 5, 6, 7], 2) == [1, 7]
    assert encoder.truncated([1, 5, 6, 7], 1) == [7]


def test_rows_keep_their_places_in_their_batches() -> None:
    encoder = encoder_of("strict-roles.jinja")
    good = Prompt("a", 1, None, ({"role": "user", "content": "pump"},))
    refused = Prompt("b", 2, None, ({"role": "system", "content": "pump"},))
    plain, broken = Prompt("c", 3, "seal", ()), Rejected(4, "not an object")
    batches = list(encoder.encode([[broken], [refused, plain, broken, good], [], [plain, refused]]))
    assert [[(type(item), item.line) for item in batch] for batch in batches] == [
        [(Rejected, 4)],
        [(Rejected, 2), (Encoded, 3), (Rejected, 4), (Encoded, 1)],
        [],
        [(Encoded, 3), (Rejected, 2)],
    ]
    assert batches[1][1].ids == [5]
