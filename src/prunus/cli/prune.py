"""Verbs of a pruning run: `prune`, `compress`, and `plan`, which writes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.recipe_options import COMPRESSION, RecipeFile, chosen_recipe, takes_recipe
from prunus.cli.terminal import Counted, print_result, progress_console, user_errors

__all__ = ["compress", "plan", "prune"]

_MAX_PRESET = "Preset max"


_Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="Insist on resuming an unfinished run, or refuse to. Default: resume if the "
        "options are the same.",
    ),
]


@takes_recipe(without=COMPRESSION)
def prune(
    model: arg.Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the pruned checkpoint.")
    ],
    *,
    data_dir: arg.DataDir = None,
    device: arg.Device = "auto",
    memory: arg.Memory = None,
    overwrite: arg.Overwrite = False,
    resume: _Resume = None,
    json_file: arg.Json = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_MAX_PRESET,
            help="Minutes of training after pruning. Default: 20.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_MAX_PRESET,
            help="Tokens of training after pruning, in place of --minutes.",
        ),
    ] = None,
    recipe: RecipeFile = None,
    trust_remote_code: arg.Trust = False,
    rank_timeout: arg.RankTimeout = None,
    **options: Any,
) -> None:
    """Prune MODEL block by block and write the result to OUT.

    A run that was stopped or killed continues when you give the same command again. Under torchrun
    (torchrun --nproc-per-node 8 -m prunus prune …) several processes share the work.
    """
    with user_errors(json_file):
        trains = _takes_max(options)
        if not trains and (minutes is not None or tokens is not None):
            raise ValueError(
                "--minutes and --tokens are the budget of --preset max, which trains after "
                "pruning: add it, or drop them"
            )
        chosen = chosen_recipe(recipe, options)
        if chosen.bits is not None:
            raise ValueError(
                f"the recipe has bits = {chosen.bits:g}, which makes a compressed checkpoint: use "
                "prunus compress, or take bits out of the recipe"
            )
        how = _run_options(device, memory, data_dir, trust_remote_code, rank_timeout)
        if trains:
            budget = {"minutes": minutes, "tokens": tokens}
            _prune_and_recover(model, output, chosen, how, budget, overwrite, resume, json_file)
        else:
            _carry_out(model, output, chosen, how, overwrite, resume, json_file)


@takes_recipe(without=("preset",))
def compress(
    model: arg.Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the compressed checkpoint.")
    ],
    *,
    data_dir: arg.DataDir = None,
    device: arg.Device = "auto",
    memory: arg.Memory = None,
    overwrite: arg.Overwrite = False,
    resume: _Resume = None,
    json_file: arg.Json = None,
    recipe: RecipeFile = None,
    trust_remote_code: arg.Trust = False,
    rank_timeout: arg.RankTimeout = None,
    **options: Any,
) -> None:
    """Compress MODEL to a number of bits per weight, packed.

    Zeros and levels are chosen together: weights that do not repay their bits become 0, and the
    bits go to the linears and rows where they lower the loss most. The result loads with plain
    from_pretrained after `import prunus`. A run that was stopped continues when you give the same
    command again.
    """
    with user_errors(json_file):
        chosen = chosen_recipe(recipe, options)
        if chosen.bits is None:
            raise ValueError("prunus compress needs a size: give --bits 3, for example")
        how = _run_options(device, memory, data_dir, trust_remote_code, rank_timeout)
        _carry_out(model, output, chosen, how, overwrite, resume, json_file)


def _takes_max(options: dict[str, Any]) -> bool:
    """Whether the preset is max, whose pruning is that of best: `options` say best afterwards.

    A recipe file may then change options of the pruning, as flags may.
    """
    trains = options["preset"] == "max"
    if trains:
        options["preset"] = "best"
    return trains


def _carry_out(
    model: str,
    output: Path,
    recipe: Any,
    how: Any,
    overwrite: bool,
    resume: bool | None,
    json_file: Path | None,
) -> None:
    """Run a recipe with a progress bar, and print its result."""
    from prunus.pruning.run import run
    from prunus.reporting.progress import show_pruning
    from prunus.reporting.tables import run_table

    work = recipe.method if recipe.bits is None else f"{recipe.bits:g} bits"
    with show_pruning(f"{work} {output}", progress_console()) as progress:
        steps = Counted(progress)
        manifest = run(
            model,
            output,
            recipe,
            replace(how, announce=progress),
            overwrite=overwrite,
            resume=resume,
            progress=steps,
        )
    steps.log_if_none(output)
    print_result(run_table(manifest), json_file, manifest.model_dump(mode="json"))


def _prune_and_recover(
    model: str,
    output: Path,
    recipe: Any,
    how: Any,
    budget: dict[str, Any],
    overwrite: bool,
    resume: bool | None,
    json_file: Path | None,
) -> None:
    """Carry out preset max with a progress bar for each phase, and print both results."""
    from rich.console import Group

    from prunus.recovery.max_preset import max_run
    from prunus.reporting.progress import show_pruning, show_recovery
    from prunus.reporting.recovery_tables import recovery_table
    from prunus.reporting.tables import run_table

    with max_run(
        model, output, recipe, how, overwrite=overwrite, resume=resume, **budget
    ) as checked:
        with show_pruning(f"{recipe.method} {output}", progress_console()) as progress:
            manifest = checked.prune(progress, announce=progress)
        with show_recovery(f"training {output}", progress_console()) as progress_of_training:
            steps = Counted(progress_of_training)
            record = checked.train(steps)
    steps.log_if_none(output)
    figures = {
        "pruning": manifest.model_dump(mode="json"),
        "recovery": record.model_dump(mode="json"),
    }
    print_result(Group(run_table(manifest), recovery_table(record)), json_file, figures)


@takes_recipe()
def plan(
    model: arg.Model,
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Where the result would be; checked, not written."),
    ] = None,
    *,
    data_dir: arg.DataDir = None,
    device: arg.Device = "auto",
    memory: arg.Memory = None,
    json_file: arg.Json = None,
    recipe: RecipeFile = None,
    trust_remote_code: arg.Trust = False,
    **options: Any,
) -> None:
    """Show what prune or compress would do and cost; write nothing.

    Everything that they check before their first block is checked here as well.
    """
    with user_errors(json_file):
        from prunus.pruning.plan import check_run
        from prunus.pruning.plan_summary import describe_plan
        from prunus.reporting.tables import plan_table

        trains = _takes_max(options)
        chosen = chosen_recipe(recipe, options)
        how = _run_options(device, memory, data_dir, trust_remote_code)
        described = describe_plan(check_run(model, output, chosen, how).job)
        if trains:
            from prunus.recovery.max_preset import plan_training

            described["training"] = plan_training(model, output, chosen, how)
        print_result(plan_table(described), json_file, described)


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
