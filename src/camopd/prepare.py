"""Stage 1: find every problem while it costs nothing, give all inputs a content id, and turn prompts into token ids once."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from camopd.adapters import content_id, weights_at
from camopd.config import Branch, Recipe, cautions
from camopd.errors import EngineError, InputError, Problem, StoreError
from camopd.inputs.served import Probe, ServedModel, check_same, examine, records
from camopd.plan import TEMPLATE, Plan, plan_uri, run_id, training_config
from camopd.recipe.registered import is_registered
from camopd.recipe.served import is_served
from camopd.store import Store
from camopd.store.uris import join

_NUM_SHOWN = 20  # overlapping items that a message lists


def run(recipe: Recipe, *, store: Store, earlier: Sequence[Problem] = ()) -> Plan:
    """Check a recipe against its models, prompts and tasks, and make the run's plan unless it is made already.

    ``<run>/recipe.json`` and ``<run>/settings.md`` are written each time, ``<run>/plan/`` once.

    Args:
        recipe: what is wanted.
        store: where the inputs lie and the run is written.
        earlier: what was found to be wrong with the recipe before; models that are still names in a registry are among it.

    Raises:
        InputError: every problem found; none of them needs a model to be loaded. Served teachers are asked.
        StoreError: the store fails while the run is written.
    """
    served, content_ids, problems = _looked_at(recipe, store, earlier)

    def write(folder: Path) -> dict[str, Any]:
        return _write_plan(folder, recipe, content_ids, problems, store, served)

    if problems:  # look for the others, too, and raise
        with tempfile.TemporaryDirectory(prefix="camopd-") as scratch:
            write(Path(scratch))
    run_uri = join(recipe.output, run_id(recipe, content_ids))
    config = training_config(recipe, content_ids)
    store.produce(plan_uri(run_uri), stage="prepare", config=config, inputs=content_ids, write=write)
    store.write(join(run_uri, "recipe.json"), (recipe.model_dump_json(indent=1) + "\n").encode())
    plan = Plan.load(store, run_uri)
    check_served(plan, served)
    store.write(join(run_uri, "settings.md"), settings_markdown(plan).encode())
    return plan


def check(recipe: Recipe, *, store: Store, writes: bool = True, earlier: Sequence[Problem] = ()) -> str:
    """Every check of ``run``, from a machine that does not make the run. Returns the run's prefix.

    Args:
        recipe: what is wanted.
        store: where the inputs lie.
        writes: whether it is tried if the output can be written.
        earlier: as in ``run``.

    Raises:
        InputError: every problem found.
    """
    served, content_ids, problems = _looked_at(recipe, store, earlier, writes=writes)
    with tempfile.TemporaryDirectory(prefix="camopd-") as scratch:
        _write_plan(Path(scratch), recipe, content_ids, problems, store, served)
    run_uri = join(recipe.output, run_id(recipe, content_ids))
    if store.manifest(plan_uri(run_uri)) is not None:
        check_served(replace(Plan.load(store, run_uri), recipe=recipe), served)
    return run_uri


def _looked_at(
    recipe: Recipe, store: Store, earlier: Sequence[Problem], *, writes: bool = True
) -> tuple[dict[str, ServedModel], dict[str, str], list[Problem]]:
    """Served teachers by location, content ids by input, and what is wrong so far."""
    served, faults = examine(recipe, store)
    content_ids, problems = resolve(recipe, store, {location: model.content_id for location, model in served.items()})
    problems = [*earlier, *problems, *faults]
    problems += check_output(recipe.output, store) if writes else []
    problems += check_evaluation(recipe, content_ids, store)
    return served, content_ids, problems


def resolve(recipe: Recipe, store: Store, served: Mapping[str, str] | None = None) -> tuple[dict[str, str], list[Problem]]:
    """Content id of every input, and the inputs that are not there. A location used twice is read once.

    Args:
        recipe: the recipe.
        store: where the inputs lie.
        served: content ids of the teachers that are served, by address; what is wrong with others has been said, and so it
            has with models that are still names in a registry.
    """
    wanted = {"student": ("student", recipe.student)}
    for branch in recipe.branches:
        where = f"branches.{branch.name}"
        wanted[f"teacher/{branch.name}"] = (f"{where}.teacher" if branch.teacher else "student", recipe.teacher(branch))
        if branch.has_prompt_file:
            wanted[f"prompts/{branch.name}"] = (f"{where}.prompts", branch.prompts)
    if recipe.prompts.chat_template:
        wanted["chat_template"] = ("prompts.chat_template", recipe.prompts.chat_template)
    known = dict(served or {})
    bases: dict[str, str] = {}
    problems: dict[str, Problem] = {}
    for key, (where, uri) in wanted.items():
        if uri in known or uri in problems or is_served(uri) or is_registered(uri):
            continue
        try:
            if not key.startswith(("prompts/", "chat_template")):
                weights = weights_at(uri, store, recipe.base, where=where)
                if is_registered(weights.base):
                    continue
                known[uri] = content_id(weights, store)
                if weights.adapter is not None:
                    bases[uri] = store.content_id(weights.base)
            elif store.stat(uri) is None and store.list(uri):
                problems[uri] = Problem(where, f"{uri} is a folder", "give the file in it")
            else:
                known[uri] = store.content_id(uri)
        except StoreError as error:
            problems[uri] = Problem(where, str(error))
        except InputError as error:
            problems[uri] = error.problems[0]
    ids = {key: known[uri] for key, (_, uri) in wanted.items() if uri in known}
    ids |= {f"{key}/base": bases[uri] for key, (_, uri) in wanted.items() if uri in bases}
    return ids, list(problems.values())


def check_served(plan: Plan, served: Mapping[str, ServedModel]) -> None:
    """Raises InputError for a server whose model is not the one that the plan was made with."""
    problems = []
    for branch in plan.recipe.branches:
        model = served.get(plan.teacher_uri(branch))
        try:
            if model is not None:
                check_same(plan.teacher_uri(branch), Probe.from_record(plan.served[model.content_id]), model.probe)
        except EngineError as error:
            problems.append(Problem(f"branches.{branch.name}.teacher", str(error)))
    if problems:
        raise InputError(problems)


def check_output(output: str, store: Store) -> list[Problem]:
    """Whether the run can be written: tried, because permissions cannot be asked for."""
    try:
        store.write(join(output, ".camopd"), b"")
    except StoreError as error:
        fix = "give a folder or s3:// prefix that every stage can write: output_uri in a run form, --set output=... elsewhere"
        return [Problem("output", f"{output} cannot be written ({error})", fix)]
    return []


def check_evaluation(recipe: Recipe, content_ids: Mapping[str, str], store: Store) -> list[Problem]:
    """Whether each branch has tasks, whether the task folder holds them, and whether no item of theirs is also a prompt."""
    from camopd.inputs.tasks import check_tasks, evaluation_items, read_task_files

    named = {f"branches.{branch.name}.tasks": branch.tasks for branch in recipe.branches}
    fix = "name at least one task of evaluate.task_dir or of lm-eval"
    problems = [Problem(where, "is empty, so nothing measures the branch", fix) for where, tasks in named.items() if not tasks]
    if recipe.evaluate.task_dir is None:
        from camopd.evaluation.harness import unknown_tasks

        unknown = {where: unknown_tasks(tasks) for where, tasks in named.items()}
        return problems + [
            Problem(where, f"lm-eval has no task {name!r}", "see `lm-eval ls tasks`, or set evaluate.task_dir for your own")
            for where, names in unknown.items()
            for name in names
        ]
    try:
        files, broken = read_task_files(store.fetch(recipe.evaluate.task_dir))
    except StoreError as error:
        return [*problems, Problem("evaluate.task_dir", str(error))]
    items, missing = evaluation_items(sorted({task for tasks in named.values() for task in tasks}), files)
    problems += broken + check_tasks(named, files) + missing
    for branch in recipe.branches if items else ():
        if f"prompts/{branch.name}" in content_ids:
            problems += find_overlap(store.fetch(branch.prompts), branch, items)
    return problems


def find_overlap(path: Path, branch: Branch, items: Mapping[bytes, str]) -> list[Problem]:
    """Prompts whose question is also an evaluation item: training on them would make the score worthless."""
    from camopd.inputs.prompts import Prompt, read_prompts
    from camopd.inputs.tasks import fingerprint

    found: list[Problem] = []
    count = 0
    with contextlib.suppress(InputError):  # a file that is no prompt file is reported where it is encoded
        for row in read_prompts(path, branch.prompts):
            task = items.get(fingerprint(row.question)) if isinstance(row, Prompt) else None
            if task is not None:
                count += 1
                if count <= _NUM_SHOWN:
                    what = f"this prompt is also an item of the evaluation task {task}"
                    found.append(Problem(f"{branch.prompts}:{row.line}", what, "remove it here or there"))
    if count > _NUM_SHOWN:
        found.append(Problem(f"branches.{branch.name}.prompts", f"{count} prompts in all are also evaluation items"))
    return found


def _write_plan(
    folder: Path,
    recipe: Recipe,
    content_ids: Mapping[str, str],
    earlier: list[Problem],
    store: Store,
    served: Mapping[str, ServedModel],
) -> dict[str, Any]:
    """Fill the plan's folder; returns the headline numbers. Raises InputError with the earlier problems and all new ones."""
    from camopd.inputs.encoding import encode_branches
    from camopd.inputs.preflight import (
        Findings,
        check_fit,
        check_models,
        check_teacher_prompts,
        compare_tokenizers,
        make_encoder,
    )

    found = Findings(list(earlier), list(cautions(recipe)) + _same_teachers(recipe, content_ids))
    if recipe.base is not None and not any(key.endswith("/base") for key in content_ids):
        found.warnings.append(f"base: no model of the recipe is an adapter, so {recipe.base} is not used")
    with tempfile.TemporaryDirectory(prefix="camopd-") as scratch:
        models = check_models(_models(recipe, content_ids), store, Path(scratch), found, recipe)
        limit = check_fit(recipe, models, found, {location: model.max_length for location, model in served.items()})
        encoder = make_encoder(recipe, models, store, found)
        found.problems += check_teacher_prompts(recipe, models, encoder)
        paths = {b.name: store.fetch(b.prompts) for b in recipe.branches if f"prompts/{b.name}" in content_ids}
        tallies = encode_branches(recipe, encoder, paths, limit=limit, folder=folder, found=found)
        compare_tokenizers(models, [text for tally in tallies.values() for text in tally.probes], found)
    if found.problems:
        raise InputError(found.problems)
    assert encoder is not None
    plan = Plan(
        run_uri=join(recipe.output, run_id(recipe, dict(content_ids))),
        recipe=recipe,
        content_ids=dict(content_ids),
        vocab_size=models.vocab_size,
        eos_ids=models.eos_ids,
        pad_id=models.pad_id,
        num_prompts={name: tally.accepted for name, tally in tallies.items()},
        template_id=encoder.template_id,
        max_prompt_tokens=limit,
        warnings=tuple(found.warnings),
        served=records(served),
    )
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    if encoder.template is not None:
        (folder / TEMPLATE).write_text(encoder.template, encoding="utf-8")
    preflight = {
        "branches": {name: tally.to_record() for name, tally in tallies.items()},
        "max_prompt_tokens": limit,
        "warnings": found.warnings,
    }
    (folder / "preflight.json").write_text(json.dumps(preflight, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {f"{name}/{key}": value for name, tally in tallies.items() for key, value in tally.headline().items()}


def _models(recipe: Recipe, content_ids: Mapping[str, str]) -> dict[str, str]:
    """URI by parameter of the models that are there, the student first, each URI once."""
    named = {"student": recipe.student} if "student" in content_ids else {}
    for branch in recipe.branches:
        uri = recipe.teacher(branch)
        known = uri == recipe.student or uri in named.values() or branch.is_served
        if not known and f"teacher/{branch.name}" in content_ids:
            named[f"branches.{branch.name}.teacher"] = uri
    return named


def _same_teachers(recipe: Recipe, content_ids: Mapping[str, str]) -> list[str]:
    return [
        f"branches.{branch.name}.teacher: {branch.teacher} holds the same files as the student, so there is no gap to close"
        for branch in recipe.branches
        if branch.role == "recover"
        and recipe.teacher(branch) != recipe.student
        and content_ids.get(f"teacher/{branch.name}", "") == content_ids.get("student")
    ]


def settings_markdown(plan: Plan) -> str:
    """The effective settings as a table, and what to look at twice."""
    recipe = plan.recipe.model_dump(mode="json", exclude={"branches"})
    branches = {branch.name: branch.model_dump(mode="json", exclude={"name"}) for branch in plan.recipe.branches}
    rows = [f"| {key} | {_cell(value)} |" for key, value in _flat({**recipe, "branches": branches})]
    warnings = ["", "## Look twice", "", *(f"- {sentence}" for sentence in plan.warnings)] if plan.warnings else []
    return "\n".join(["# Settings", "", f"Run: `{plan.run_uri}`", "", "| setting | value |", "|---|---|", *rows, *warnings, ""])


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\r\n", "\n").replace("\n", "<br>")
