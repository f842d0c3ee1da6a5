from kfp import dsl

from components import model_component


@model_component
def train(round_uri: str, headline: dsl.Output[dsl.Metrics], job: str = "") -> None:
    """Update the student on the selected answers and write its checkpoint.

    Args:
        round_uri: Prefix of the round.
        job: What a training job on several nodes asks for, as JSON from the pools file; empty trains in this pod.
        headline: Loss, gap and gradient norms of the round's last step.
    """
    from camopd.workflow import train

    for name, value in train(round_uri, job=job).metrics.items():
        headline.log_metric(name, value)
