from kfp import dsl

from components import component


@component
def gather(round_uri: str, headline: dsl.Output[dsl.Metrics]) -> list[str]:
    """Join the shards' answers into the round's rollout. Needs no GPU.

    Args:
        round_uri: Prefix of the round.
        headline: Lengths, entropy and rates.

    Returns:
        One prefix a branch and shard for the teachers' scores.
    """
    from camopd.workflow import gather

    done = gather(round_uri)
    for name, value in done.metrics.items():
        headline.log_metric(name, value)
    return done.score_uris
