"""The tokenizer and its chat template: loaded, compared between models, and the one place that renders and encodes prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jinja2
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from camopd.errors import Problem
from camopd.inputs.checks import AGAIN, ModelFacts
from camopd.inputs.prompts import Prompt, Rejected
from camopd.store import digest

_PLAIN_PROBES = (
    "The quick brown fox, 1234.56 EUR;  two  blanks\n\ttab\r\nCRLF",
    "naïve Ärzte 東京 🩺 العربية  É",
    "def f(x):\n    return x**2",
)
_VOCABULARY_PROBES = 512  # tokens whose own text is encoded again: words that a small vocabulary knows


# --- Loading and comparing ------------------------------------------------------------------------------------------------


def load_tokenizer(facts: ModelFacts) -> tuple[PreTrainedTokenizerFast | None, list[Problem]]:
    """The model's tokenizer, when transformers makes of its folder what tokenizer.json says.

    AutoTokenizer may choose a class by config.json's model_type that ignores parts of tokenizer.json and gives other ids with
    no error; so both are asked for the ids of probe text.
    """
    path = facts.folder / "tokenizer.json"
    if not path.is_file():
        return None, [
            Problem(facts.where, f"{facts.uri} has no tokenizer.json", "save it by tokenizer.save_pretrained(folder)")
        ]
    try:
        plain = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the class that tokenizers raises itself
        return None, [Problem(facts.where, f"{facts.uri}/tokenizer.json cannot be read: {str(error)[:200]}", AGAIN)]
    plain.no_truncation()
    plain.no_padding()
    try:
        tokenizer = AutoTokenizer.from_pretrained(facts.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        return None, [Problem(facts.where, f"the tokenizer of {facts.uri} cannot be loaded: {reason}", AGAIN)]
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        what = f"{facts.uri} asks for {type(tokenizer).__name__}, which does not use its tokenizer.json"
        return None, [Problem(facts.where, what, "correct tokenizer_class in tokenizer_config.json")]
    problems = []
    if num_ids(tokenizer) > facts.vocab_size:
        what = f"tokenizer has {num_ids(tokenizer)} ids, embedding has {facts.vocab_size} rows"
        problems.append(Problem(facts.where, f"{facts.uri}: {what}", "use the tokenizer that the model was trained with"))
    if any(encoded(tokenizer, probe) != plain.encode(probe, add_special_tokens=False).ids for probe in probes(plain)):
        what = f"{facts.uri}: {type(tokenizer).__name__} gives other ids than tokenizer.json for the same text"
        fix = "correct model_type in config.json and tokenizer_class in tokenizer_config.json"
        problems.append(Problem(facts.where, what, fix))
    return tokenizer, problems


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """Ids 0 .. num_ids - 1 can come out of the tokenizer."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def probes(tokenizer: Tokenizer) -> list[str]:
    """Text that tells tokenizers apart: scripts, blanks, digits, code, and the text of the tokenizer's own tokens."""
    step = max(tokenizer.get_vocab_size() // _VOCABULARY_PROBES, 1)
    ids = range(0, tokenizer.get_vocab_size(), step)
    return [*_PLAIN_PROBES, *(tokenizer.decode(list(ids[i : i + 16])) for i in range(0, len(ids), 16))]


def encoded(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_same_tokenizer(
    where: str, uri: str, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, texts: Iterable[str]
) -> tuple[list[Problem], list[str]]:
    """Every token of the student must mean the same to the teacher; tokens that only the teacher has are masked.

    Args:
        where: the parameter that names the teacher.
        uri: the teacher's folder.
        student: the student's tokenizer.
        teacher: the teacher's.
        texts: rendered prompts, compared by their ids.

    Returns:
        What is wrong and warnings.
    """
    own, other = student.get_vocab(), teacher.get_vocab()
    fix = "give a teacher of the student's own tokenizer"
    for token, number in sorted(own.items(), key=lambda item: item[1]):
        if other.get(token) != number:
            theirs = f"has id {other[token]}" if token in other else "does not exist"
            return [Problem(where, f"token {token!r} has id {number} in the student and {theirs} in {uri}", fix)], []
    if any(encoded(student, text) != encoded(teacher, text) for text in [*probes(student.backend_tokenizer), *texts]):
        what = (
            f"{uri} has the student's tokens, but the same text becomes other ids: its normaliser, splitting or merges differ"
        )
        return [Problem(where, what, fix)], []
    extra = sorted(other.keys() - own.keys(), key=lambda token: other[token])
    if not extra:
        return [], []
    first = f"{extra[0]!r} (id {other[extra[0]]})"
    return [], [f"{where}: {uri} has {len(extra)} tokens that the student lacks, the first {first}; they get no probability"]


# --- Rendering and encoding -----------------------------------------------------------------------------------------------

NO_TEMPLATE = "needs a chat template"
TEMPLATE_REFUSES = "refused by the chat template"
DOUBLED_BOS = "doubled BOS"
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Encoded:
    """A prompt as the models see it: its rendered text, and the token ids of that text."""

    prompt: Prompt
    text: str
    ids: list[int]

    @property
    def line(self) -> int:
        return self.prompt.line


class Encoder:
    """Turns prompts into the token ids that every stage and every model then sees.

    Conversations are rendered by the chat template, which writes all special tokens itself, so none are added. A plain prompt
    is taken as it is, after the BOS token where the tokenizer puts one before text.

    Args:
        tokenizer: the student's. Its chat template is replaced when ``chat_template`` is given.
        chat_template: Jinja text used in place of the tokenizer's own.
        enable_thinking: passed to the template; None leaves it undefined there.

    Raises:
        ValueError: the template is not Jinja, or the tokenizer has several and none is the default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, chat_template: str | None, enable_thinking: bool | None) -> None:
        self._tokenizer = tokenizer
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self._switches: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # tokenizer.json may carry both, left from training
        self._backend.no_padding()
        self._bos = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and self._backend.encode("").ids[:1] == [self._bos]
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if self.template is not None:
            try:
                self._apply([[{"role": "user", "content": "a"}]])
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from error
            except _TEMPLATE_ERRORS:
                pass  # it compiles; which conversations it takes is seen row by row

    @property
    def template_id(self) -> str:
        """Identity of the template and its switches: another one means other prompts."""
        return digest({"chat_template": self.template, "switches": self._switches})

    def encode(self, batches: Iterable[Sequence[Prompt | Rejected]]) -> Iterator[list[Encoded | Rejected]]:
        """Render and encode batch by batch; rows keep their places.

        What the template refuses and what has no tokens comes out as Rejected, and what was rejected before passes through. The
        tokenizer, which is most of the work and needs no Python, runs beside the reading and rendering of the next batch.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting: tuple[Sequence[Prompt | Rejected], list[str | Rejected], Future[list[Encoding]]] | None = None
            for batch in batches:
                texts = self._rendered([item for item in batch if isinstance(item, Prompt)])
                plain = [text for text in texts if isinstance(text, str)]
                encodings = pool.submit(self._backend.encode_batch_fast, plain, add_special_tokens=False)
                if waiting is not None:
                    yield self._assembled(*waiting)
                waiting = (batch, texts, encodings)
            if waiting is not None:
                yield self._assembled(*waiting)

    def _assembled(
        self, batch: Sequence[Prompt | Rejected], texts: Sequence[str | Rejected], pending: Future[list[Encoding]]
    ) -> list[Encoded | Rejected]:
        rendered, encodings = iter(texts), iter(pending.result())
        items: list[Encoded | Rejected] = []
        for item in batch:
            text = item if isinstance(item, Rejected) else next(rendered)
            if isinstance(item, Prompt) and isinstance(text, str):
                items.append(self._checked(item, text, next(encodings).ids))
            else:
                assert isinstance(text, Rejected)
                items.append(text)
        return items

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def truncated(self, ids: list[int], length: int) -> list[int]:
        """The last ``length`` tokens; a BOS at the start stays there."""
        keep_bos = ids[0] == self._bos and length > 1
        return ids[:1] + ids[len(ids) - length + 1 :] if keep_bos else ids[len(ids) - length :]

    def _checked(self, prompt: Prompt, text: str, ids: list[int]) -> Encoded | Rejected:
        if prompt.text is not None and self._adds_bos and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        if not ids:
            return Rejected(prompt.line, "has no tokens", prompt.id)
        if self._bos is not None and ids[:2] == [self._bos] * 2:
            return Rejected(prompt.line, DOUBLED_BOS, prompt.id, "the template and the text each write the BOS token")
        return Encoded(prompt, text, ids)

    def _rendered(self, prompts: Sequence[Prompt]) -> list[str | Rejected]:
        conversations = [list(prompt.messages) for prompt in prompts if prompt.text is None]
        try:
            rendered: Iterator[str | None] = iter(self._apply(conversations) if conversations and self.template else ())
        except _TEMPLATE_ERRORS:
            rendered = itertools.repeat(None)  # at least one is refused: see which
        return [(next(rendered, None) or self._one(prompt)) if prompt.text is None else prompt.text for prompt in prompts]

    def _one(self, prompt: Prompt) -> str | Rejected:
        if self.template is None:
            return Rejected(prompt.line, NO_TEMPLATE, prompt.id)
        try:
            return self._apply([list(prompt.messages)])[0]
        except jinja2.TemplateError as error:
            return Rejected(prompt.line, TEMPLATE_REFUSES, prompt.id, str(error.message))
        except _TEMPLATE_ERRORS as error:  # its text may quote the prompt
            return Rejected(prompt.line, TEMPLATE_REFUSES, prompt.id, type(error).__name__)

    def _apply(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        rendered: Any = self._tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True, return_dict=False, **self._switches
        )
        return rendered
