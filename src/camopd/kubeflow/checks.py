"""What would make a submitted run fail, and can be told before: without a look at the inputs, or by all of prepare's checks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from camopd.config import Recipe
from camopd.errors import InputError, MissingError, Problem, StoreError
from camopd.estimate.pods import check_pods
from camopd.estimate.work import scored_branches
from camopd.kubeflow.form import IN_IMAGE, RECIPE, Wish
from camopd.kubeflow.spec import Spec, image_of
from camopd.recipe.registered import is_registered
from camopd.recipe.served import is_served
from camopd.store import Store, is_s3, join

EXAMPLES = f"{IN_IMAGE}/examples/"
LONGEST_TEXT = 64 * 1024  # bytes: the text becomes part of one argument of a process, of which Linux takes 128 KiB
WITHOUT_VLLM = ("core", "trainer")  # images of ours
BESIDE = "put it where every pod can read it, and give its s3:// location"


def problems_of(wish: Wish, spec: Spec) -> list[Problem]:
    """What is wrong with a wish, as far as recipe and pipeline tell."""
    found = [*_local(wish), *_text(wish.form), *_engine(wish.sent, spec)]
    try:
        check_pods(wish.sent, scored_branches(wish.sent))
    except InputError as error:
        found += error.problems
    return found


def check_inputs(wish: Wish, earlier: list[Problem], store: Store) -> None:
    """All checks of prepare, made from here; nothing is written but a probe of the output.

    Args:
        wish: what is to run.
        earlier: problems that are known.
        store: reads the inputs.

    Raises:
        InputError: every problem, the earlier ones first.
        StoreError: the store cannot be asked from here.
    """
    from camopd import prepare
    from camopd.inputs.registered import resolve_models
    from camopd.tracking import tracker_for

    output = wish.recipe.output
    if is_s3(output):
        try:
            store.stat(join(output, ".camopd"))
        except MissingError:
            pass
        except StoreError as error:
            if earlier:
                raise InputError(earlier) from None
            fix = "set AWS_ENDPOINT_URL_S3 and credentials as the pods have them, or leave it to the run's first step: "
            fix += "--preflight recipe"
            raise StoreError(f"the inputs cannot be checked from this machine ({error}): {fix}") from None
    resolved = resolve_models(wish.recipe, tracker_for(wish.recipe.tracking), store)
    try:
        prepare.check(resolved.recipe, store=store, writes=is_s3(output), earlier=resolved.problems)
    except InputError as error:
        raise InputError([*earlier, *(_seen_from_here(each) for each in error.problems if each not in earlier)]) from None
    if earlier:
        raise InputError(earlier)


def _seen_from_here(problem: Problem) -> Problem:
    """A served teacher may have an address that only pods know."""
    if not re.search(r"https?://", problem.what) or not problem.where.endswith(".teacher"):
        return problem
    return replace(problem, fix="; ".join([*[problem.fix] * bool(problem.fix), "where only pods reach it: --preflight recipe"]))


def locations(recipe: Recipe) -> dict[str, str]:
    """Every place that a recipe names, by parameter."""
    named = {
        "student": recipe.student,
        "base": recipe.base,
        "output": recipe.output,
        "prompts.chat_template": recipe.prompts.chat_template,
        "evaluate.task_dir": recipe.evaluate.task_dir,
    }
    for branch in recipe.branches:
        named[f"branches.{branch.name}.teacher"] = branch.teacher
        named[f"branches.{branch.name}.prompts"] = branch.prompts if branch.has_prompt_file else None
    return {parameter: location for parameter, location in named.items() if location}


def _local(wish: Wish) -> Iterator[Problem]:
    for parameter, location in locations(wish.sent).items():
        if is_s3(location) or is_served(location) or is_registered(location):
            continue
        if parameter == "output":
            fix = "give an s3:// prefix: -s output_uri=s3://bucket/prefix, or output in the recipe"
            yield Problem("output_uri", f"{location} is a folder of this machine, and pods share no disk", fix)
        elif not (wish.shipped and location.startswith(EXAMPLES)):
            yield Problem(parameter, f"{location} is on this machine, and pods share no disk", BESIDE)


def _text(form: Mapping[str, Any]) -> Iterator[Problem]:
    size = len(str(form[RECIPE]).encode())
    if size > LONGEST_TEXT:
        what = f"the recipe is {size / 1024:,.0f} KiB long, of which a pipeline's parameter carries {LONGEST_TEXT // 1024}"
        yield Problem("recipe", what, "take long texts out of it, such as a chat template, and give their s3:// location")
    for name, text in form.items():
        if isinstance(text, str) and "{{" in text:
            line = text[: text.index("{{")].count("\n") + 1
            where = f"recipe:{line}" if name == RECIPE else name
            yield Problem(where, "holds {{, which Argo Workflows takes for a place to fill in", "write it in another way")


def _engine(recipe: Recipe, spec: Spec) -> Iterator[Problem]:
    """Whether the image that samples has the engine, where it is one of ours, whose content is known."""
    stage = "recover" if recipe.execution == "colocated" else "rollout"
    image = image_of(spec, stage)
    name = image.partition("@")[0].rpartition("/")[2].partition(":")[0]
    if recipe.rollout.engine == "vllm" and "camopd/" in image and name in WITHOUT_VLLM:
        pool = "colocated" if recipe.execution == "colocated" else "inference"
        what = f"engine vllm, and the pipeline's pool {pool} runs the image {image}, which has no vLLM"
        fix = f'name the image inference in the pools file, [{pool}] image = ".../camopd/inference:...", and give it by --pools'
        yield Problem("rollout.engine", what, fix)
