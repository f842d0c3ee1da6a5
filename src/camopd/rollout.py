"""Stage 2: the student answers the round's prompts. One model load for all branches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camopd import plan as layout
from camopd import propose
from camopd.config import Recipe
from camopd.engines import Engine, Sample, import_engine, sample_batches
from camopd.engines.shared import open_engines
from camopd.errors import UnhealthyRunError
from camopd.past import known
from camopd.plan import Plan
from camopd.progress import Progress
from camopd.recipe.served import is_served
from camopd.records import PromptTable, read_table, write_table
from camopd.runtime import set_threads
from camopd.schedule import Schedule, prompt_slice, seed_of, share_slice
from camopd.shards import Shard, finished_parts, joined, joined_rates, key_of, part_config, rates, shard_uri
from camopd.store import Manifest, Store, join

if TYPE_CHECKING:
    from camopd.engines.remote import RemoteEngine

Row = dict[str, Any]
TABLE = "rollouts.parquet"


def requests(plan: Plan, start: Schedule, count: int, teacher_prompts: Mapping[str, int] | None = None) -> list[Row]:
    """What ``count`` optimiser steps sample: branch, step, row of which prompt table, and sample index of each response.

    The sample index counts how often the run has sampled the prompt, so (prompt id, sample index) is unique in the run.

    Args:
        plan: the run's plan.
        start: where the schedule stands.
        count: optimiser steps.
        teacher_prompts: prompts that a branch's teacher made up, where it did.
    """
    wanted: list[Row] = []
    for at in start.ahead(count):
        for name, prompts in at.active.items():
            made_up = share_slice(at.taken(name), prompts, plan.recipe.branch(name).teacher_prompts)
            own = (at.taken(name) - made_up[0], prompts - made_up[1])
            for table, (first, number) in (("file", own), ("teacher", made_up)):
                size = plan.num_prompts.get(name, 0) if table == "file" else (teacher_prompts or {}).get(name, 0)
                wanted += [
                    {"branch": name, "step": at.step, "table": table, "row": row, "sample_index": sample_index}
                    for row, sample_index in _picked(plan, name, table, size, first, number)
                ]
    return wanted


def _picked(plan: Plan, branch: str, table: str, size: int, first: int, number: int) -> list[tuple[int, int]]:
    """Row and sample index of the responses to a table's prompts at positions first .. first + number - 1."""
    if not number:
        return []
    order = branch if table == "file" else f"{branch}/{table}"
    rows = prompt_slice(num_prompts=size, seed=plan.recipe.seed, branch=order, start=first, count=number)
    repeats = plan.recipe.rollout.samples_per_prompt
    return [(row, epoch * repeats + repeat) for row, epoch in rows for repeat in range(repeats)]


def is_empty(token_ids: Iterable[int], eos_ids: Sequence[int]) -> bool:
    """A response without any token but end tokens."""
    return all(token in eos_ids for token in token_ids)


def health(rows: Sequence[Mapping[str, Any]], plan: Plan, first: Mapping[str, Any]) -> dict[str, Any]:
    """Headline numbers by branch: mean length, share cut at the limit, share empty, entropy, share of invalid ids.

    Args:
        rows: the round's responses.
        plan: the run's plan.
        first: the headline numbers of round 1, which lengths are compared with; empty in round 1 itself.

    Raises:
        UnhealthyRunError: more empty responses than ``rollout.max_empty_fraction``, or longer ones than
            ``rollout.max_length_growth`` times round 1's.
    """
    limits = plan.recipe.rollout
    numbers: dict[str, Any] = {}
    for branch in plan.recipe.branches:
        own = [row for row in rows if row["branch"] == branch.name]
        if not own:
            continue
        empty = sum(row["finish_reason"] == "empty" for row in own) / len(own)
        if empty > limits.max_empty_fraction:
            raise UnhealthyRunError(
                f"{empty:.0%} of the student's responses on branch {branch.name!r} are empty, more than "
                f"rollout.max_empty_fraction = {limits.max_empty_fraction:.0%}; check the chat template and the end tokens, "
                'or, when it came slowly, set score.empty_answers = "score"'
            )
        length = sum(len(row["response_ids"]) for row in own) / len(own)
        usual = first.get(f"{branch.name}/mean_length", length)
        if length > limits.max_length_growth * usual:
            raise UnhealthyRunError(
                f"responses on branch {branch.name!r} have grown from {usual:.0f} to {length:.0f} tokens on average, more than "
                f"rollout.max_length_growth = {limits.max_length_growth:g} times; lower train.learning_rate or max_new_tokens"
            )
        numbers |= {
            f"{branch.name}/mean_length": length,
            f"{branch.name}/cut_share": sum(row["finish_reason"] == "length" for row in own) / len(own),
            f"{branch.name}/empty_share": empty,
            f"{branch.name}/invalid_share": sum(row["finish_reason"] == "invalid" for row in own) / len(own),
            f"{branch.name}/entropy": sum(row["entropy"] for row in own) / len(own),
        }
    return numbers


def finish_reason(sample: Sample, plan: Plan) -> str:
    """``stop``, ``length``, ``empty`` (only end tokens) or ``invalid`` (an id the tokenizer does not have)."""
    if any(token >= plan.vocab_size for token in sample.token_ids):
        return "invalid"
    return "empty" if is_empty(sample.token_ids, plan.eos_ids) else sample.finish_reason


def teacher_prompts(plan: Plan, store: Store) -> dict[str, str]:
    """Let the teachers make up what the recipe asks for, unless they have; content id of each table."""
    asked = [branch for branch in plan.recipe.branches if branch.teacher_prompts and branch.steps]
    return {f"teacher-prompts/{branch.name}": propose.run(plan, branch, store=store) for branch in asked}


class PromptTables:
    """Token ids of the prompts of every branch, from the plan and from what teachers made up."""

    def __init__(self, plan: Plan, store: Store) -> None:
        names = [branch.name for branch in plan.recipe.branches if branch.name in plan.num_prompts]
        plan_uri = layout.plan_uri(plan.run_uri)
        paths = {(name, "file"): store.fetch(join(plan_uri, layout.prompts_file(name))) for name in names}
        self.num_teacher_prompts: dict[str, int] = {}
        for branch in plan.recipe.branches:
            if branch.teacher_prompts and branch.steps:
                uri = layout.teacher_prompts_uri(plan.run_uri, branch.name)
                self.num_teacher_prompts[branch.name] = store.require(uri).metrics["accepted"]
                paths[branch.name, "teacher"] = store.fetch(join(uri, "prompts.parquet"))
        self._tables = {key: PromptTable(path) for key, path in paths.items()}

    def fill(self, wanted: Sequence[Row]) -> None:
        """Give each request its ``prompt_id`` and ``prompt_ids``."""
        for key, table in self._tables.items():
            own = [request for request in wanted if (request["branch"], request["table"]) == key]
            for request, prompt in zip(own, table.rows([request["row"] for request in own]), strict=True):
                request |= {"prompt_id": prompt["prompt_id"], "prompt_ids": prompt["token_ids"]}


def sample_rows(
    engines: Mapping[str, Engine], wanted: Sequence[Row], plan: Plan, advance: Callable[[int], None] = lambda tokens: None
) -> None:
    """Sample a response to each request and put it there: token ids, log-probabilities, entropy and finish reason.

    Args:
        engines: who answers, by branch; one engine may stand for several branches, which are then sampled together.
        wanted: requests with their prompts.
        plan: the run's plan.
        advance: told of the tokens of each finished response.
    """
    recipe = plan.recipe
    top_k = min(recipe.score.top_k, plan.vocab_size) if asks_student(recipe) else 0
    for engine in dict.fromkeys(engines.values()):
        own = [request for request in wanted if engines[request["branch"]] is engine]
        samples = engine.sample(
            [request["prompt_ids"] for request in own],
            [seed_of(recipe.seed, "rollout", r["branch"], r["prompt_id"], r["sample_index"]) for r in own],
            max_new_tokens=recipe.rollout.max_new_tokens,
            eos_ids=plan.eos_ids,
            top_k=top_k,
        )
        for index, sample in samples:
            own[index] |= {
                "response_ids": sample.token_ids,
                "logprobs": sample.logprobs,
                "topk_ids": sample.topk_ids,
                "student_topk_logprobs": sample.topk_logprobs,
                "entropy": sample.entropy,
                "finish_reason": finish_reason(sample, plan),
            }
            advance(len(sample.token_ids))


def asks_student(recipe: Recipe) -> bool:
    """Whether the top-k signal is over the student's own most likely tokens."""
    return recipe.score.signal == "topk" and recipe.score.top_k_of == "student"


def run(round_uri: str, *, shard: Shard | None = None, store: Store | None = None) -> Manifest:
    """Write ``rollouts.parquet`` of a round: token ids, log-probabilities, entropy and finish reason of each response.

    Args:
        round_uri: ``<run>/rounds/0001``; the round before must have its checkpoint.
        shard: the part to sample, under a prefix of its own; None is the whole.
        store: where to read and write.

    Raises:
        UnhealthyRunError: too many empty responses.
    """
    store = store or Store()
    run_uri, number = layout.run_and_round(round_uri)
    plan = Plan.load(store, run_uri)
    recipe, config, inputs = plan.recipe, sampling_config(plan.recipe), _inputs(plan, number, store)

    def write(folder: Path) -> dict[str, Any]:
        set_threads(recipe.num_threads)
        wanted = asked(plan, number, store)
        sampled_by = models(plan, number)
        wanted = wanted if shard is None else share(wanted, shard, recipe, list(sampled_by.values()))
        together = over_one_base(plan, sampled_by, store)
        asking = [{name: uri for uri in uris for name in sampled_by[uri]} for uris in together]
        turns = [(branches, own) for branches in asking if (own := [r for r in wanted if r["branch"] in branches])]
        progress = Progress(
            "rollout",
            total=len(wanted),
            unit="samples",
            round_number=number,
            num_rounds=recipe.num_rounds,
            branch="all branches" if shard is None else f"all branches, shard {shard}",
            waited=store.waited,
        )
        seconds = 0.0
        for turn, (branches, own) in enumerate(turns, 1):  # one base at a time: a device holds one of them
            following = [uri for later, _ in turns[turn : turn + 1] for uri in later.values()]
            with engines_at(plan, branches.values(), store) as engines:
                for place in plan.places(following, store):
                    store.prefetch(place)
                begun = time.monotonic()
                answering = {name: engines[uri] for name, uri in branches.items()}
                sample_rows(answering, own, plan, lambda tokens: progress.advance(1, tokens=tokens))
                seconds += time.monotonic() - begun
        if wanted:
            student = recipe.student if recipe.rollout.sampler == "teacher" else plan.student_uri(number)
            add_text(wanted, store.fetch(plan.tokenizer_uri(student, store)))
        # A share is too small to judge the run by: what is healthy is looked at when all are there.
        numbers = health(wanted, plan, _first(plan, number, store)) if shard is None else {}
        numbers |= write_samples(folder, wanted, plan)
        return numbers | rates(numbers["tokens"], seconds)

    uri = shard_uri(layout.rollout_uri(round_uri), shard)
    return store.produce(uri, stage="rollout", config=part_config(config, shard), inputs=inputs, write=write)


def join_shards(round_uri: str, *, store: Store) -> Manifest:
    """Make a round's rollout from its shards: the same table as if one pod had sampled it.

    Args:
        round_uri: ``<run>/rounds/0001``, every shard of which is sampled.
        store: where to read and write.

    Raises:
        StoreError: a shard is not finished, or a sample is missing or there twice.
        UnhealthyRunError: too many empty responses.
    """
    run_uri, number = layout.run_and_round(round_uri)
    plan, uri = Plan.load(store, run_uri), layout.rollout_uri(round_uri)
    config, inputs = sampling_config(plan.recipe), _inputs(plan, number, store)

    def write(folder: Path) -> dict[str, Any]:
        parts = finished_parts(uri, plan.recipe.shards, config, inputs, store)
        tables = {part: read_table(store.fetch(join(part, TABLE)), "rollouts") for part in parts}
        rows = joined(uri, [key_of(request) for request in asked(plan, number, store)], tables)
        numbers = health(rows, plan, _first(plan, number, store)) | write_samples(folder, rows, plan)
        return numbers | joined_rates(numbers["tokens"], parts.values())

    return store.produce(uri, stage="rollout", config=config, inputs=inputs, write=write)


def asked(plan: Plan, number: int, store: Store) -> list[Row]:
    """What a round samples, with the prompts."""
    tables = PromptTables(plan, store)
    wanted = requests(plan, plan.schedule(number), plan.recipe.steps_per_round, tables.num_teacher_prompts)
    tables.fill(wanted)
    return wanted


def share(wanted: Sequence[Row], shard: Shard, recipe: Recipe, by_model: Iterable[Sequence[str]]) -> list[Row]:
    """The requests of one shard, in their order.

    Args:
        wanted: all requests of the round, with their prompts.
        shard: which part.
        recipe: names the engine: `transformers` computes batch by batch, vLLM fills up what it works on by itself.
        by_model: the branches that one model answers, for each model.
    """
    size = recipe.rollout.batch_size if recipe.rollout.engine == "transformers" else 1
    own = []
    for names in by_model:
        theirs = [request for request in wanted if request["branch"] in names]
        batches = sample_batches([len(request["prompt_ids"]) for request in theirs], size)
        own += [key_of(theirs[index]) for index in shard.share(batches)]
    return [request for request in wanted if key_of(request) in set(own)]


def add_text(rows: Sequence[Row], folder: Path) -> None:
    """Put the text of each response beside its ids.

    Args:
        rows: the samples.
        folder: the student, or a checkpoint of it, which has its tokenizer; whichever is here already.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for row in rows:
        row["text"] = tokenizer.decode(row["response_ids"], skip_special_tokens=True)


def write_samples(folder: Path, rows: Sequence[Row], plan: Plan) -> dict[str, Any]:
    """Write the table; how many samples and tokens it holds."""
    write_table(folder / TABLE, "rollouts", rows, {"template_id": plan.template_id})
    return {"num_samples": len(rows), "tokens": sum(len(row["response_ids"]) for row in rows)}


def sampling_config(recipe: Recipe) -> dict[str, Any]:
    """The settings that shape a round's samples."""
    config = recipe.rollout.model_dump(mode="json", exclude=set(recipe.rollout.HOW))
    config |= {"seed": recipe.seed, "steps_per_round": recipe.steps_per_round}
    return config | {"cycle": Schedule.of(recipe).cycle, "top_k": recipe.score.top_k if asks_student(recipe) else 0}


def _inputs(plan: Plan, number: int, store: Store) -> dict[str, str]:
    planned, student = store.require(layout.plan_uri(plan.run_uri)).content_id, plan.student_id(number, store)
    return {"plan": planned, "student": student} | teacher_prompts(plan, store)


def _first(plan: Plan, number: int, store: Store) -> Mapping[str, Any]:
    """Round 1's headline numbers, which later ones are compared with; empty in round 1."""
    first = layout.rollout_uri(layout.round_uri(plan.run_uri, 1))
    return (known(first, store) or store.require(first)).metrics if number > 1 else {}


def models(plan: Plan, number: int) -> dict[str, list[str]]:
    """Who answers: the round's student for all branches, or each branch's teacher. Branches by the URI of the model."""
    by_teacher, student = plan.recipe.rollout.sampler == "teacher", plan.student_uri(number)
    branches: dict[str, list[str]] = {}
    for branch in plan.active_branches(number):
        branches.setdefault(plan.teacher_uri(branch) if by_teacher else student, []).append(branch.name)
    return branches


def over_one_base(plan: Plan, uris: Iterable[str], store: Store) -> list[list[str]]:
    """The models in groups that share their weights: adapters of one base, and the base itself. Copies have one model each."""
    if plan.recipe.rollout.replicas > 1:
        return [[uri] for uri in uris]
    groups: dict[str, list[str]] = {}
    for uri in uris:
        groups.setdefault(plan.weights(uri, store).base, []).append(uri)
    return list(groups.values())


def connect_teacher(plan: Plan, uri: str) -> RemoteEngine:
    """The engine of a served teacher, which is still the one that the plan was made with."""
    from camopd.inputs.served import Probe, connect

    names = [branch.name for branch in plan.recipe.branches if plan.teacher_uri(branch) == uri]
    expected = Probe.from_record(plan.served[plan.content_ids[f"teacher/{names[0]}"]])
    return connect(uri, plan.recipe, vocab_size=plan.vocab_size, longest=plan.max_length, expected=expected)


@contextmanager
def engine_at(plan: Plan, uri: str, store: Store) -> Iterator[Engine]:
    """The recipe's engine with the model at ``uri``, closed at the end: what it held on the device is free again."""
    with engines_at(plan, [uri], store) as engines:
        yield engines[uri]


@contextmanager
def engines_at(plan: Plan, uris: Iterable[str], store: Store) -> Iterator[dict[str, Engine]]:
    """The recipe's engine with several models over one base, by location, closed at the end."""
    recipe = plan.recipe
    uris = list(uris)
    if is_served(uris[0]):
        with closing(connect_teacher(plan, uris[0])) as remote:
            yield {uris[0]: remote}
        return
    for place in plan.places(uris, store):
        store.prefetch(place)
    if recipe.rollout.replicas == 1:  # copies import it each for itself
        import_engine(recipe.rollout.engine)
    weights = {uri: plan.weights(uri, store) for uri in uris}
    (base,) = {own.base for own in weights.values()}
    with open_engines(
        recipe.rollout.engine,
        store.fetch(base),
        {uri: store.fetch(own.adapter) if own.adapter else None for uri, own in weights.items()},
        **plan.engine_limits,
        max_length=plan.max_length,
        vllm=recipe.vllm,
        replicas=recipe.rollout.replicas,
    ) as engines:
        yield engines
