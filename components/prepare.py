from kfp import dsl

from components import component


@component
def prepare(
    recipe: str,
    headline: dsl.Output[dsl.Metrics],
    settings: dsl.Output[dsl.Markdown],
    input_domain_model_uri: str = "recipe",
    input_domain_prompts_uri: str = "recipe",
    input_general_model_uri: str = "recipe",
    input_general_prompts_uri: str = "recipe",
    job: str = "",
    method_learning_rate: str = "recipe",
    method_name: str = "recipe",
    method_num_rounds: str = "recipe",
    method_seed: str = "recipe",
    output_alias: str = "recipe",
    output_model_name: str = "recipe",
    output_notes: str = "recipe",
    output_promote: bool = True,
    output_uri: str = "recipe",
    schedule_name: str = "none",
) -> list[str]:
    """Check every input, give each its content id, and write the run's plan. Needs no GPU and loads no weights.

    Args:
        recipe: Name or location of the recipe; every value "recipe" below leaves what it says.
        headline: What was found, in numbers.
        settings: The effective settings.
        input_domain_model_uri: The model to recover.
        input_domain_prompts_uri: JSONL prompts of the domain.
        input_general_model_uri: The model that teaches general ability.
        input_general_prompts_uri: JSONL general prompts.
        job: Id of this pipeline run; the exit handler finds the recovery by it.
        method_learning_rate: Step size.
        method_name: Preset that fills in what the recipe leaves out.
        method_num_rounds: Rounds of rollout, score, select and train.
        method_seed: Seed of sampling and prompt order.
        output_alias: Registry alias that moves to the recovered model.
        output_model_name: Registered model.
        output_notes: Free text kept with the run.
        output_promote: Off: register nothing; on: as the recipe says.
        output_uri: Folder or s3:// prefix of the run.
        schedule_name: The schedule that has started the run; "none" is somebody.

    Returns:
        The prefix of each round, in order; of the last one alone where one pod does them all.
    """
    form = {name: value for name, value in locals().items() if name.startswith(("input_", "method_", "output_"))}
    from camopd.workflow import prepare

    done = prepare(recipe, {name: value for name, value in form.items() if value is not True}, job=job, schedule=schedule_name)
    with open(settings.path, "w", encoding="utf-8") as file:
        file.write(done.document)
    for name, value in done.metrics.items():
        headline.log_metric(name, value)
    return done.rounds
