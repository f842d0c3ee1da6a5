from components import component


@component
def begin(round_uri: str, job: str = "") -> str:
    """Decide, from the run's records alone, whether a round may start. Needs no GPU: everything dear stands behind it.

    Args:
        round_uri: Prefix of the round.
        job: Id of this pipeline run, which says here that it is still at work.

    Returns:
        "go", "shards" (go, with several pods that sample and score), "colocated" (one pod does every round), "done" (the round
        is finished) or "stop" (the run stopped itself). A missing predecessor is an error.
    """
    from camopd.workflow import begin

    return begin(round_uri, job=job)
