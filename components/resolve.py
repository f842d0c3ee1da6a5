from components import component


@component
def resolve(
    recipe: str,
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
    schedule_again_for_new_teachers: bool = False,
    schedule_max_attempts: int = 3,
    schedule_name: str = "none",
) -> str:
    """Find out whether a schedule has anything to recover. Needs no GPU, and is the only pod of a tick that has not.

    Args:
        recipe: Name or location of the recipe; every value "recipe" below leaves what it says.
        input_domain_model_uri: The model to recover.
        input_domain_prompts_uri: JSONL prompts of the domain.
        input_general_model_uri: The model that teaches general ability.
        input_general_prompts_uri: JSONL general prompts.
        job: Id of this pipeline run, for which the model is claimed.
        method_learning_rate: Step size.
        method_name: Preset that fills in what the recipe leaves out.
        method_num_rounds: Rounds of rollout, score, select and train.
        method_seed: Seed of sampling and prompt order.
        output_alias: Registry alias that moves to the recovered model.
        output_model_name: Registered model.
        output_notes: Free text kept with the run.
        output_promote: Off: register nothing; on: as the recipe says.
        output_uri: Folder or s3:// prefix of the run.
        schedule_again_for_new_teachers: Recover a known model again when a teacher is new.
        schedule_max_attempts: How often a recovery that fails is started.
        schedule_name: The schedule; "none" is a run that somebody started.

    Returns:
        "go" or "skip".
    """
    arguments = dict(locals())
    from camopd.workflow import resolve

    form = {name: value for name, value in arguments.items() if name.startswith(("input_", "method_", "output_"))}
    schedule = {name: value for name, value in arguments.items() if name.startswith("schedule_")}
    return resolve(recipe, {name: value for name, value in form.items() if value is not True}, schedule, job=job)
