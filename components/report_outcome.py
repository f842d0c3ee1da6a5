from kfp import dsl

from components import component


@component
def report_outcome(
    job: str, output_uri: str, recipe: str, status: dsl.PipelineTaskFinalStatus, outcome: dsl.Output[dsl.Markdown]
) -> None:
    """Say what happened, where, and what to do next; also when a step failed.

    Args:
        job: Id of this pipeline run.
        output_uri: Folder or s3:// prefix of the run.
        recipe: Name or location of the recipe.
        status: KFP's word on the run; its message is empty on a cluster, so the reason comes from the run's own record.
        outcome: The same, for the run's page.
    """
    from camopd.workflow import outcome as describe

    text = describe(recipe, output_uri, job=job, succeeded=status.state in ("SUCCEEDED", "COMPLETE"))
    print(text)
    with open(outcome.path, "w", encoding="utf-8") as file:
        file.write(text)
