"""A stage and what belongs to it: a record when it fails, and tracking. The components and the command line call these.

The stages themselves know neither MLflow nor Kubeflow. Tracking follows the store (camopd.tracking), so a server that is down
costs a log line here and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from camopd import announce, claims, rounds
from camopd import outcome as outcomes
from camopd import plan as layout
from camopd.config import load_recipe
from camopd.errors import UnhealthyRunError
from camopd.estimate.pods import check_pods
from camopd.estimate.work import scored_branches
from camopd.outcome import Recorded
from camopd.past import known
from camopd.plan import Plan
from camopd.recipe.parameters import AS_IN_RECIPE
from camopd.shards import place_of, shard_uri, shard_uris
from camopd.store import Manifest, Store, join

if TYPE_CHECKING:
    from camopd.tracking import Tracker


@dataclass(frozen=True)
class Done:
    """What a finished stage has to show.

    Attributes:
        uri: the prefix it wrote; the run's own for prepare.
        metrics: headline numbers, all finite.
        document: the page for people: settings (prepare), report (evaluate), release (promote).
        rounds: the turns of the pipeline's loop (prepare): each round's prefix; colocated the last one's, which stands for all.
        score_uris: prefixes of the teachers' scores, one a branch and shard (rollout, gather).
        decision: "pass" or "fail" (evaluate).
        release: name, version, alias and status (promote).
    """

    uri: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    document: str = ""
    rounds: list[str] = field(default_factory=list)
    score_uris: list[str] = field(default_factory=list)
    decision: str = ""
    release: Mapping[str, Any] = field(default_factory=dict)


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers; KFP's Metrics take nothing else."""
    return {name: float(v) for name, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}


# --- Stages ---------------------------------------------------------------------------------------------------------------


def resolve(
    recipe: str, parameters: Mapping[str, Any], schedule: Mapping[str, Any], *, job: str, store: Store | None = None
) -> Literal["go", "skip"]:
    """What a pipeline run that a schedule has started is to do: see ``camopd.ticks``. One that somebody has started goes on.

    Args:
        recipe: name, path, URI or text of the recipe.
        parameters: values from a run form that go before the recipe's.
        schedule: ``schedule_name``, ``schedule_max_attempts`` and ``schedule_again_for_new_teachers`` of the run form.
        job: id of the pipeline run.
        store: where to read and write.

    Raises:
        InputError: the model cannot be found, or the recipe is wrong.
        ScheduleError: the model was tried as often as it may be; the first tick that finds so says it.
    """
    from camopd import ticks

    if schedule["schedule_name"] in ticks.NO_SCHEDULE:
        return "go"
    wanted = ticks.Schedule(**{name.removeprefix("schedule_"): value for name, value in schedule.items()})
    return "go" if ticks.run(wanted, recipe, parameters, job, store or Store()).goes_on else "skip"


def prepare(
    recipe: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    job: str = "",
    schedule: str = "",
    store: Store | None = None,
) -> Done:
    """Load the recipe, run every check, write the plan, remember where the alias points, and start tracking.

    Args:
        recipe: name, path, URI or text of the recipe.
        parameters: values from a run form or the command line that go before the recipe's.
        job: id of the pipeline run; ``outcome`` finds this recovery by it, and the model is claimed for it.
        schedule: name of the schedule that has started it.
        store: where to read and write.

    Raises:
        InputError: every problem of recipe, parameters and inputs, at once.
    """
    from camopd import prepare as stage
    from camopd import tracking
    from camopd.inputs.registered import resolve_models

    store, parameters = store or Store(), parameters or {}
    started_by = {"KFP_RUN_ID": job, "CAMOPD_SCHEDULE": "" if schedule == "none" else schedule}
    for variable, value in started_by.items():
        if value:
            os.environ.setdefault(variable, value)  # tracking tags the attempt with it
    output_uri = parameters.get("output_uri", AS_IN_RECIPE)
    with outcomes.job_record(recipe, output_uri, job, stage="prepare", store=store) as record:
        loaded = load_recipe(recipe, parameters)
        if job:
            check_pods(loaded, scored_branches(loaded))
        tracker = tracking.tracker_for(loaded.tracking)
        resolved = resolve_models(loaded, tracker, store, record.get("models"))
        plan = stage.run(resolved.recipe, store=store, earlier=resolved.problems)
        record["run"] = plan.run_uri
        if job:
            outcomes.claim_for_job(plan, job, record, store)
    tracking.alias_snapshot(plan.run_uri, store=store, tracker=tracker)
    tracking.sync(plan.run_uri, store=store, tracker=tracker)
    plan_uri = layout.plan_uri(plan.run_uri)
    settings = store.read(join(plan.run_uri, "settings.md")).decode()
    turns = plan.rounds[-1:] if plan.recipe.execution == "colocated" else plan.rounds
    return Done(plan.run_uri, headline(store.require(plan_uri).metrics), settings, rounds=turns)


def begin(round_uri: str, *, job: str = "", store: Store | None = None) -> str:
    """What a turn of the pipeline's loop is to do: see ``camopd.rounds.begin_turn``. The run's claim is renewed."""
    store = store or Store()
    turn = rounds.begin_turn(round_uri, store=store)
    _renew_claim(Plan.load(store, layout.run_and_round(round_uri)[0]), job, store)
    return turn


def _renew_claim(plan: Plan, job: str, store: Store) -> None:
    if job:
        claims.renew(claims.claims_uri(plan.recipe.output, plan.content_ids["student"]), job, store)


def spread(round_uri: str, *, store: Store | None = None) -> list[str]:
    """The prefixes of a round's sampling that may be worked on side by side: ``recipe.shards`` of them, or one.

    One where nothing is left to sample, and where teachers have yet to make up prompts: several would make the same ones.
    """
    store = store or Store()
    run_uri, _ = layout.run_and_round(round_uri)
    recipe = Plan.load(store, run_uri).recipe
    made_up = [layout.teacher_prompts_uri(run_uri, b.name) for b in recipe.branches if b.teacher_prompts and b.steps]
    count = recipe.shards if all(store.manifest(uri) for uri in made_up) else 1
    (first, *rest) = shard_uris(layout.rollout_uri(round_uri), count, store)
    return [first, *rest] if rest else [round_uri]


def rollout(round_uri: str, *, store: Store | None = None) -> Done:
    """Sample a round, or one shard of it.

    Args:
        round_uri: as ``spread`` returns it.
        store: where to read and write.
    """
    from camopd import rollout as stage

    store, place = store or Store(), place_of(round_uri)
    uri = shard_uri(layout.rollout_uri(place.round_uri), place.shard)
    with _recorded(place.round_uri, "rollout", uri, store):
        manifest = stage.run(place.round_uri, shard=place.shard, store=store)
    score_uris = [] if place.shard else _score_uris(place.round_uri, 1, store)
    return Done(uri, headline(manifest.metrics), score_uris=score_uris)


def gather(round_uri: str, *, store: Store | None = None) -> Done:
    """Make the round's rollout of its shards, where it is not finished. Its scores are to be done in as many."""
    from camopd import rollout as stage

    store = store or Store()
    run_uri, _ = layout.run_and_round(round_uri)
    uri, count = layout.rollout_uri(round_uri), Plan.load(store, run_uri).recipe.shards
    with _recorded(round_uri, "rollout", uri, store):
        manifest = store.manifest(uri) or stage.join_shards(round_uri, store=store)
    return Done(uri, headline(manifest.metrics), score_uris=_score_uris(round_uri, count, store))


def _score_uris(round_uri: str, count: int, store: Store) -> list[str]:
    run_uri, number = layout.run_and_round(round_uri)
    wholes = [layout.score_uri(round_uri, branch.name) for branch in Plan.load(store, run_uri).active_branches(number)]
    return [uri for whole in wholes for uri in shard_uris(whole, count, store)]


def score(score_uri: str, *, store: Store | None = None) -> Done:
    """Let a branch's teacher score a round's samples, or one shard of them.

    Args:
        score_uri: ``<round>/score-<branch>``, or a shard's prefix as ``gather`` returns it.
        store: where to read and write.
    """
    from camopd import score as stage

    store, place = store or Store(), place_of(score_uri)
    with _recorded(place.round_uri, "score", score_uri, store):
        manifest = stage.run(place.round_uri, place.branch, shard=place.shard, store=store)
    return Done(score_uri, headline(manifest.metrics))


def select(round_uri: str, *, store: Store | None = None) -> Done:
    from camopd import score as scoring
    from camopd import select as stage

    store = store or Store()
    uri = layout.select_uri(round_uri)
    run_uri, number = layout.run_and_round(round_uri)
    plan = Plan.load(store, run_uri)
    with _recorded(round_uri, "select", uri, store):
        for branch in plan.active_branches(number) if plan.recipe.shards > 1 else ():
            if store.manifest(layout.score_uri(round_uri, branch.name)) is None:
                scoring.join_shards(round_uri, branch.name, store=store)
        return Done(uri, headline(stage.run(round_uri, store=store).metrics))


def train(round_uri: str, *, job: str | None = None, store: Store | None = None) -> Done:
    """The round's updates: in this process and those that it starts, or with ``job`` (camopd.trainjob) in pods of their own."""
    from camopd import tracking

    store = store or Store()
    uri = layout.checkpoint_uri(round_uri)
    with _recorded(round_uri, "train", uri, store):
        manifest = _train_in_pods(round_uri, job, store) if job else _train_here(round_uri, store)
    run_uri, _ = layout.run_and_round(round_uri)
    tracking.sync(run_uri, store=store, tracker=_tracker(run_uri, store))
    return Done(uri, headline(manifest.metrics))


def _train_here(round_uri: str, store: Store) -> Manifest:
    from camopd import train as stage

    return stage.run(round_uri, store=store)


def _train_in_pods(round_uri: str, job: str, store: Store) -> Manifest:
    from camopd.trainjob import launch_and_follow

    return launch_and_follow(job, round_uri, store=store)


def recover(round_uri: str, *, job: str = "", store: Store | None = None) -> Done:
    """Every round up to this one in this process, from the first that is not finished: ``execution = "colocated"``.

    Args:
        round_uri: the run's last round.
        job: id of the pipeline run, which says that it is at work as each round begins.
        store: where to read and write.

    Raises:
        UnhealthyRunError: the run stopped itself, now or in an earlier call.
    """
    store = store or Store()
    run_uri, _ = layout.run_and_round(round_uri)
    _colocated(Plan.load(store, run_uri), store, job)
    uri = layout.checkpoint_uri(round_uri)
    return Done(uri, headline((known(uri, store) or store.require(uri)).metrics))


def evaluate(run_uri: str, *, store: Store | None = None) -> Done:
    from camopd import evaluate as stage
    from camopd import tracking

    store = store or Store()
    uri = stage.evaluation_uri(Plan.load(store, run_uri), store)
    with Recorded(run_uri, stage="evaluate", output_uri=uri, store=store):
        stage.run(run_uri, store=store)
    tracking.sync(run_uri, store=store, tracker=_tracker(run_uri, store))
    result = json.loads(store.read(join(uri, "evaluation.json")))
    report = store.read(join(uri, "report.html")).decode()
    return Done(uri, headline(result["headline"]), report, decision="pass" if result["decision"]["passed"] else "fail")


def promote(run_uri: str, *, store: Store | None = None) -> Done:
    from camopd import promote as stage
    from camopd import tracking

    store = store or Store()
    tracker = _tracker(run_uri, store)
    with Recorded(run_uri, stage="promote", output_uri=join(run_uri, "release"), store=store, told=False):
        release = asdict(stage.run(run_uri, store=store, tracker=tracker))
    tracking.sync(run_uri, store=store, tracker=tracker)
    return Done(run_uri, document=json.dumps(release, indent=1, ensure_ascii=False) + "\n", release=release)


def _recorded(round_uri: str, stage: str, output_uri: str, store: Store) -> Recorded:
    run_uri, number = layout.run_and_round(round_uri)
    return Recorded(run_uri, stage=stage, output_uri=output_uri, store=store, round_number=number)


def _tracker(run_uri: str, store: Store) -> Tracker:
    from camopd import tracking

    return tracking.tracker_for(Plan.load(store, run_uri).recipe.tracking)


# --- The whole ------------------------------------------------------------------------------------------------------------


def one_round(round_uri: str, *, store: Store | None = None) -> None:
    """Roll out, score every branch, select and train; shards one after another."""
    store = store or Store()
    _prefetch(round_uri, store)
    for uri in spread(round_uri, store=store):
        rollout(uri, store=store)
    for uri in gather(round_uri, store=store).score_uris:
        score(uri, store=store)
    select(round_uri, store=store)
    train(round_uri, store=store)


def _prefetch(round_uri: str, store: Store) -> None:
    """Begin to get the round's models, the student first: the teachers come while it samples.

    Not for vLLM, which forks: a lock that a thread holds at that moment would never be free again.
    """
    run_uri, number = layout.run_and_round(round_uri)
    plan = Plan.load(store, run_uri)
    if plan.recipe.rollout.engine == "transformers":
        teachers = [
            plan.teacher_uri(branch)
            for branch in plan.active_branches(number)
            if store.manifest(layout.score_uri(round_uri, branch.name)) is None
        ]
        for place in plan.places((plan.student_uri(number), *teachers), store):
            store.prefetch(place)


def run(recipe: str, parameters: Mapping[str, Any] | None = None, *, store: Store | None = None) -> Done:
    """All seven stages in this process, going on where an earlier call was stopped. Returns what ``promote`` did.

    With ``execution = "colocated"`` the rounds are camopd.recover's: models stay in memory and every update has a fresh batch.

    Raises:
        InputError: bad input, before anything is started.
        UnhealthyRunError: the run stopped itself, now or in an earlier call.
    """
    store = store or Store()
    with announce.telling(store) as record:
        prepared = prepare(recipe, parameters, store=store)
        record["run"] = prepared.uri
        plan = Plan.load(store, prepared.uri)
        train_all = _colocated if plan.recipe.execution == "colocated" else _staged
        train_all(plan, store)
        evaluate(prepared.uri, store=store)
        return promote(prepared.uri, store=store)


def _staged(plan: Plan, store: Store) -> None:
    for round_uri in plan.rounds:
        if _may_start(round_uri, plan, store):
            one_round(round_uri, store=store)


def _colocated(plan: Plan, store: Store, job: str = "") -> None:
    from camopd import tracking
    from camopd.recover import Session

    tracker = tracking.tracker_for(plan.recipe.tracking)
    session: Session | None = None
    with contextlib.ExitStack() as opened:
        for number, round_uri in enumerate(plan.rounds, 1):
            if not _may_start(round_uri, plan, store):
                session = None  # another process may have finished it meanwhile: what is in memory is not its checkpoint
                opened.close()
                continue
            _renew_claim(plan, job, store)
            with _recorded(round_uri, "train", layout.checkpoint_uri(round_uri), store):
                session = session or opened.enter_context(contextlib.closing(Session(plan, number, store)))
                session.round(number)
            tracking.sync(plan.run_uri, store=store, tracker=tracker)


def _may_start(round_uri: str, plan: Plan, store: Store) -> bool:
    """Whether a round is to be done. Raises UnhealthyRunError when the run has stopped itself."""
    state = rounds.begin(round_uri, store=store)
    if state == "stop":
        raise UnhealthyRunError(outcomes.describe(plan.run_uri, succeeded=False, store=store))
    return state == "go"


def outcome(recipe: str, output_uri: str, *, job: str, succeeded: bool, store: Store | None = None) -> str:
    """What became of a pipeline run, as Markdown, from the run's own records: KFP's message is empty on a cluster.

    It is at work on its model no more, and gives it back. The webhook is told the same as the page, once.

    Args:
        recipe: as given to the run form.
        output_uri: as given to the run form.
        job: id of the pipeline run.
        succeeded: KFP's word.
        store: where to read.
    """
    store = store or Store()
    outcomes.release_job(recipe, output_uri, job, store=store)
    ending = outcomes.ending_of_job(recipe, output_uri, job, succeeded=succeeded, store=store)
    announce.tell(ending, store=store, job=job)
    return ending.page()
