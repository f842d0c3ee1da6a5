"""A served teacher before it is used: is it there, does it read the student's tokens, and are its log-probabilities raw?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from camopd.adapters import weights_at
from camopd.config import Recipe
from camopd.engines.remote import RemoteEngine
from camopd.engines.served import Server
from camopd.errors import EngineError, InputError, Problem, StoreError
from camopd.inputs.checks import copy_description, read_facts
from camopd.inputs.tokens import encoded, load_tokenizer, num_ids, probes
from camopd.recipe.served import split_served
from camopd.store import Store, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = "The quick brown fox, 1234.56 EUR;  two  blanks. def f(x): return x**2  # naïve 東京 On the 3rd of May, what is 7 + 5?"
PROBE_TOKENS = 64  # of the text, at most
TOLERANCE = 0.1  # mean |difference|, nats a token, that bfloat16 on another card explains and another model does not
FEW = 2  # attempts after the first while preparing: somebody waits to be told of a wrong address
NUM_PADDING = 8  # ids of the head's padding that are asked for
MAX_PADDING = 1e-3  # probability that padding may have in all: scores are off by as many nats


@dataclass(frozen=True)
class Probe:
    """What a model said of a fixed text: the plan keeps it, so that another model in its place is noticed.

    Attributes:
        token_ids: of the text.
        logprobs: of its tokens but the first.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Probe:
        return cls(tuple(record["token_ids"]), tuple(record["logprobs"]))


@dataclass(frozen=True)
class ServedModel:
    """A served teacher that passed.

    Attributes:
        content_id: identity: its name, since weights that are not at hand cannot be hashed; the probe is compared besides.
        max_length: longest sequence that can be scored; None where the server does not say.
        probe: what it said.
    """

    content_id: str
    max_length: int | None
    probe: Probe


def distance(left: Sequence[float], right: Sequence[float]) -> float:
    """Mean |difference|, nats a token."""
    return float(np.abs(np.array(left) - np.array(right)).mean())


# --- In prepare -----------------------------------------------------------------------------------------------------------


def examine(recipe: Recipe, store: Store) -> tuple[dict[str, ServedModel], list[Problem]]:
    """Every served teacher of a recipe by its address, and what is wrong with those that are not among them."""
    where = {branch.teacher: f"branches.{branch.name}.teacher" for branch in reversed(recipe.branches) if branch.is_served}
    if not where:
        return {}, []
    tokenizer, head = _of_student(recipe, store)
    found: dict[str, ServedModel] = {}
    problems: list[Problem] = []
    for location, parameter in sorted(where.items(), key=lambda item: item[1]):
        assert location is not None, "such a branch has one"
        with closing(Server(location, attempts=FEW)) as server:
            try:
                model, max_length = named(server)
                if tokenizer is None:
                    continue  # what is wrong with the student is said elsewhere
                engine = open_engine(server, model, recipe, min(num_ids(tokenizer), head), max_length)
                broken = list(_faults(engine, server, model, tokenizer, head, recipe))
                problems += [Problem(parameter, what, fix) for what, fix in broken]
                if not broken:
                    found[location] = ServedModel(digest({"served": model}), max_length, take(engine, tokenizer))
            except EngineError as error:
                problems.append(Problem(parameter, str(error)))
    return found, problems + _alike(found, where)


def _of_student(recipe: Recipe, store: Store) -> tuple[PreTrainedTokenizerFast | None, int]:
    """The student's tokenizer and the rows of its head; None when they cannot be had."""
    with tempfile.TemporaryDirectory(prefix="camopd-") as scratch:
        folder = Path(scratch) / "student"
        try:
            copy_description(store, weights_at(recipe.student, store, recipe.base), folder)
        except (StoreError, InputError):
            return None, 0
        facts, _ = read_facts("student", recipe.student, folder)
        return (load_tokenizer(facts)[0], facts.vocab_size) if facts else (None, 0)


def named(server: Server) -> tuple[str, int | None]:
    """The name of the model that is meant, and the longest sequence that it scores.

    Raises:
        EngineError: no such model, or several and none is named.
    """
    models = server.models()
    names = ", ".join(models) or "none"
    if server.wanted and server.wanted not in models:
        raise EngineError(f"{server.base} serves no model {server.wanted!r}; it serves {names}")
    if not server.wanted and len(models) != 1:
        raise EngineError(f"{server.base} serves {names}; say which is meant, as in {server.base}#NAME")
    name = server.wanted or next(iter(models))
    longest = models[name]
    return name, None if longest is None else longest - 1  # a token is sampled after a prompt that is scored


def open_engine(server: Server, model: str, recipe: Recipe, vocab_size: int, max_length: int | None) -> RemoteEngine:
    """The engine with a recipe's limits."""
    longest = recipe.prompts.max_prompt_tokens + recipe.rollout.max_new_tokens
    return RemoteEngine(
        server,
        model,
        vocab_size=vocab_size,
        batch_size=recipe.rollout.batch_size,
        batch_tokens=recipe.score.batch_tokens,
        max_length=max_length or longest,
    )


def take(engine: RemoteEngine, tokenizer: PreTrainedTokenizerFast, top_k: int = 0, **asked: Any) -> Probe:
    """Ask for the probe's log-probabilities; ``asked`` may hold further fields of the request."""
    ids = encoded(tokenizer, TEXT)[: max(2, min(PROBE_TOKENS, engine.max_length))]
    scores = engine.score_one(ids[:1], ids[1:], top_k, **asked)
    return Probe(tuple(ids), tuple(scores.logprobs.tolist()))


def _faults(
    engine: RemoteEngine, server: Server, model: str, tokenizer: PreTrainedTokenizerFast, head: int, recipe: Recipe
) -> Iterator[tuple[str, str]]:
    """What is wrong and how to mend it, one after the other as far as the next question makes sense."""
    first, vocab_size = take(engine, tokenizer), min(num_ids(tokenizer), head)
    top_k = min(recipe.score.top_k, vocab_size) if recipe.score.signal == "topk" else 0
    try:
        again = take(engine, tokenizer, top_k)
    except EngineError as error:
        fix = f"start the server with --max-logprobs {top_k} at least, or lower score.top_k"
        yield f"the {top_k} most likely tokens cannot be had, only the given ones: {error}", fix
        return
    if distance(first.logprobs, again.logprobs) > TOLERANCE:
        what = f"the same question got two answers, {distance(first.logprobs, again.logprobs):.2f} nats a token apart"
        yield f"{server.base}: {what}", "serve one model under this address"
        return
    hot = take(engine, tokenizer, temperature=0.5)
    if distance(first.logprobs, hot.logprobs) > TOLERANCE:
        what = f"{server.base}: log-probabilities change with the request's temperature, so they are not the model's own"
        yield what, "serve it with raw log-probabilities (vLLM: --logprobs-mode raw_logprobs)"
    yield from _other_tokenizer(server, model, first, tokenizer)
    yield from other_head(engine, first.token_ids, vocab_size, head)


def _other_tokenizer(server: Server, model: str, probe: Probe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, str]]:
    """The same text must be the same ids, or, where the server makes none of text, the same ids the same text."""
    fix = "give a teacher of the student's own tokenizer"
    for text in [TEXT, *probes(tokenizer.backend_tokenizer)]:
        theirs = server.tokenize(model, text)
        if theirs is None:
            break
        if theirs != encoded(tokenizer, text):
            yield f"{server.base} makes other ids of the same text than the student's tokenizer", fix
            return
    else:
        return
    asked = {"model": model, "prompt": list(probe.token_ids), "echo": True, "max_tokens": 1, "add_special_tokens": False}
    text = str(server.complete(asked | {"skip_special_tokens": False}).get("text", ""))
    if not text.startswith(str(tokenizer.decode(list(probe.token_ids))).rstrip("\ufffd")):
        yield f"{server.base} reads the student's token ids as other text", fix


def other_head(engine: RemoteEngine, ids: Sequence[int], vocab_size: int, head: int) -> Iterator[tuple[str, str]]:
    """The served head must have every shared id, and give the padding behind them next to nothing."""
    try:
        engine.score_one(ids[:1], [vocab_size - 1], 0)
    except EngineError as error:
        yield f"the student's last token, id {vocab_size - 1}, is not known there: {error}", "give a teacher of its tokenizer"
        return
    padding = np.unique(np.linspace(vocab_size, head - 1, min(NUM_PADDING, head - vocab_size)).astype(int)).tolist()
    try:
        asked = [engine.score_one(ids[:-1], [token], 0).logprobs[0] for token in padding]
    except EngineError:  # a shorter head has no such ids
        return
    share = float(np.exp(asked).mean()) * (head - vocab_size) if padding else 0.0
    if share > MAX_PADDING:
        what = f"its head gives {share:.1%} of the probability to ids that no token has, which a server cannot be told to mask"
        yield what, "give the model's folder: engines here mask them"


def _alike(found: Mapping[str, ServedModel], where: Mapping[str | None, str]) -> list[Problem]:
    """Two addresses that serve different models under one name."""
    first: dict[str, str] = {}
    problems = []
    for location, model in found.items():
        other = first.setdefault(model.content_id, location)
        if distance(found[other].probe.logprobs, model.probe.logprobs) > TOLERANCE:
            what = f"serves another model under the same name as {split_served(other)[0]}"
            problems.append(Problem(where[location], what, "give one of them another name (vLLM: --served-model-name)"))
    return problems


# --- In every stage that asks it ------------------------------------------------------------------------------------------


def check_same(location: str, expected: Probe, found: Probe) -> None:
    """Raises EngineError when a server's model is not the one that `prepare` found."""
    apart = distance(expected.logprobs, found.logprobs)
    if apart > TOLERANCE:
        raise EngineError(
            f"{split_served(location)[0]} serves another model than when the run was prepared: on the same text its "
            f"log-probabilities are {apart:.2f} nats a token away; serve the old one again, or start another run (name)"
        )


def connect(location: str, recipe: Recipe, *, vocab_size: int, longest: int, expected: Probe) -> RemoteEngine:
    """The engine of a prepared run's teacher, once its server has shown that it still serves it.

    Args:
        location: the teacher's address.
        recipe: limits.
        vocab_size: shared ids.
        longest: sequence of the run, prompt and response together.
        expected: what `prepare` was told.

    Raises:
        EngineError: the server cannot be used, or serves something else by now.
    """
    server = Server(location)
    model, max_length = named(server)
    if max_length is not None and max_length < longest:
        raise EngineError(f"{server.base} takes {max_length} tokens, the run's sequences have up to {longest}; serve it longer")
    engine = open_engine(server, model, recipe, vocab_size, max_length)
    scores = engine.score_one(expected.token_ids[:1], expected.token_ids[1:], 0)
    check_same(location, expected, Probe(expected.token_ids, tuple(scores.logprobs.tolist())))
    return engine


def records(found: Mapping[str, ServedModel]) -> dict[str, dict[str, Any]]:
    """What a plan keeps: the probe by content id."""
    return {model.content_id: asdict(model.probe) for model in found.values()}
