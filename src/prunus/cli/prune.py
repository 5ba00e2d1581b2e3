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
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the pruned checkpoint.")
    ],
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
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier result of prunus in OUT.")
    ] = False,
    trust_remote_code: arg.Trust = False,
    rank_timeout: arg.RankTimeout = None,
    json_file: arg.Json = None,
    **options: Any,
) -> None:
    """Prune MODEL into OUT, block by block. Killed or stopped, the same command goes on where it was.

    Started by torchrun (torchrun --nproc-per-node 8 -m prunus prune …), the processes share the work.
    """
    with for_people(json_file):
        from prunus.pruning.run import run
        from prunus.report.progress import show_progress
        from prunus.report.tables import run_table

        chosen = chosen_recipe(recipe, options)
        how = _run_options(device, memory, data_dir, trust_remote_code, rank_timeout)
        with show_progress(f"{chosen.method} {output}") as progress:
            manifest = run(
                model, output, chosen, how, overwrite=overwrite, resume=resume, progress=progress
            )
        show(run_table(manifest), json_file, manifest.model_dump(mode="json"))


@takes_recipe
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Checkpoint folder, or hub id; instead of --model-shape."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="Where the result would go; checked, not written."),
    ] = None,
    *,
    device: arg.Device = "auto",
    memory: arg.Memory = None,
    data_dir: arg.DataDir = None,
    recipe: arg.RecipeFile = None,
    model_shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Forecast a run on a model that is not at hand: smollm2-135m, llama-7b, -13b, -30b, -65b, llama2-70b, "
            "llama3-8b, -70b, -405b.",
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="[N x]WHAT",
            help="For --model-shape: 8xh100, a100, h200 (a rank each; vendors' figures, not measured), 2-cores, "
            "4x8-cores (ranks of so many cores).",
            show_default="this machine's cores",
        ),
    ] = None,
    trust_remote_code: arg.Trust = False,
    json_file: arg.Json = None,
    **options: Any,
) -> None:
    """Check what `prune` would check, say what it would do and cost, and write nothing."""
    with for_people(json_file):
        if (model is None) == (model_shape is None):
            raise ValueError(
                "give either MODEL, which is looked at, or --model-shape, for which no checkpoint is needed"
            )
        if model is None:
            assert model_shape is not None
            _forecast(model_shape, devices, chosen_recipe(recipe, options), json_file)
            return
        if devices is not None:
            raise ValueError(
                "--devices belongs to --model-shape: a MODEL at hand is planned for this machine"
            )
        from prunus.pruning.allocate import planned_allocation
        from prunus.pruning.run import check_run
        from prunus.report.tables import plan_table

        chosen = chosen_recipe(recipe, options)
        job, _ = check_run(
            model, output, chosen, _run_options(device, memory, data_dir, trust_remote_code)
        )
        described = job.describe() | {"allocation": planned_allocation(job)}
        show(plan_table(described), json_file, described)


def _forecast(name: str, devices: str | None, recipe: Any, json_file: Path | None) -> None:
    import os

    from prunus.hardware.rates import parse_devices
    from prunus.pruning.forecast import find_shape, forecast
    from prunus.report.tables import forecast_table

    chosen = parse_devices(devices or f"{os.cpu_count() or 1}-cores")
    found = forecast(
        find_shape(name), chosen, recipe.method, recipe.samples, recipe.seqlen, recipe.batch
    )
    what = f"{recipe.method} on {name}, {recipe.samples} windows of {recipe.seqlen} tokens"
    show(forecast_table(what, found), json_file, {"shape": name, "method": recipe.method} | found)


def inspect(
    model: arg.Model, trust_remote_code: arg.Trust = False, json_file: arg.Json = None
) -> None:
    """Show every linear of MODEL: shape, dtype, sparsity, and which N:M patterns hold."""
    with for_people(json_file):
        from prunus.evaluation.inspection import inspect as look
        from prunus.report.tables import inspection_table

        found = look(model, trust_remote_code=trust_remote_code)
        show(inspection_table(found), json_file, found.as_dict())


def _run_options(
    device: str,
    memory: str | None,
    data_dir: Path | None,
    trust_remote_code: bool,
    rank_timeout: float | None = None,
) -> Any:
    from prunus.hardware.sizes import parse_bytes
    from prunus.pruning.job import RunOptions

    return RunOptions(
        device=device,
        memory=parse_bytes(memory) if memory is not None else None,
        data_dir=data_dir,
        trust_remote_code=trust_remote_code,
        rank_timeout=rank_timeout,
    )
