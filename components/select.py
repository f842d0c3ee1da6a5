from kfp import dsl

from components import component


@component
def select(round_uri: str, headline: dsl.Output[dsl.Metrics]) -> None:
    """Keep the answers that hold most of the gap between teacher and student.

    Args:
        round_uri: Prefix of the round.
        headline: How many were kept, and how the choice leans.
    """
    from camopd.workflow import select

    for name, value in select(round_uri).metrics.items():
        headline.log_metric(name, value)
