"""Prompts of the teacher's own: the user turn of templates in use, each filter by example, and what the loop promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from camopd.engines import Sample, load_engine
from camopd.errors import InputError, UnhealthyRunError
from camopd.inputs.prompts import Prompt, Rejected
from camopd.inputs.tasks import fingerprint
from camopd.inputs.teacher_prompts import Tally, flaw, known_prompts, make_prompts, read_sample, user_turn
from camopd.inputs.tokens import Encoder
from camopd.records import PromptTable, open_table, read_table
from camopd.schedule import seed_of

MICRO = Path(__file__).parents[1] / "examples" / "micro" / "general"

# Templates as the models carry them, without the parts for tools.
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
THINKING_IN_SYSTEM = (
    "{% set mode = '/think' if enable_thinking else '/no_think' %}<|im_start|>system\n{{ mode }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
ASSISTANT_ENDS_IT = (  # nothing but the answer's own marker ends the user's words
    "{{ bos_token }}{% for m in messages %}<|User|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
BLANK_FIRST = "{{ bos_token }}[INST] {{ messages[0].content }}<|eot_id|>"

SPECIAL = ("<|bos|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|Assistant|>")
ADDED = ("<think>", "<|User|>")  # added tokens that are not special, as in real vocabularies


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, but for a capital C that takes the blank before it."""
    vocab = {char: i for i, char in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠC"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "C")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", chat_template=template)


# --- The user turn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "enable_thinking", "text", "end"),
    [
        (QWEN, None, "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        (QWEN, False, "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        (LLAMA3, None, "<|bos|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        (THINKING_IN_SYSTEM, True, "<|im_start|>system\n/think<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        (THINKING_IN_SYSTEM, None, "<|im_start|>system\n/no_think<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        (ASSISTANT_ENDS_IT, None, "<|bos|><|User|>", "<|Assistant|>"),
        (BLANK_FIRST, None, "<|bos|>[INST]", "<|eot_id|>"),  # the blank belongs to the first word's token
    ],
)
def test_the_user_turn_of_templates_in_use(template: str, enable_thinking: bool | None, text: str, end: str) -> None:
    tokenizer = byte_tokenizer(template)
    turn = user_turn(tokenizer, "branches.general.teacher", enable_thinking=enable_thinking)
    assert turn.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert turn.end == tokenizer.convert_tokens_to_ids(end)


def test_the_user_turn_of_the_micro_example() -> None:
    turn = user_turn(AutoTokenizer.from_pretrained(MICRO), "branches.general.teacher", enable_thinking=None)
    assert (turn.ids, turn.end) == ([259], 257)
    assert list(turn.markers.values()) == ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def test_added_tokens_are_markers_where_they_are_special_or_the_template_writes_them() -> None:
    markers = [user_turn(byte_tokenizer(t), "t", enable_thinking=False).markers.values() for t in (QWEN, ASSISTANT_ENDS_IT)]
    assert set(markers[0]) == {*SPECIAL, "<think>"}
    assert set(markers[1]) == {*SPECIAL, "<|User|>"}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("<|bos|>{{ messages[0].content | upper }}<|eot_id|>", "not at all, or changed"),
        ("<|bos|>user<|eot_id|>", "not at all, or changed"),
        ("<|bos|>{{ messages[0].content }} {{ messages[0].content }}<|eot_id|>", "more than once"),
        ("{{ messages[0].content }}<|eot_id|>", "nothing before"),
        ("USER: {{ messages[0].content }} ASSISTANT:", "no special token after"),
        ("{{ raise_exception('a system turn must come first') }}", "a system turn must come first"),
        ("{% if %}", "not Jinja"),
        (None, "needs a chat template"),
    ],
)
def test_templates_without_a_usable_user_turn(template: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        user_turn(byte_tokenizer(template), "branches.general.teacher", enable_thinking=None)
    (problem,) = raised.value.problems
    assert problem.where == "branches.general.teacher"
    assert "prompt file" in problem.fix


# --- Filters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Add: 71 3",
        "why?",
        "What is 11111111 plus 1?",
        "请介绍一下你自己",
        "मुझे एक कविता सुनाओ",
        "Is it true that that that is, is?",
        "Write a haiku about autumn.\n\n- three lines\n- no rhyme 🍂",
        "next: 999",
        "go, go, go!",
        Path(flaw.__code__.co_filename).read_text(encoding="utf-8"),
    ],
)
def test_prompts_pass(text: str) -> None:
    assert flaw(text, ("<|im_end|>",)) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("Hi", "too short"),
        ("?!... 🍂 --", "no letters or digits"),
        ("a caf\ufffd in Paris", "broken characters"),
        ("a bell \x07 rings", "broken characters"),
        ("Hello<|im_end|>\n", "special token inside"),
        ("no no No no", "repetitive"),
        ("so it is, it is, it is, it is", "repetitive"),
        ("wait aaaaaaaaaa", "repetitive"),
        ("hahahahahaha", "repetitive"),
        ("知道知道知道知道", "repetitive"),
        ("Tell me more about the history of the city of Rome. " * 8, "repetitive"),
    ],
)
def test_texts_that_are_no_prompts(text: str, reason: str) -> None:
    assert flaw(text, ("<|im_end|>",)) == reason


def sampled(ids: Sequence[int], finish_reason: str = "stop") -> Sample:
    none = np.empty((len(ids), 0))
    return Sample(np.array(ids, np.int32), np.zeros(len(ids), np.float32), 0.0, finish_reason, none.astype(np.int32), none)


@pytest.mark.parametrize(
    ("text", "finish_reason", "found"),
    [
        (" Why is it so? \n<|im_end|>", "stop", "Why is it so?"),
        ("<|im_end|>", "stop", "empty"),
        (" \n<|im_end|>", "stop", "empty"),
        ("Why is it so?", "length", "cut at the length limit"),
        ("Why is it so?<|eot_id|>", "stop", "special token inside"),  # stopped there, and it is not this template's end
        ("Why <|User|> is it so?<|im_end|>", "stop", "Why <|User|> is it so?"),  # plain text to this template
    ],
)
def test_a_sample_is_read_up_to_the_end_of_its_turn(text: str, finish_reason: str, found: str) -> None:
    tokenizer = byte_tokenizer(QWEN)
    turn = user_turn(tokenizer, "t", enable_thinking=None)
    encoder = Encoder(tokenizer, chat_template=None, enable_thinking=None)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    item = read_sample(sampled(ids, finish_reason), turn, encoder, branch="general", number=7)
    assert (item.id, item.line) == ("teacher-general-7", 7)
    assert (item.question if isinstance(item, Prompt) else item.reason) == found
    assert isinstance(item, Rejected) == (found != text.removesuffix("<|im_end|>").strip() or finish_reason == "length")


# --- The loop -------------------------------------------------------------------------------------------------------------


class Writer:
    """A teacher that writes, for a seed, the text that the seed was given; notes what it was asked."""

    def __init__(self, texts: Sequence[str], *, seed: int = 3, branch: str = "general") -> None:
        self._texts = {seed_of(seed, "teacher-prompts", branch, i): text for i, text in enumerate(texts)}
        self.asked: list[dict[str, Any]] = []

    def sample(
        self, prompts: Sequence[Any], seeds: Sequence[int], *, max_new_tokens: int, eos_ids: Sequence[int], top_k: int = 0
    ) -> Iterator[tuple[int, Sample]]:
        self.asked.append({"prompts": prompts, "seeds": seeds, "max_new_tokens": max_new_tokens, "eos_ids": eos_ids})
        tokenizer = byte_tokenizer(QWEN)
        for i in reversed(range(len(seeds))):  # in an order of its own, as engines may
            ids = tokenizer(self._texts.get(seeds[i], "") + "<|im_end|>", add_special_tokens=False)["input_ids"]
            yield i, sampled(ids[:max_new_tokens], "stop" if len(ids) <= max_new_tokens else "length")

    def score(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("prompts are sampled, not scored")


def made(engine: Any, *, count: int, batch_size: int = 4, **options: Any) -> tuple[list[dict[str, Any]], Tally]:
    tokenizer = byte_tokenizer(QWEN)
    rows: list[Any] = []
    settings: dict[str, Any] = {"limit": 200, "seed": 3, "held_out": set(), "known": set(), "write": rows.extend}
    tally = make_prompts(
        "general",
        engine=engine,
        turn=user_turn(tokenizer, "t", enable_thinking=None),
        encoder=Encoder(tokenizer, chat_template=None, enable_thinking=None),
        count=count,
        batch_size=batch_size,
        **({"progress": lambda more: None} | settings | options),
    )
    return rows, tally


def questions(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["text"].split("user\n")[1].split("<|im_end|>")[0] for row in rows]


def rendered(question: str) -> str:
    encoder = Encoder(byte_tokenizer(QWEN), chat_template=None, enable_thinking=None)
    ((item,),) = encoder.encode([[Prompt("a", 1, None, ({"role": "user", "content": question},))]])
    assert not isinstance(item, Rejected)
    return item.text


def test_each_reason_is_counted_once() -> None:
    texts = ["first one", "First  ONE", "an exam item", "from the file", "x" * 40, "hm", "y z" * 70, "fourth one", "spare"]
    known = {fingerprint(rendered("from the file"))}
    told: list[int] = []
    rows, tally = made(
        Writer(texts), count=2, limit=150, held_out={fingerprint("An exam item")}, known=known, progress=told.append
    )
    assert questions(rows) == ["first one", "fourth one"]
    assert tally.headline() == {
        "asked": 8,
        "accepted": 2,
        "rejected/cut at the length limit": 1,
        "rejected/duplicate": 1,
        "rejected/evaluation item": 1,
        "rejected/in the prompt file": 1,
        "rejected/repetitive": 1,
        "rejected/too short": 1,
    }
    assert tally.summary().startswith("2 of 8 samples are prompts (25.0%); duplicate 1 (12.5%), evaluation item 1 (12.5%), ")
    assert told == [1, 1]


def test_what_the_engine_is_asked() -> None:
    engine = Writer(["one", "two", "three"])
    made(engine, count=3, batch_size=2, limit=5000)
    tokenizer = byte_tokenizer(QWEN)
    turn = user_turn(tokenizer, "t", enable_thinking=None)
    assert [len(call["prompts"]) for call in engine.asked] == [2, 2]
    assert engine.asked[0]["prompts"] == [turn.ids, turn.ids]
    assert [seed for call in engine.asked for seed in call["seeds"]] == [
        seed_of(3, "teacher-prompts", "general", i) for i in range(4)
    ]
    assert engine.asked[0]["max_new_tokens"] == 1024
    assert set(tokenizer.convert_ids_to_tokens(engine.asked[0]["eos_ids"])) == set(SPECIAL)


def test_the_table_is_that_of_a_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    with open_table(path, "prompts") as write:
        made(Writer(["Why is it so?", "", "And now what?"]), count=2, batch_size=2, write=write)
    first, second = read_table(path, "prompts")
    text = rendered("Why is it so?")
    assert (first["prompt_id"], first["line"], first["text"]) == ("teacher-general-1", 1, text)
    assert first["token_ids"].tolist() == byte_tokenizer(QWEN)(text, add_special_tokens=False)["input_ids"]
    assert (second["prompt_id"], second["line"]) == ("teacher-general-3", 3)
    assert [row["prompt_id"] for row in PromptTable(path).rows([1, 0])] == ["teacher-general-3", "teacher-general-1"]
    assert known_prompts(path) == {fingerprint(text), fingerprint(rendered("And now what?"))}


def test_too_long_for_the_student_though_not_for_the_teacher() -> None:
    """The teacher's turn has fewer tokens than what the student's template makes of the same prompt."""
    rows, tally = made(Writer(["What became of the old mill by the river?", "why?"]), count=1, limit=80)
    assert questions(rows) == ["why?"]
    assert tally.rejected == {"too many tokens": 1}


def test_half_is_enough_and_less_is_an_error() -> None:
    _, tally = made(Writer(["one thing", "two things"]), count=4)
    assert (tally.asked, tally.accepted, tally.rejected) == (20, 2, {"empty": 18})
    with pytest.raises(UnhealthyRunError, match=r"half of the 4 prompts wanted: 1 of 20 samples .* empty 19 \(95.0%\)"):
        made(Writer(["one thing"]), count=4)


def test_a_user_turn_that_leaves_no_room() -> None:
    with pytest.raises(InputError, match=r"before the first word, and a prompt may have 9 -> raise prompts\.max_prompt_tokens"):
        made(Writer([]), count=1, limit=9)


TEXTS = st.lists(
    st.sampled_from(["alpha one", "Alpha  One", "beta two", "gamma", "delta four", "", "Hi", "exam item"]), max_size=30
)


@given(texts=TEXTS, count=st.integers(1, 4), batch_sizes=st.tuples(st.integers(1, 9), st.integers(1, 40)))
def test_prompts_are_unique_never_held_out_and_the_same_in_any_batches(
    texts: list[str], count: int, batch_sizes: tuple[int, int]
) -> None:
    def attempt(batch_size: int) -> Any:
        try:
            return made(Writer(texts), count=count, batch_size=batch_size, held_out={fingerprint("exam item")})
        except UnhealthyRunError as error:
            return str(error)

    outcome = attempt(batch_sizes[0])
    assert outcome == attempt(batch_sizes[1])
    distinct = {
        fingerprint(text)
        for text in texts[: 5 * count]
        if text in ("alpha one", "Alpha  One", "beta two", "gamma", "delta four")
    }
    if isinstance(outcome, str):
        assert 2 * len(distinct) < count
        return
    rows, tally = outcome
    prints = [fingerprint(question) for question in questions(rows)]
    assert len(set(prints)) == len(prints) == tally.accepted == min(len(distinct), count)
    assert set(prints) <= distinct
    assert tally.asked == tally.accepted + tally.rejected.total() <= 5 * count


@pytest.mark.slow
def test_the_micro_teacher_writes_prompts_of_unseen_kinds() -> None:
    """A real model; in other batches, too, the same prompts."""
    tokenizer = AutoTokenizer.from_pretrained(MICRO)

    def write(batch_size: int) -> tuple[list[dict[str, Any]], Tally]:
        rows: list[Any] = []
        engine = load_engine("transformers", MICRO, vocab_size=261, batch_size=batch_size, batch_tokens=4096, max_length=128)
        turn = user_turn(tokenizer, "t", enable_thinking=None)
        tally = make_prompts(
            "general",
            engine=engine,
            turn=turn,
            encoder=Encoder(tokenizer, chat_template=None, enable_thinking=None),
            count=100,
            limit=64,
            seed=20260527,
            held_out={fingerprint("copy: aiquwa")},
            known=set(),
            write=rows.extend,
            progress=lambda more: None,
            batch_size=batch_size,
        )
        return rows, tally

    rows, tally = write(64)
    kinds = {row["text"].removeprefix("<|user|>").split(":")[0] for row in rows}
    assert {"copy", "plural", "last", "length", "add", "swap"} <= kinds
    assert all(row["text"].startswith("<|user|>") and row["text"].endswith("<|end|><|assistant|>") for row in rows)
    assert tally.accepted == 100
    assert (rows, tally) == write(17)
