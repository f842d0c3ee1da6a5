"""Compile the pipeline: ``python -m pipelines.compile [--pools pools.toml] [-o pipelines/recovery.yaml]``.

With ``--components FOLDER`` each component is written as a file of its own, for pipelines of other people (docs/components.md).
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Annotated

import typer
from kfp import compiler

import components
from camopd.errors import InputError
from pipelines.pods import write_pods
from pipelines.pools import load_pools
from pipelines.recovery import make_pipeline

COMMITTED = Path(__file__).with_name("recovery.yaml")


def compile_pipeline(target: Path, pools: Path | None = None) -> None:
    """Write the compiled pipeline; the same pools give the same bytes. Raises InputError for a bad pools file.

    With the committed file the number of its pods is written, which `camopd plan` reads (pipelines.pods).
    """
    compiler.Compiler().compile(make_pipeline(load_pools(pools)), str(target))
    if target == COMMITTED:
        write_pods(target)


def compile_components(folder: Path) -> list[Path]:
    """Write each component as ``<name>.yaml``, which ``kfp.components.load_component_from_file`` reads without this package."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in sorted(module.name for module in pkgutil.iter_modules(components.__path__)):
        written.append(folder / f"{name}.yaml")
        compiler.Compiler().compile(getattr(importlib.import_module(f"components.{name}"), name), str(written[-1]))
    return written


def main(
    pools: Annotated[Path | None, typer.Option(help="Pools file, such as pipelines/pools.example.toml; none is CPU.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The compiled file.")] = COMMITTED,
    components_folder: Annotated[
        Path | None, typer.Option("--components", help="Write each component alone into this folder, and no pipeline.")
    ] = None,
) -> None:
    """Compile the recovery pipeline for the pools of a cluster."""
    if components_folder:
        print(f"{components_folder}: {len(compile_components(components_folder))} components")
        return
    try:
        compile_pipeline(output.absolute(), pools)
    except InputError as error:
        raise SystemExit(str(error)) from None
    print(f"{output}: {output.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    typer.run(main)
