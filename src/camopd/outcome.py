"""What became of a run, in words that say what to do next: for the pipeline's exit handler and whoever comes back later.

KFP tells its exit handler only that something failed, so the reason is the run's own record: ``stop.json`` when the run stopped
itself, ``error.json`` when a stage raised, and the manifests for what is finished.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from camopd import claims
from camopd import plan as layout
from camopd.attempts import TERMINATED, attempt, cut_offs, heeding_sigterm, remedy, silent_stages
from camopd.config import load_recipe
from camopd.errors import CamopdError, UnhealthyRunError
from camopd.evaluate import EVALUATION, REPORT, evaluation_uri, headline_table
from camopd.ledger import Part, in_words, ledger, parts_of
from camopd.past import known
from camopd.plan import Plan
from camopd.promote import release_uri
from camopd.rounds import record_stop, stop_reason
from camopd.store import Store, join, parent

if TYPE_CHECKING:
    from rich.console import Console

AGAIN = "Start it again with the same values: finished stages are not done twice."


class Recorded(contextlib.AbstractContextManager[None]):
    """Writes down that a stage begins and ends, and why it failed, and lets it fail.

    Args:
        run_uri: the run's prefix, which takes ``error.json``.
        stage: one of the seven words.
        output_uri: prefix that the stage writes; once it is finished, the record is out of date.
        store: where to write.
        round_number: the round, where the stage belongs to one: an unhealthy one stops the run.
        told: whether begin and end are written down; not those of a stage that only looks again once it has done its work.
    """

    def __init__(
        self, run_uri: str, *, stage: str, output_uri: str, store: Store, round_number: int = 0, told: bool = True
    ) -> None:
        self._run_uri, self._stage, self._output_uri, self._store = run_uri, stage, output_uri, store
        self._round_number = round_number
        self._attempt = attempt(run_uri, stage, output_uri, store) if told else heeding_sigterm()

    def __enter__(self) -> None:
        self._attempt.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._record(error)
        finally:
            self._attempt.__exit__(None, None, None)

    def _record(self, error: BaseException | None) -> None:
        if error is None:
            return
        record = {"stage": self._stage, "output": self._output_uri, "reason": reason_of(error), "time": time.time()}
        with contextlib.suppress(CamopdError, OSError):  # what fails may be the store itself
            self._store.write(error_uri(self._run_uri), json.dumps(record, indent=1, ensure_ascii=False).encode())
        if isinstance(error, UnhealthyRunError) and self._round_number:
            record_stop(self._run_uri, stage=self._stage, round_number=self._round_number, reason=str(error), store=self._store)


def reason_of(error: BaseException) -> str:
    """Why something failed, in words fit to be kept: an unexpected error's text may quote data, so only our own sentences."""
    if isinstance(error, SystemExit) and error.code == TERMINATED:
        return "ended by SIGTERM, as when a pod is evicted or a run is stopped"
    return str(error) if isinstance(error, CamopdError) else f"{type(error).__name__}, see the log of this step"


@dataclass(frozen=True)
class Result:
    """What a finished run has to show.

    Attributes:
        evaluation: content of evaluation.json.
        report: location of report.html.
        release: content of release.json; None when the gate said no and promotion was not asked.
    """

    evaluation: Mapping[str, Any]
    report: str
    release: Mapping[str, Any] | None


def result_of(plan: Plan, store: Store) -> Result | None:
    """The result of a run whose every stage is done for the recipe as it is now, else None."""
    if known(layout.checkpoint_uri(plan.rounds[-1]), store) is None:
        return None
    uri = evaluation_uri(plan, store)
    if store.manifest(uri) is None:
        return None
    evaluation, report = json.loads(store.read(join(uri, EVALUATION))), join(uri, REPORT)
    released = join(release_uri(plan, store), "release.json")
    if store.stat(released) is None:
        return None if evaluation["decision"]["passed"] else Result(evaluation, report, None)
    return Result(evaluation, report, json.loads(store.read(released)))


def registered(release: Mapping[str, Any] | None) -> str:
    """A sentence on what promotion did."""
    if release is None:
        return "nothing, for the gate said no"
    if release["version"] is None:
        return f"nothing ({release['status']}: {'; '.join(release['reasons'])})"
    sentence = f"{release['model_name']} version {release['version']}, alias {release['alias']} ({release['status']})"
    return f"{sentence}; {release['reasons'][0]}" if release["status"] == "candidate" else sentence


def print_result(result: Result, plan: Plan, console: Console, store: Store) -> None:
    """The table of scores and shares, the gate's decision, where everything lies, and what it took."""
    from rich.table import Table

    header, *rows = headline_table(result.evaluation)
    table = Table(*header, title="Score with 95 % interval")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    decision = result.evaluation["decision"]
    console.print("Gate:     " + ("passed" if decision["passed"] else "not passed"))
    for reason in decision["reasons"]:
        console.print(f"          {reason}")
    console.print(f"Run:      {plan.run_uri}")
    console.print(f"Report:   {result.report}")
    console.print(f"Registry: {registered(result.release)}")
    if parts := parts_of(plan, store):
        evaluated = Part("evaluate", store.require(parent(result.report)))
        console.print(f"Took:     {in_words(ledger([*parts, evaluated])[-1])}")


def error_uri(run_uri: str) -> str:
    return join(run_uri, "error.json")


def job_uri(recipe: str, output_uri: str, job: str) -> str:
    """Where ``prepare`` leaves word, for the exit handler, of what the pipeline run ``job`` is about.

    Both know the recipe and the output alone to find it by, since other values may be what is wrong. Raises InputError.
    """
    return job_place(load_recipe(recipe, {"output_uri": output_uri}).output, job)


def job_place(output: str, job: str) -> str:
    return join(output, "jobs", f"{job}.json")


@contextlib.contextmanager
def job_record(recipe: str, output_uri: str, job: str, *, stage: str, store: Store) -> Iterator[dict[str, Any]]:
    """Give the record of a pipeline run, as far as it has come; on an error of ours it gets the ``reason`` and the stage.

    Keys: ``run``, the recovery's prefix; ``claim``, its claim's (camopd.claims); ``models``, what names in a registry stand
    for; ``skipped``, why a tick ends here; ``beside``, another run that is at work on the model. Written when there is a job.
    """
    record: dict[str, Any] = {}
    if job:
        with contextlib.suppress(CamopdError):  # what is wrong with the recipe or the store is said where it is used
            record = _read(job_uri(recipe, output_uri, job), store)
    try:
        yield record
    except CamopdError as error:
        record |= {"reason": str(error), "stage": stage}
        raise
    finally:
        if job and record:
            with contextlib.suppress(CamopdError, OSError):  # no output to write to: the exit handler finds the same reason
                store.write(job_uri(recipe, output_uri, job), json.dumps(record, indent=1, ensure_ascii=False).encode())


@dataclass(frozen=True)
class Ending:
    """How a run ended or where it stands.

    Attributes:
        title: ``finished``, ``failed in train``, ...: goes on from "The recovery".
        lines: what there is to say, by name; ``Reason`` and ``Next`` among them.
        succeeded: whether every stage did its work.
        run_uri: the run's prefix; empty when there is none, since ``prepare`` failed.
        place: prefix that takes the record that it was told; the run's own, else what there is instead.
        moment: when it failed, in seconds since 1970, as far as the run's records tell: a later failure is another one.
        result: of a run whose every stage is done.
        quiet: whether it is not worth a message, as the end of a tick that found nothing new.
    """

    title: str
    lines: Mapping[str, str]
    succeeded: bool
    run_uri: str = ""
    place: str = ""
    moment: float = 0.0
    result: Result | None = None
    quiet: bool = False

    def page(self) -> str:
        """Markdown."""
        said = [f"## The recovery {self.title}", *(f"**{name}:** {text}" for name, text in self.lines.items())]
        return "\n\n".join(said) + "\n"


def ending_of_job(recipe: str, output_uri: str, job: str, *, succeeded: bool, store: Store) -> Ending:
    """How the pipeline run ``job`` ended, also when ``prepare`` failed and there is no run folder.

    Args:
        recipe: as given to the run form.
        output_uri: as given to the run form.
        job: id of the pipeline run.
        succeeded: whether all its tasks did.
        store: where the records lie.
    """
    place = ""
    try:
        place = parent(job_uri(recipe, output_uri, job))
        record = _read(job_uri(recipe, output_uri, job), store)
    except CamopdError as error:
        record = {"reason": str(error)}
    if "skipped" in record:
        return Ending("was not started", {"Schedule": record["skipped"]}, succeeded=True, place=place, quiet=True)
    if "run" in record:
        beside = {"Beside it": f"run {record['beside']} was at work on this model, and goes on"} if "beside" in record else {}
        return ending_of(record["run"], succeeded=succeeded, store=store, more=beside)
    reason = record.get("reason", "prepare left no word; read the log of its task")
    lines = {"Reason": reason, "Next": "Mend what is named and start it again; nothing was spent."}
    return Ending(f"failed in {record.get('stage', 'prepare')}", lines, succeeded=False, place=place)


def claim_for_job(plan: Plan, job: str, record: dict[str, Any], store: Store) -> None:
    """Claim the run's model for a pipeline run, also where another is at work on it, and keep in the job's record which."""
    record["claim"] = claims.claims_uri(plan.recipe.output, plan.content_ids["student"])
    other = claims.take(record["claim"], job, store, by_hand=True)
    if other is not None:
        record["beside"] = other.job


def release_job(recipe: str, output_uri: str, job: str, *, store: Store) -> None:
    """Give the model back that a pipeline run has claimed. What fails is left to the claim's end."""
    with contextlib.suppress(CamopdError):
        claim = _read(job_uri(recipe, output_uri, job), store).get("claim")
        if claim is not None:
            claims.release(claim, job, store)


def describe(run_uri: str, *, succeeded: bool, store: Store) -> str:
    """Markdown on a run: how it ended, where it stands, and what to do next."""
    return ending_of(run_uri, succeeded=succeeded, store=store).page()


def ending_of(run_uri: str, *, succeeded: bool, store: Store, more: Mapping[str, str] | None = None) -> Ending:
    """How a run ended, where it stands, and what to do next; ``more`` are lines of the caller's."""
    plan = Plan.load(store, run_uri)
    lines = dict(more or {})
    lines |= {"Run": f"`{run_uri}`", "Rounds finished": f"{_rounds_finished(plan, store)} of {plan.recipe.num_rounds}"}
    if silent := cut_offs(run_uri, store):
        counted = ", ".join(f"{count} of {name}" for name, count in silent.items())
        lines["Attempts that ended without a word"] = f"{counted} (killed, exit 137, often for lack of memory)"
    stopped = stop_reason(run_uri, store=store)
    if stopped is not None:
        fix = f"Change the setting that the reason names; to try again as it is, remove `{layout.stop_uri(run_uri)}`."
        return Ending("stopped itself", lines | {"Reason": stopped, "Next": fix}, succeeded=False, run_uri=run_uri)
    if succeeded:
        found = result_of(plan, store)
        lines |= _conclusion(found) if found else {}
        return Ending("finished", lines, succeeded=True, run_uri=run_uri, result=found)
    record = _read(error_uri(run_uri), store)
    if record and store.manifest(record["output"]) is None:
        lines |= {"Where": f"`{record['output']}`", "Reason": record["reason"], "Next": f"Mend what the reason names. {AGAIN}"}
        title, moment = f"failed in {record['stage']}", float(record["time"])
        return Ending(title, lines, succeeded=False, run_uri=run_uri, moment=moment)
    for output, stage in silent_stages(run_uri, store).items():
        reason = f"{stage} began and left no word, as when it is killed (exit 137, often for lack of memory)"
        lines |= {"Where": f"`{output}`", "Reason": reason, "Next": f"{AGAIN} Where it happens again, {remedy(stage)}."}
        return Ending(f"was cut off in {stage}", lines, succeeded=False, run_uri=run_uri)
    lines |= {"Reason": "no stage left word: killed, evicted or out of memory", "Next": AGAIN}
    return Ending("was cut off", lines, succeeded=False, run_uri=run_uri)


def _conclusion(found: Result) -> dict[str, str]:
    verdict = "passed" if found.evaluation["decision"]["passed"] else "not passed"
    reasons = "; ".join(found.evaluation["decision"]["reasons"])
    return {"Gate": f"{verdict} ({reasons})", "Report": f"`{found.report}`", "Registry": registered(found.release)}


def _rounds_finished(plan: Plan, store: Store) -> int:
    return sum(known(layout.checkpoint_uri(uri), store) is not None for uri in plan.rounds)


def _read(uri: str, store: Store) -> dict[str, Any]:
    return json.loads(store.read(uri)) if store.stat(uri) is not None else {}
