"""Components of camopd in a pipeline of your own: on-policy answers with teachers' scores, for a trainer that you have already.

    python examples/own_pipeline/pipeline.py own.yaml     # compile; upload the file in the KFP UI

It samples and scores one round of a recipe, and hands what selection kept to a step of its own. Nothing is trained here.
"""

import sys

from kfp import compiler, dsl

from components import CORE
from components.prepare import prepare
from components.rollout import rollout
from components.score import score
from components.select import select


@dsl.component(base_image=CORE, packages_to_install=[], install_kfp_package=False)
def hand_over(round_uri: str, kept: dsl.Output[dsl.Dataset]) -> int:
    """The step of your own: here it writes the kept answers as JSON lines. The package's tables are open to any step.

    Args:
        round_uri: Prefix of a round whose selection is finished.
        kept: Prompt id, branch, score and text of each kept answer.

    Returns:
        How many there are.
    """
    import json

    from camopd.records import read_table
    from camopd.store import Store

    store = Store()
    answers = read_table(store.fetch(f"{round_uri}/rollout") / "rollouts.parquet", "rollouts")
    chosen = read_table(store.fetch(f"{round_uri}/select") / "selection.parquet", "selection")
    text = {(row["prompt_id"], row["sample_index"]): row["text"] for row in answers}
    rows = [row for row in chosen if row["kept"]]
    with open(kept.path, "w", encoding="utf-8") as file:
        for row in rows:
            record = {name: row[name] for name in ("prompt_id", "branch", "score")}
            file.write(json.dumps(record | {"text": text[row["prompt_id"], row["sample_index"]]}) + "\n")
    return len(rows)


@dsl.pipeline(name="on-policy-answers", display_name="On-policy answers with teachers' scores")
def on_policy_answers(recipe: str = "micro", output_uri: str = "recipe") -> None:
    """Sample the student, let the teachers score, keep the largest gaps, hand them over.

    Args:
        recipe: Name of a recipe in the image, or the location of a TOML file.
        output_uri: Folder or s3:// prefix under which everything is written.
    """
    prepared = prepare(recipe=recipe, method_num_rounds="1", output_uri=output_uri).set_caching_options(False)
    with dsl.ParallelFor(items=prepared.outputs["Output"], parallelism=1, name="rounds") as round_uri:
        sampled = rollout(round_uri=round_uri).set_caching_options(False)
        with dsl.ParallelFor(items=sampled.outputs["Output"], name="branches") as score_uri:
            scored = score(score_uri=score_uri).set_caching_options(False)
        selected = select(round_uri=round_uri).after(scored).set_caching_options(False)
        hand_over(round_uri=round_uri).after(selected).set_caching_options(False)


if __name__ == "__main__":
    compiler.Compiler().compile(on_policy_answers, sys.argv[1])
