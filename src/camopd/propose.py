"""Prompts that a teacher makes up, once a run: what `rollout` and `recover` do first where a recipe asks for them (method
section 8).

A prompt list covers what its author thought of; an instruct model asked for prompts covers what it was trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camopd import plan as layout
from camopd.config import Branch
from camopd.plan import TEMPLATE, Plan
from camopd.progress import Progress
from camopd.records import open_table
from camopd.store import Store, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run(plan: Plan, branch: Branch, *, store: Store) -> str:
    """Write ``<run>/teacher-prompts-<branch>/prompts.parquet`` unless it is there. Returns its content id.

    Args:
        plan: the run's plan.
        branch: whose teacher is asked.
        store: where to read and write.

    Raises:
        UnhealthyRunError: the teacher makes up too few usable prompts.
    """
    from camopd.inputs.tasks import evaluation_items, read_task_files
    from camopd.inputs.teacher_prompts import known_prompts, make_prompts, user_turn
    from camopd.inputs.tokens import Encoder
    from camopd.rollout import engine_at

    recipe, teacher = plan.recipe, plan.teacher_uri(branch)
    plan_uri, count = layout.plan_uri(plan.run_uri), branch.num_teacher_prompts

    def write(folder: Path) -> dict[str, Any]:
        template = join(plan_uri, TEMPLATE)
        encoder = Encoder(
            _tokenizer(plan.tokenizer_uri(recipe.student, store), store),
            chat_template=store.read(template).decode() if store.stat(template) else None,
            enable_thinking=recipe.prompts.enable_thinking,
        )
        tokenizer = _tokenizer(plan.tokenizer_uri(teacher, store), store)
        files, _ = read_task_files(store.fetch(recipe.evaluate.task_dir)) if recipe.evaluate.task_dir else ([], [])
        items, _ = evaluation_items(sorted({task for b in recipe.branches for task in b.tasks}), files)
        own = store.fetch(join(plan_uri, layout.prompts_file(branch.name))) if branch.has_prompt_file else None
        progress = Progress("rollout", total=count, unit="prompts", branch=f"{branch.name}, by its teacher")
        with open_table(folder / "prompts.parquet", "prompts") as write_rows, engine_at(plan, teacher, store) as engine:
            tally = make_prompts(
                branch.name,
                engine=engine,
                turn=user_turn(tokenizer, f"branches.{branch.name}.teacher", enable_thinking=recipe.prompts.enable_thinking),
                encoder=encoder,
                count=count,
                limit=plan.max_prompt_tokens,
                seed=recipe.seed,
                held_out=items,
                known=known_prompts(own) if own else set(),
                write=write_rows,
                progress=progress.advance,
            )
        if tally.accepted < count:
            print(f"branches.{branch.name}.num_teacher_prompts: {tally.summary()}", file=sys.stderr)
        return tally.headline()

    config = {"count": count, "seed": recipe.seed, "limit": plan.max_prompt_tokens}
    inputs = {"teacher": plan.content_ids[f"teacher/{branch.name}"], "plan": store.require(plan_uri).content_id}
    uri = layout.teacher_prompts_uri(plan.run_uri, branch.name)
    return store.produce(uri, stage="rollout", config=config, inputs=inputs, write=write).content_id


def _tokenizer(uri: str, store: Store) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(store.fetch(uri), local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerFast), "prepare takes no other"
    return tokenizer
