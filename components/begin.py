from components import component


@component
def begin(round_uri: str) -> str:
    """Decide, from manifests alone, whether a round may start. Needs no GPU: everything dear stands behind it.

    Args:
        round_uri: Prefix of the round.

    Returns:
        "go", "shards" (go, with several pods that sample and score), "done" (the round is finished) or "stop" (the run stopped
        itself). A missing predecessor is an error.
    """
    from camopd.workflow import begin

    return begin(round_uri)
