from kfp import dsl

from components import model_component


@model_component
def evaluate(rounds: list[str], headline: dsl.Output[dsl.Metrics], report: dsl.Output[dsl.HTML]) -> str:
    """Evaluate teacher, before and after with the same settings, decide at the gate and write the report.

    Args:
        rounds: Prefix of each round; the run is above them.
        headline: Scores, recovered and retained share.
        report: The whole report, readable offline.

    Returns:
        "pass" or "fail".
    """
    from camopd.workflow import evaluate

    done = evaluate(rounds[0].rpartition("/rounds/")[0])
    with open(report.path, "w", encoding="utf-8") as file:
        file.write(done.document)
    for name, value in done.metrics.items():
        headline.log_metric(name, value)
    return done.decision
