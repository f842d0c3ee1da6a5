from kfp import dsl

from components import model_component


@model_component
def score(score_uri: str, headline: dsl.Output[dsl.Metrics]) -> None:
    """Let a branch's teacher score the student's answers.

    Args:
        score_uri: Prefix to write: <round>/score-<branch>, or a shard of it.
        headline: Gap to the teacher and rates.
    """
    from camopd.workflow import score

    for name, value in score(score_uri).metrics.items():
        headline.log_metric(name, value)
