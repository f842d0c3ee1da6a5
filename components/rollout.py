from kfp import dsl

from components import model_component


@model_component
def rollout(round_uri: str, headline: dsl.Output[dsl.Metrics]) -> list[str]:
    """Sample the student's answers to the round's prompts, all branches in one load of the model.

    Args:
        round_uri: Prefix of the round, or of a shard of its rollout.
        headline: Lengths, entropy and rates.

    Returns:
        One prefix a branch for its teacher's scores: it names the round and the branch. Nothing for a shard.
    """
    from camopd.workflow import rollout

    done = rollout(round_uri)
    for name, value in done.metrics.items():
        headline.log_metric(name, value)
    return done.score_uris
