"""Verbs that prune, say what pruning would do, and look at what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.terminal import for_people, show

__all__ = ["inspect", "plan", "prune"]


def prune(
    model: arg.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned checkpoint.")],
    method: arg.Method = None,
    sparsity: arg.Sparsity = None,
    pattern: arg.PatternOption = None,
    group: arg.Group = None,
    calibration: arg.Calibration = None,
    samples: arg.Samples = None,
    seqlen: arg.Seqlen = None,
    seed: arg.Seed = None,
    batch: arg.Batch = None,
    dtype: arg.Dtype = None,
    device: arg.Device = "auto",
    propagate: arg.Propagate = None,
    head: arg.Head = None,
    only: arg.Only = None,
    ignore: arg.Ignore = None,
    mask_from: arg.MaskFrom = None,
    mask_order: arg.MaskOrder = None,
    damping: arg.Damping = None,
    ria_power: arg.RiaPower = None,
    iterations: arg.Iterations = None,
    refine: arg.Refine = None,
    refine_rounds: arg.RefineRounds = None,
    update: arg.Update = None,
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
) -> None:
    """Prune MODEL into OUT, block by block. Killed or stopped, the same command goes on where it was."""
    values = _recipe_values(locals())
    with for_people(json_file):
        from prunus.recipe import load_recipe
        from prunus.report.progress import show_progress
        from prunus.report.tables import run_table
        from prunus.run import run

        chosen = load_recipe(recipe, values)
        options = _run_options(device, memory, data_dir, trust_remote_code)
        with show_progress(f"{chosen.method} {output}") as progress:
            manifest = run(
                model, output, chosen, options, overwrite=overwrite, resume=resume, progress=progress
            )
        show(run_table(manifest), json_file, manifest.model_dump(mode="json"))


def plan(
    model: arg.Model,
    output: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Where the result would go; checked, not written.")
    ] = None,
    method: arg.Method = None,
    sparsity: arg.Sparsity = None,
    pattern: arg.PatternOption = None,
    group: arg.Group = None,
    calibration: arg.Calibration = None,
    samples: arg.Samples = None,
    seqlen: arg.Seqlen = None,
    seed: arg.Seed = None,
    batch: arg.Batch = None,
    dtype: arg.Dtype = None,
    device: arg.Device = "auto",
    propagate: arg.Propagate = None,
    head: arg.Head = None,
    only: arg.Only = None,
    ignore: arg.Ignore = None,
    mask_from: arg.MaskFrom = None,
    mask_order: arg.MaskOrder = None,
    damping: arg.Damping = None,
    ria_power: arg.RiaPower = None,
    iterations: arg.Iterations = None,
    refine: arg.Refine = None,
    refine_rounds: arg.RefineRounds = None,
    update: arg.Update = None,
    memory: arg.Memory = None,
    data_dir: arg.DataDir = None,
    recipe: arg.RecipeFile = None,
    trust_remote_code: arg.Trust = False,
    json_file: arg.Json = None,
) -> None:
    """Check what `prune` would check, say what it would do and cost, and write nothing."""
    values = _recipe_values(locals())
    with for_people(json_file):
        from prunus.recipe import load_recipe
        from prunus.report.tables import plan_table
        from prunus.run import check

        chosen = load_recipe(recipe, values)
        job, _ = check(model, output, chosen, _run_options(device, memory, data_dir, trust_remote_code))
        described = job.describe()
        show(plan_table(described), json_file, described)


def inspect(model: arg.Model, trust_remote_code: arg.Trust = False, json_file: arg.Json = None) -> None:
    """Show every linear of MODEL: shape, dtype, sparsity, and which N:M patterns hold."""
    with for_people(json_file):
        from prunus.inspection import inspect as look
        from prunus.report.tables import inspection_table

        found = look(model, trust_remote_code=trust_remote_code)
        show(inspection_table(found), json_file, found.as_dict())


def _recipe_values(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a verb that are fields of a recipe."""
    from prunus.recipe import Recipe

    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
        if name in Recipe.model_fields
    }


def _run_options(device: str, memory: str | None, data_dir: Path | None, trust_remote_code: bool) -> Any:
    from prunus.plan import RunOptions
    from prunus.recipe import parse_bytes

    return RunOptions(
        device=device,
        memory=parse_bytes(memory) if memory is not None else None,
        data_dir=data_dir,
        trust_remote_code=trust_remote_code,
    )
