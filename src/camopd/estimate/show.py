"""The estimate for people, as tables, and for programs, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from camopd.config import Recipe
from camopd.estimate.assumptions import GPUS, Assumptions
from camopd.estimate.pods import ControlPlane, by_shards
from camopd.estimate.shapes import ModelShape
from camopd.estimate.sources import LengthOptions, mean_lengths, model_shapes
from camopd.estimate.total import Estimate, advice, at_limits, estimate
from camopd.estimate.work import scored_branches
from camopd.store import Store

if TYPE_CHECKING:
    from rich.console import Console


PODS = ("shards", "pods a round", "pods", "Workflow object", "rounds that fit")


@dataclass(frozen=True)
class Planned:
    """An estimate with what it rests on.

    Attributes:
        recipe: the recipe.
        given: assumptions.
        shapes: by ``student`` and branch.
        configs: where each shape comes from.
        lengths: where each branch's lengths come from.
        mean: at mean lengths.
        limits: with every prompt and response as long as the recipe allows.
        control_plane: what one number of shards or another asks of the cluster.
    """

    recipe: Recipe
    given: Assumptions
    shapes: Mapping[str, ModelShape]
    configs: Mapping[str, str]
    lengths: Mapping[str, str]
    mean: Estimate
    limits: Estimate
    control_plane: Sequence[ControlPlane]

    def to_record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "recipe": self.recipe.name,
            "assumptions": asdict(self.given),
            "models": {
                name: asdict(shape) | {"parameters": shape.parameters, "config": self.configs[name]}
                for name, shape in self.shapes.items()
            },
            "lengths": self.lengths,
            "mean": self.mean.to_record(),
            "limits": self.limits.to_record(),
            "control_plane": [asdict(own) for own in self.control_plane],
            "notes": advice(self.recipe, self.shapes, self.mean, self.given),
        }


def planned(recipe: Recipe, given: Assumptions, configs: Mapping[str, str], lengths: LengthOptions, store: Store) -> Planned:
    """Estimate a recipe's run at mean lengths and at its limits.

    Args:
        recipe: the recipe.
        given: assumptions.
        configs: config.json by ``student`` or branch, where it is not found by itself.
        lengths: what is known of lengths.
        store: reads the run to measure, if one is named.

    Raises:
        InputError: an input that makes no sense, or a run that cannot be run.
    """
    shapes, origins = model_shapes(recipe, configs)
    means, said = mean_lengths(recipe, lengths, store)
    mean = estimate(recipe, shapes, means, given)
    limits = estimate(recipe, shapes, at_limits(recipe, means), given)
    return Planned(recipe, given, shapes, origins, said, mean, limits, by_shards(recipe, scored_branches(recipe)))


# --- For people -----------------------------------------------------------------------------------------------------------


def print_plan(plan: Planned, console: Console, *, gpu_hours: float | None = None) -> None:
    """Print everything.

    Args:
        plan: what to print.
        console: where.
        gpu_hours: GPU-hours that such a run is known to have taken: the share of peak that would explain them is said.
    """
    for line in assumed(plan):
        console.print(line)
    for title, header, rows in tables(plan):
        _print_table(console, title, header, rows)
    for line in totals(plan, gpu_hours):
        console.print(line)


def _print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    words = {"model", "stage", "branch", "config.json", "divided", "on each as it is"}
    for name in header:
        table.add_column(name, justify="left" if name in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def tables(plan: Planned) -> list[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    """Title, header and rows of each."""
    tokens = ("branch", "samples", "prompt", "response", "kept", "sampled", "forward", "backward")
    return [
        ("Models", ("model", "parameters", "weights", "config.json"), model_rows(plan)),
        ("Tokens: means, and sums over the run", tokens, token_rows(plan)),
        (
            "GPU memory, at the longest prompt and response",
            ("stage", "GPUs", "on each", "divided", "on each as it is"),
            memory_rows(plan),
        ),
        ("Time", ("stage", "branch", "tokens", "PFLOP", "GPU-hours", "at the limits"), work_rows(plan)),
        ("Written to the store", ("stage", "bytes", "at the limits"), store_rows(plan)),
        *([("Pods of the whole run, drivers included", PODS, pod_rows(plan))] if plan.control_plane else []),
    ]


def assumed(plan: Planned) -> list[str]:
    """What the estimate takes for granted."""
    given, card = plan.given, GPUS[plan.given.gpu]
    half = 1 if given.dtype == "bfloat16" else 0.5
    engine = given.engine or plan.recipe.rollout.engine
    return [
        f"Recipe {plan.recipe.name}: {plan.recipe.method}, {plan.recipe.num_rounds} rounds of {plan.recipe.steps_per_round} "
        f"steps, {plan.recipe.execution}",
        f"Assumed: {given.gpu} of {given.gpu_memory or card.memory:g} GB (--gpu-memory), {given.peak or card.peak * half:g} "
        f"TFLOP/s (--peak), {given.bandwidth or card.bandwidth:g} TB/s (--bandwidth)",
        f"         {given.peak_share:.2f} of the peak is reached (--peak-share), {given.bandwidth_share:.2f} of the bandwidth "
        f"in decoding (--bandwidth-share), {given.reserve:.2f} of the memory stays free (--reserve)",
        f"         {given.dtype} (--dtype), engine {engine} (--engine), activation checkpointing "
        f"{'on' if given.checkpointing else 'off'} (--checkpointing), {given.start_minutes:g} minutes until a pod computes "
        "(--start-minutes)",
        *(
            f"         lengths of {', '.join(name for name, own in plan.lengths.items() if own == origin)}: {origin} "
            "(--prompt-tokens, --response-tokens, --kept, --from)"
            for origin in dict.fromkeys(plan.lengths.values())
        ),
    ]


def model_rows(plan: Planned) -> list[list[str]]:
    return [
        [name, f"{shape.parameters:,}", size(shape.parameters * plan.given.width), plan.configs[name]]
        for name, shape in plan.shapes.items()
    ]


def token_rows(plan: Planned) -> list[list[str]]:
    rows = []
    for name, own in plan.mean.tokens.items():
        length = plan.mean.lengths[name]
        means = [f"{length.prompt:,.0f}", f"{length.response:,.0f}", f"{length.kept:.2f}"]
        sums = [count(own.prompt + own.response), count(own.forward), count(own.backward)]
        rows.append([name, f"{own.samples:,}", *means, *sums])
    return rows


def memory_rows(plan: Planned) -> list[list[str]]:
    def parts(sizes: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {size(value)}" for name, value in sizes.items())

    rows = []
    for stage, memory in plan.mean.memory.items():
        on_each = size(memory.on_each(memory.gpus)) if memory.gpus else "does not fit"
        rows.append([stage, str(memory.gpus or "none"), on_each, parts(memory.sharded), parts(memory.whole)])
    return rows


def work_rows(plan: Planned) -> list[list[str]]:
    rows = []
    for mean, limit in zip(plan.mean.work, plan.limits.work, strict=True):
        hours = [short(stage.gpu_seconds / 3600) for stage in (mean, limit)]
        rows.append([mean.name, mean.branch, count(mean.tokens), short(mean.flops / 1e15), *hours])
    return rows


def store_rows(plan: Planned) -> list[list[str]]:
    rows = [[stage, size(plan.mean.tables[stage]), size(plan.limits.tables[stage])] for stage in plan.mean.tables]
    checkpoints = size(plan.mean.checkpoints)
    return [*rows, [f"train ({plan.recipe.num_rounds} checkpoints)", checkpoints, checkpoints]]


def pod_rows(plan: Planned) -> list[list[str]]:
    return [
        [str(own.shards), f"{own.a_round:g}", f"{own.pods:,}", size(own.object_bytes), str(own.most_rounds)]
        for own in plan.control_plane
    ]


def totals(plan: Planned, gpu_hours: float | None) -> list[str]:
    """The sums, and what to turn."""
    mean, limits = plan.mean, plan.limits
    lines = [
        f"GPU-hours: {short(mean.gpu_hours)}; {short(limits.gpu_hours)} if every prompt and response had the recipe's limit"
    ]
    if mean.hours is not None:
        lines.append(f"Hours:     {short(mean.hours)} with these GPUs, one stage after another")
    if mean.cost is not None and limits.cost is not None:
        lines.append(f"Cost:      {mean.cost:,.2f} at {mean.price:g} an hour; {limits.cost:,.2f} at the limits")
    lines.append(f"Store:     {size(mean.stored_bytes)}, until `camopd gc` is asked")
    pods = f"{mean.pods:,}, a Workflow object of some {mean.object_bytes / 1e6:.2f} MB (limit 1 MB)"
    alone = "; none with `camopd recover`" if plan.recipe.execution == "colocated" else ""
    lines.append(f"Pods:      {pods}{alone}")
    if gpu_hours is not None:
        share = mean.peak_share_for(gpu_hours, plan.given)
        said = "pod starts and decoding alone take longer" if share is None else f"a share of peak of {share:.2f} would"
        lines.append(f"{gpu_hours:g} GPU-hours: {said}" + (" explain them" if share is not None else ""))
    notes = advice(plan.recipe, plan.shapes, mean, plan.given)
    return [
        *lines,
        "Not counted: evaluation, diagnostics, transfers to and from the store",
        *(f"Note: {note}" for note in notes),
    ]


def short(number: float) -> str:
    """Three figures, never an exponent: ``0.0123``, ``4.56``, ``7,890``."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 0.001 else f"{number:.1g}"


def size(number: float) -> str:
    """``16.4 GB``: powers of ten."""
    return scaled(number, (" B", " kB", " MB", " GB", " TB"))


def count(number: float) -> str:
    """``61.4 M``."""
    return scaled(number, ("", " k", " M", " G", " T"))


def scaled(number: float, units: Sequence[str]) -> str:
    """With the first unit that leaves less than a thousand, each a thousand times the one before; with the last otherwise."""
    *smaller, largest = units
    for unit in smaller:
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.2f}{largest}"
