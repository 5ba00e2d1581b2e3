"""Verbs that prune, say what pruning would do, and look at what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.recipe_options import chosen_recipe, takes_recipe
from prunus.cli.terminal import for_people, show

__all__ = ["inspect", "plan", "prune"]


@takes_recipe
def prune(
    model: arg.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned checkpoint.")],
    *,
    device: arg.Device = "auto",
    memory: arg.Memory = None,
    data_dir: arg.DataDir = None,
    recipe: arg.RecipeFile = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Insist on resuming, or refuse to; by default a matching unfinished run is resumed.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result of prunus in OUT.")] = False,
    trust_remote_code: arg.Trust = False,
    json_file: arg.Json = None,
    **options: Any,
) -> None:
    """Prune MODEL into OUT, block by block. Killed or stopped, the same command goes on where it was."""
    with for_people(json_file):
        from prunus.report.progress import show_progress
        from prunus.report.tables import run_table
        from prunus.run import run

        chosen = chosen_recipe(recipe, options)
        how = _run_options(device, memory, data_dir, trust_remote_code)
        with show_progress(f"{chosen.method} {output}") as progress:
            manifest = run(model, output, chosen, how, overwrite=overwrite, resume=resume, progress=progress)
        show(run_table(manifest), json_file, manifest.model_dump(mode="json"))


@takes_recipe
def plan(
    model: arg.Model,
    output: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Where the result would go; checked, not written.")
    ] = None,
    *,
    device: arg.Device = "auto",
    memory: arg.Memory = None,
    data_dir: arg.DataDir = None,
    recipe: arg.RecipeFile = None,
    trust_remote_code: arg.Trust = False,
    json_file: arg.Json = None,
    **options: Any,
) -> None:
    """Check what `prune` would check, say what it would do and cost, and write nothing."""
    with for_people(json_file):
        from prunus.report.tables import plan_table
        from prunus.run import check
        from prunus.sharing import planned

        chosen = chosen_recipe(recipe, options)
        job, _ = check(model, output, chosen, _run_options(device, memory, data_dir, trust_remote_code))
        described = job.describe() | {"allocation": planned(job)}
        show(plan_table(described), json_file, described)


def inspect(model: arg.Model, trust_remote_code: arg.Trust = False, json_file: arg.Json = None) -> None:
    """Show every linear of MODEL: shape, dtype, sparsity, and which N:M patterns hold."""
    with for_people(json_file):
        from prunus.inspection import inspect as look
        from prunus.report.tables import inspection_table

        found = look(model, trust_remote_code=trust_remote_code)
        show(inspection_table(found), json_file, found.as_dict())


def _run_options(device: str, memory: str | None, data_dir: Path | None, trust_remote_code: bool) -> Any:
    from prunus.plan import RunOptions
    from prunus.recipe import parse_bytes

    return RunOptions(
        device=device,
        memory=parse_bytes(memory) if memory is not None else None,
        data_dir=data_dir,
        trust_remote_code=trust_remote_code,
    )
