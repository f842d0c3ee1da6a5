"""A small finished evaluation for tests: a plan and hand-made answers whose scores are known."""

from camopd.config import Recipe
from camopd.evaluation.harness import Answer
from camopd.plan import Plan

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> & 'quoted' \"text\""


def make_plan(run_uri="/runs/demo-0123456789ab", *, extra=False, warnings=(), **recipe) -> Plan:
    """Two branches, the second taught by the frozen student; with ``extra`` a third with a teacher of its own."""
    branches = [
        {
            "name": "general",
            "role": "recover",
            "teacher": "/models/general",
            "prompts": "/g.jsonl",
            "tasks": ["seen", "unseen"],
        },
        {"name": "domain", "role": "retain", "prompts": "/d.jsonl", "tasks": ["codes"]},
    ]
    if extra:
        branches.append(
            {"name": "drugs", "role": "retain", "teacher": "/models/drugs", "prompts": "/e.jsonl", "tasks": ["pills"]}
        )
    values = {"name": "demo", "student": "/models/domain", "branches": branches, "num_rounds": 2, "num_threads": 1}
    made = Recipe.model_validate(values | {"evaluate": {"bootstrap": 200, "curve_points": 0}} | recipe)
    teachers = {"general": "sha256:general", "domain": "sha256:domain", "drugs": "sha256:drugs"}
    names = [branch.name for branch in made.branches]
    return Plan(
        run_uri=run_uri,
        recipe=made,
        content_ids={
            "student": "sha256:domain",
            **{f"teacher/{name}": teachers[name] for name in names},
            **{f"prompts/{name}": f"sha256:prompts-{name}" for name in names},
        },
        vocab_size=261,
        eos_ids=(1,),
        pad_id=0,
        num_prompts=dict.fromkeys(names, 100),
        template_id="sha256:template",
        max_prompt_tokens=96,
        warnings=warnings,
    )


# Share of right answers of 8 (seen, codes, pills) or 4 (unseen). General: before 0.25, after 0.75, teacher 1.
RIGHT = {
    "before": {"seen": 4, "unseen": 0, "codes": 8, "pills": 0},
    "after": {"seen": 8, "unseen": 2, "codes": 8, "pills": 4},
    "teacher-general": {"seen": 8, "unseen": 4, "codes": 0, "pills": 0},
    "teacher-drugs": {"seen": 0, "unseen": 0, "codes": 0, "pills": 8},
}
SIZES = {"seen": 8, "unseen": 4, "codes": 8, "pills": 8}


def make_answers(plan: Plan):
    """Model -> task -> answers; each model is right on the first so many items."""
    names = [branch.name for branch in plan.recipe.branches]
    tasks = [task for branch in plan.recipe.branches for task in branch.tasks]
    models = [model for model in RIGHT if model.removeprefix("teacher-") in ("before", "after", *names)]
    return {
        model: {
            task: [
                Answer(
                    str(i), f"{task} {i}", f"<|user|>{task} {i}", f"answer {i}", f"target {i}", float(i < RIGHT[model][task])
                )
                for i in range(SIZES[task])
            ]
            for task in tasks
        }
        for model in models
    }


def settings(plan: Plan):
    described = {
        "metric": "exact_match",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "num_items": 8,
        "generation": {"until": ["."]},
    }
    tasks = {task: [described | {"task": task}] for branch in plan.recipe.branches for task in branch.tasks}
    return {"lm_eval": "0.4.13", "tasks": tasks, "seed": 0, "evaluate": plan.recipe.evaluate.model_dump(mode="json")}
