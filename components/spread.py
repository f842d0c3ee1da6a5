from components import component


@component
def spread(round_uri: str) -> list[str]:
    """Say which parts of a round's sampling pods may work on side by side. Needs no GPU.

    Args:
        round_uri: Prefix of the round.

    Returns:
        One prefix a shard.
    """
    from camopd.workflow import spread

    return spread(round_uri)
