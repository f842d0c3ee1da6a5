"""The graph: resolve -> prepare -> [begin -> rollout -> score -> select -> train] x rounds -> evaluate -> promote.

``resolve`` is there for schedules: a tick that finds nothing new ends behind it, and all the rest stands in one condition.

Where the recipe says ``execution = "colocated"`` the loop has one turn, and one pod does every round in it.

Rounds are a run-time parameter: one loop over the prefixes that ``prepare`` returns, so that the compiled file does not grow.
A round whose recipe asks for shards takes another way through it: several pods sample, several score for each branch.
Each iteration starts on CPU and lets nothing dear start when the round is done, the run stopped, or the round before is
missing: KFP goes on with later iterations after a failed one.
"""

from kfp import dsl

from components.begin import begin
from components.evaluate import evaluate
from components.gather import gather
from components.prepare import prepare
from components.promote import promote
from components.recover import recover
from components.report_outcome import report_outcome
from components.resolve import resolve
from components.rollout import rollout
from components.score import score
from components.select import select
from components.spread import spread
from components.train import train
from pipelines.pools import Pools


def make_pipeline(pools: Pools) -> dsl.base_component.BaseComponent:
    """The recovery for these pools. A task is one component, placed on one pool, with a name for people."""
    job = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    cpu, inference = pools.cpu.place, pools.inference.place
    colocated = (pools.colocated or pools.training).place

    def scored(score_uris: dsl.PipelineTask, turns: str) -> dsl.PipelineTask:
        """A teacher for each prefix that a task returned."""
        # The item names round, branch and shard: inside a loop, nothing but the item is read.
        with dsl.ParallelFor(items=score_uris.outputs["Output"], name=turns) as score_uri:
            return inference(score(score_uri=score_uri)).set_display_name("Score: ask a teacher")

    def trained(round_uri: str, after: dsl.PipelineTask) -> dsl.PipelineTask:
        selected = cpu(select(round_uri=round_uri)).after(after).set_display_name("Select: keep the gap mass")
        learnt = pools.training.train(train, round_uri=round_uri, launched_from=pools.cpu)
        return learnt.after(selected).set_display_name("Train: update the student")

    def one_round(round_uri: str) -> dsl.PipelineTask:
        begun = cpu(begin(job=job, round_uri=round_uri)).set_display_name("Begin: may this round start?")
        with dsl.If(begun.output == "go", name="go"):
            sampled = inference(rollout(round_uri=round_uri)).set_display_name("Rollout: sample the student")
            work = trained(round_uri, after=scored(sampled, "branches"))
        with dsl.If(begun.output == "shards", name="shards"):
            parts = cpu(spread(round_uri=round_uri)).set_display_name("Spread: into shards")
            with dsl.ParallelFor(items=parts.outputs["Output"], name="rollout shards") as shard_uri:
                part = inference(rollout(round_uri=shard_uri)).set_display_name("Rollout: sample a shard")
            joined = cpu(gather(round_uri=round_uri)).after(part).set_display_name("Gather: join the shards")
            trained(round_uri, after=scored(joined, "score shards"))
        with dsl.If(begun.output == "colocated", name="colocated"):
            colocated(recover(job=job, round_uri=round_uri)).set_display_name("Recover: all rounds in one pod")
        return work

    @dsl.pipeline(name="camopd-recovery", display_name="Recover a domain model's general ability")
    def recovery(
        input_domain_model_uri: str = "recipe",
        input_domain_prompts_uri: str = "recipe",
        input_general_model_uri: str = "recipe",
        input_general_prompts_uri: str = "recipe",
        input_recipe: str = "micro",
        method_learning_rate: str = "recipe",
        method_name: str = "recipe",
        method_num_rounds: str = "recipe",
        method_seed: str = "recipe",
        output_alias: str = "recipe",
        output_model_name: str = "recipe",
        output_notes: str = "recipe",
        output_promote: bool = True,
        output_uri: str = "recipe",
        schedule_again_for_new_teachers: bool = False,
        schedule_max_attempts: int = 3,
        schedule_name: str = "none",
    ) -> None:
        """Give a domain model its lost general ability back and keep its domain (CaMOPD, arXiv:2605.27115).

        A value "recipe" leaves what the recipe says. A run that was stopped goes on when it is started with the same values.

        Args:
            input_domain_model_uri: The model to recover; a local folder, an s3:// prefix or models:/NAME@alias.
            input_domain_prompts_uri: Prompts of the domain, JSONL.
            input_general_model_uri: The open model it came from, which teaches general ability.
            input_general_prompts_uri: General prompts, JSONL.
            input_recipe: Name of a recipe in the image, or the location of a TOML file.
            method_learning_rate: Step size, such as 2e-6.
            method_name: Preset, such as camopd, mopd or off-policy-kd; it fills in what the recipe leaves out.
            method_num_rounds: Times rollout, score, select and train are repeated.
            method_seed: Seed of sampling and prompt order.
            output_alias: Alias that moves to the recovered model.
            output_model_name: Registered model in MLflow.
            output_notes: Free text kept with the run.
            output_promote: Off: evaluate and decide, register nothing; on: as the recipe says.
            output_uri: Folder or s3:// prefix under which the run's own folder is made.
            schedule_again_for_new_teachers: Whether a schedule recovers a known model again when a teacher is new.
            schedule_max_attempts: How often a schedule starts a recovery that fails.
            schedule_name: The schedule that starts the run; it is skipped where nothing is new. "none" always goes on.
        """
        outcome = cpu(report_outcome(job=job, output_uri=output_uri, recipe=input_recipe))
        with dsl.ExitHandler(outcome.set_display_name("Outcome: what happened"), name="recover"):
            form = {
                "input_domain_model_uri": input_domain_model_uri,
                "input_domain_prompts_uri": input_domain_prompts_uri,
                "input_general_model_uri": input_general_model_uri,
                "input_general_prompts_uri": input_general_prompts_uri,
                "job": job,
                "method_learning_rate": method_learning_rate,
                "method_name": method_name,
                "method_num_rounds": method_num_rounds,
                "method_seed": method_seed,
                "output_alias": output_alias,
                "output_model_name": output_model_name,
                "output_notes": output_notes,
                "output_promote": output_promote,
                "output_uri": output_uri,
                "recipe": input_recipe,
                "schedule_name": schedule_name,
            }
            resolved = resolve(
                **form,
                schedule_again_for_new_teachers=schedule_again_for_new_teachers,
                schedule_max_attempts=schedule_max_attempts,
            )
            cpu(resolved).set_display_name("Resolve: is there anything new?")
            with dsl.If(resolved.output == "go", name="new"):
                prepared = cpu(prepare(**form)).set_display_name("Prepare: check the inputs")
                with dsl.ParallelFor(items=prepared.outputs["Output"], parallelism=1, name="rounds") as round_uri:
                    work = one_round(round_uri)
                gate = inference(evaluate(rounds=prepared.outputs["Output"]).after(work))
                gate.set_display_name("Evaluate: before and after")
                with dsl.If(gate.outputs["Output"] == "pass", name="passed"):
                    cpu(promote(rounds=prepared.outputs["Output"])).set_display_name("Promote: register the model")

    return recovery
