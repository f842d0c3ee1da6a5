from kfp import dsl

from components import model_component


@model_component
def recover(round_uri: str, headline: dsl.Output[dsl.Metrics], job: str = "") -> None:
    """Do every round in this pod, with the models in memory and a fresh batch for every update (execution = "colocated").

    Args:
        round_uri: Prefix of the last round; those before it come first.
        headline: Loss, gap and gradient norms of the last round.
        job: Id of this pipeline run, which says as each round begins that it is still at work.
    """
    from camopd.workflow import recover

    for name, value in recover(round_uri, job=job).metrics.items():
        headline.log_metric(name, value)
