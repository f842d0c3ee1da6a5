from kfp import dsl

from components import component


@component
def promote(rounds: list[str], release: dsl.Output[dsl.Artifact]) -> None:
    """Copy the recovered model to a prefix of its own, register it, and move the alias, as the recipe's policy says.

    Args:
        rounds: Prefix of each round; the run is above them.
        release: A pointer: name, version and alias in its metadata.
    """
    from camopd.workflow import promote

    done = promote(rounds[0].rpartition("/rounds/")[0])
    release.metadata.update(done.release)
    with open(release.path, "w", encoding="utf-8") as file:
        file.write(done.document)
