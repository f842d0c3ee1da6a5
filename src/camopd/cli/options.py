"""Arguments and options that several verbs share. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe: a TOML file, an s3:// URI of one, or a shipped name such as micro.")
]
RoundArgument = Annotated[str, typer.Argument(help="Prefix of the round, `<run>/rounds/0001`: a local folder or s3://.")]
RunArgument = Annotated[str, typer.Argument(help="Prefix of the run, as printed by prepare: a local folder or s3://.")]
SetOption = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting, e.g. -s train.learning_rate=1e-5.")
]


def parameters_of(assignments: list[str], option: str = "--set") -> dict[str, str]:
    pairs = [assignment.partition("=") for assignment in assignments]
    wrong = [key for key, sign, _ in pairs if not sign]
    if wrong:
        raise typer.BadParameter(f"write KEY=VALUE, not {wrong[0]!r}", param_hint=option)
    return {key: value for key, _, value in pairs}


def place_of(text: str) -> str:
    """A location as typed in a shell: a relative folder is relative to here."""
    from camopd.store import check_uri

    try:
        return check_uri(text if "://" in text else str(Path(text).absolute()))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
