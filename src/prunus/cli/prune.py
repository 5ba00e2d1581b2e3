"""Verbs of a pruning run: `prune`, `compress`, and `plan`, which writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.flags import RecipeFile, opt, with_flags
from prunus.cli.terminal import Counted, carry_out, print_result, progress_console, user_errors
from prunus.compression.recipe import CompressionRecipe
from prunus.pruning.recipe import Recipe
from prunus.runs.options import RunOptions

_MAX_PRESET = "Preset max"


@with_flags(Recipe, RunOptions)
def prune(
    model: arg.Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the pruned checkpoint.")
    ],
    *,
    minutes: Annotated[
        float | None,
        opt("Train for this number of minutes after pruning. Default: 20.", panel=_MAX_PRESET),
    ] = None,
    tokens: Annotated[
        int | None,
        opt(
            "Train on this number of tokens after pruning, in place of --minutes.",
            panel=_MAX_PRESET,
        ),
    ] = None,
    json_file: arg.Json = None,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Prune MODEL block by block and write the result to OUT.

    A run that was stopped or killed continues when you give the same command again. Under torchrun
    (torchrun --nproc-per-node 8 -m prunus prune …) several processes share the work.
    """
    with user_errors(json_file):
        work, given = RunOptions.pick(options)
        trains = _takes_max(given)
        if not trains and (minutes is not None or tokens is not None):
            raise ValueError(
                "--minutes and --tokens are the budget of --preset max, which trains after "
                "pruning: add it, or drop them"
            )
        chosen = Recipe.read(recipe, given)
        if trains:
            budget = {"minutes": minutes, "tokens": tokens}
            _prune_and_recover(model, output, chosen, _how(work), budget, json_file)
            return
        from prunus.pruning.run import run

        carry_out(
            run, f"{chosen.method} {output}", (model, output, chosen), work, json_file, _table
        )


@with_flags(CompressionRecipe, RunOptions)
def compress(
    model: arg.Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the compressed checkpoint.")
    ],
    *,
    json_file: arg.Json = None,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Compress MODEL to a number of bits per weight, packed.

    Zeros and levels are chosen together: weights that do not repay their bits become 0, and linears
    and rows in which bits lower the loss most get more of them. The result loads with plain
    from_pretrained after `import prunus`. A run that was stopped continues when you give the same
    command again.
    """
    with user_errors(json_file):
        from prunus.compression.run import run

        work, given = RunOptions.pick(options)
        if given["bits"] is None and recipe is None:
            raise ValueError("prunus compress needs a size: give --bits 3, for example")
        chosen = CompressionRecipe.read(recipe, given)
        title = f"{chosen.bits:g} bits {output}"
        carry_out(run, title, (model, output, chosen), work, json_file, _table)


def _table(record: Any) -> Any:
    return record.table()


def _how(work: dict[str, Any]) -> RunOptions:
    """The options of a run from the flags that were given."""
    return RunOptions.read(None, work)


def _takes_max(options: dict[str, Any]) -> bool:
    """Whether the preset is max, whose pruning is that of best: `options` say best afterwards.

    A recipe file may then change options of the pruning, as flags may.
    """
    trains = options["preset"] == "max"
    if trains:
        options["preset"] = "best"
    return trains


def _prune_and_recover(
    model: str,
    output: Path,
    recipe: Recipe,
    how: RunOptions,
    budget: dict[str, Any],
    json_file: Path | None,
) -> None:
    """Carry out preset max with a progress bar for each phase, and print both results."""

    from prunus.recovery.max_preset import max_run
    from prunus.reporting.progress import show_pruning, show_recovery
    from prunus.reporting.tables import recovery_table

    with max_run(model, output, recipe, how, **budget) as (prune_first, train):
        with show_pruning(f"{recipe.method} {output}", progress_console()) as progress:
            manifest = prune_first(progress, progress)
        with show_recovery(f"training {output}", progress_console()) as progress_of_training:
            steps = Counted(progress_of_training)
            record = train(steps)
    steps.log_if_none(output)
    figures = {
        "pruning": manifest.model_dump(mode="json"),
        "recovery": record.model_dump(mode="json"),
    }
    print_result([manifest.table(), recovery_table(record)], json_file, figures)


@with_flags(Recipe, CompressionRecipe, RunOptions, without=("overwrite", "resume", "rank_timeout"))
def plan(
    model: arg.Model,
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Where the result would go; checked, not written."),
    ] = None,
    *,
    json_file: arg.Json = None,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Show what prune or compress would do and cost; write nothing.

    With --bits it plans compress. All that they check before their first block is checked here too.
    """
    with user_errors(json_file):
        from prunus.compression.job import CompressionJob
        from prunus.pruning.job import PruningJob, describe_plan, plan_run
        from prunus.reporting.tables import plan_facts
        from prunus.runs.folder import find_earlier
        from prunus.runs.plan import check_room

        work, given = RunOptions.pick(options)
        trains, how = _takes_max(given), _how(work)
        compresses = given["bits"] is not None
        verb = CompressionRecipe if compresses else Recipe
        chosen = verb.read(recipe, _of(verb, given))
        kind: type[PruningJob] = CompressionJob if compresses else PruningJob
        if output is not None:
            find_earlier(kind.RECORD, output, chosen, how, Path(model))
        job = plan_run(model, chosen, how, kind)
        if output is not None:
            check_room(job, output)
        described = describe_plan(job)
        if trains:
            from prunus.recovery.max_preset import plan_training

            assert isinstance(chosen, Recipe), "compress has no preset"

            described["training"] = plan_training(model, output, chosen, how)
        print_result(plan_facts(described), json_file, described)


def _of(verb: type[Recipe] | type[CompressionRecipe], given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, without those of the other verb that were not."""
    own, others = verb.pick(given)
    return own | {name: value for name, value in others.items() if value is not None}
