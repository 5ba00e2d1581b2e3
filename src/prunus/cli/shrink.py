"""The verb that makes a model smaller by removing whole parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.flags import RecipeFile, with_flags
from prunus.cli.terminal import carry_out, user_errors
from prunus.runs.options import RunOptions
from prunus.structure.recipe import StructureRecipe


@with_flags(StructureRecipe, RunOptions)
def shrink(
    model: arg.Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the smaller checkpoint.")
    ],
    *,
    json_file: arg.Json = None,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Make MODEL smaller by removing whole parts.

    OUT is an ordinary checkpoint. Its configuration is smaller too, so it loads in transformers and
    everything else that loads the family. A run that was stopped or killed continues when you give
    the same command again.
    """
    with user_errors(json_file):
        from prunus.reporting.structure_section import structure_table
        from prunus.structure.run import run

        work, given = RunOptions.pick(options)
        chosen = StructureRecipe.read(recipe, given)
        made = (model, output, chosen)
        carry_out(run, f"shrink {output}", made, work, json_file, structure_table)
