"""What a pipeline run has written to its store, as far as it can be read from here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console

from camopd import outcome
from camopd import plan as layout
from camopd.config import AS_IN_RECIPE, load_recipe
from camopd.config import OUTPUT as OUTPUT_VARIABLE
from camopd.errors import CamopdError, InputError, MissingError
from camopd.kubeflow.form import OUTPUT, RECIPE
from camopd.kubeflow.spec import Spec, inputs_of, variable_of
from camopd.past import known
from camopd.plan import Plan
from camopd.recipe.parameters import FORM_FIELDS, ROLE_FIELDS
from camopd.store import Store

Answer = TypeVar("Answer")


@dataclass
class Records:
    """The records of one pipeline run.

    Attributes:
        recipe: as given to the run form.
        output: the run form's output.
        job: id of the pipeline run.
        store: where to look.
        num_rounds: that the recipe asks for; 0 where it cannot be read here.
        trouble: why there is no more looking; empty while there is.
        plan: of the recovery, once prepare has made it.
    """

    recipe: str
    output: str
    job: str
    store: Store
    num_rounds: int = 0
    trouble: str = ""
    plan: Plan | None = None
    _finished: int = field(default=0, repr=False)

    @classmethod
    def of(cls, run: Any, spec: Spec, store: Store) -> Records:
        """Those of a run of the API."""
        given = dict((run.runtime_config.parameters if run.runtime_config else None) or {})
        form = {name: given.get(name, entry.get("defaultValue")) for name, entry in inputs_of(spec).items()}
        output = str(form.get(OUTPUT, ""))
        if output == AS_IN_RECIPE:
            output = variable_of(spec, "prepare", OUTPUT_VARIABLE) or output
        records = cls(str(form.get(RECIPE, "")), output, str(run.run_id), store)
        known = {name: value for name, value in form.items() if name in FORM_FIELDS or name in ROLE_FIELDS}
        try:
            recipe = load_recipe(
                records.recipe, {name: value for name, value in known.items() if value is not True}, store=store
            )
            records.num_rounds = recipe.num_rounds
        except CamopdError as error:
            records.trouble = str(error.problems[0]) if isinstance(error, InputError) else str(error)
        return records

    def finished(self) -> int | None:
        """Rounds that have their checkpoint; None where that cannot be told."""
        return self._look(self._count)

    def page(self, *, succeeded: bool) -> str:
        """What became of the run, in Markdown; empty where that cannot be told."""
        job = (self.recipe, self.output, self.job)

        def told() -> str:
            self.store.stat(outcome.job_uri(*job))  # or the page would take a store that does not answer for the run's failure
            return outcome.ending_of_job(*job, succeeded=succeeded, store=self.store).page()

        return self._look(told) or ""

    def show_result(self, console: Console) -> bool:
        """Print the result of a run whose every stage is done; False where there is none, or it cannot be read."""
        return bool(self._look(lambda: self._show(console)))

    def _count(self) -> int | None:
        if self.plan is None:
            word = json.loads(self.store.read(outcome.job_uri(self.recipe, self.output, self.job)))
            self.plan = Plan.load(self.store, word["run"]) if "run" in word else None
        if self.plan is None:
            return None
        for uri in self.plan.rounds[self._finished :]:
            if known(layout.checkpoint_uri(uri), self.store) is None:
                break
            self._finished += 1
        return self._finished

    def _show(self, console: Console) -> bool:
        self._count()
        result = outcome.result_of(self.plan, self.store) if self.plan else None
        if result is None or self.plan is None:
            return False
        outcome.print_result(result, self.plan, console, self.store)
        return True

    def _look(self, ask: Callable[[], Answer]) -> Answer | None:
        """A store that fails is not asked again, since each failure takes its time; what is not there yet is no failure."""
        if self.trouble:
            return None
        try:
            return ask()
        except MissingError:
            return None
        except CamopdError as error:
            self.trouble = str(error)
            return None
