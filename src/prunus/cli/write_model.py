"""Commands that change a model: `prune`, `compress`, `shrink`, `recover`, and what `plan` says."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunus.cli.flags import Model, Output, RecipeFile, opt, with_flags
from prunus.cli.terminal import (
    is_quiet,
    print_result,
    print_text,
    progress_console,
    shown_steps,
)
from prunus.engine.run_options import RunOptions
from prunus.options import ADVANCED
from prunus.pruning.recipe import Recipe
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.reporting.console import show_pruning, show_recovery
from prunus.reporting.run_sections import structure_table
from prunus.reporting.tables import plan_facts, recovery_table
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.structure.structure_record import StructureRecipe

if TYPE_CHECKING:
    from prunus.engine.command import Command
    from prunus.engine.session import Session

    _Begun = tuple[Command[Any, Any], Callable[[Any, Session, Any], None] | None]

# Options of `plan` that only recover has, in the first panel of its own help.
_OF_RECOVER = ("mode", "text", "tokens", "minutes")


@with_flags(Recipe, RunOptions)
def prune(model: Model, output: Output, *, recipe: RecipeFile = None, **options: Any) -> None:
    """Prune MODEL block by block and write the result to OUT.

    A killed run continues with the same command. Under torchrun, processes share the work.
    """
    work, recipe_options = RunOptions.pick(options)
    chosen, how = Recipe.read(recipe, recipe_options), RunOptions.read(None, work)

    def begin(_: Session) -> _Begun:
        from prunus.pruning.prune import Pruning

        return Pruning(model, output, chosen, how), None

    _run_and_print(begin, output, f"{chosen.method} {output}")


@with_flags(CompressionRecipe, RunOptions, rare=("head_bits", "reconstruct", "seqlen"))
def compress(
    model: Model,
    output: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="NAME.gguf for llama.cpp, or a folder."),
    ],
    *,
    check: Annotated[
        bool,
        opt("Score OUT at the end beside MODEL, on prose and code.", names=("--check",)),
    ] = False,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Round the weights of MODEL to few bits: a GGUF file, or a folder.

    A folder is for vLLM, SGLang and transformers, or for MLX. A killed run continues with the same
    command.
    """
    work, recipe_options = RunOptions.pick(options)
    chosen = CompressionRecipe.read(recipe, recipe_options)
    how = RunOptions.read(None, work)
    chosen.check_early(model)

    def begin(session: Session) -> _Begun:
        from prunus.compression.compress import Compression
        from prunus.evaluation.check import prepared_check

        after = prepared_check(model, output, chosen, how, session) if check else None
        return Compression(model, output, chosen, how), after

    record = _run_and_print(begin, output, f"{chosen.target} {output}")
    from prunus.distributed import is_rank_0
    from prunus.formats.codec import codec_for
    from prunus.rounding.cards import commands

    if is_rank_0():
        codec = codec_for(output, chosen)
        print_text(codec.RESULT.advice(record))
        lines = commands({**codec.PROGRAMS, **codec.UPLOADS}, output).items()
        print_text("".join(f"{use + ':':<12} {command}\n" for use, command in lines))
        if not record.check:
            print_text(
                f"How much {output} loses was not measured: add --check to the same command.\n"
            )


@with_flags(StructureRecipe, RunOptions, without=("measure_error",))
def shrink(model: Model, output: Output, *, recipe: RecipeFile = None, **options: Any) -> None:
    """Make MODEL smaller by removing whole parts.

    OUT is an ordinary checkpoint with a smaller configuration, so it loads wherever the family
    loads. A killed run continues with the same command.
    """
    work, recipe_options = RunOptions.pick(options)
    chosen, how = StructureRecipe.read(recipe, recipe_options), RunOptions.read(None, work)

    def begin(_: Session) -> _Begun:
        from prunus.structure.shrink import Shrinking

        return Shrinking(model, output, chosen, how), None

    _run_and_print(begin, output, f"shrink {output}", structure_table)


def _run_and_print(
    begin: Callable[[Session], _Begun],
    output: Path,
    title: str,
    table: Callable[[Any], Any] = lambda record: record.table(),
) -> Any:
    """Carry out a command with a progress bar, print its record as a table, and return it.

    Args:
        begin: Returns the command, and `after` of `run_verb`. It loads what the command needs,
            which takes seconds, so it is called when the bar is there.
        output: The result.
        title: Title of the progress bar.
        table: From the record to its table.
    """
    with shown_steps(show_pruning(title, progress_console()), output) as callbacks:
        from prunus.engine.command import run_verb
        from prunus.engine.session import Session

        session = Session(**callbacks)
        command, after = begin(session)
        record = run_verb(command, session, after=after)
    print_result(record, table(record))
    return record


@with_flags(
    *(Recipe, CompressionRecipe, StructureRecipe, RecoveryOptions, RunOptions),
    without=("overwrite", "resume", "rank_timeout"),
    rare=("pattern", "format", "head_bits", "tune", "data", "experts", "blocks", *_OF_RECOVER),
)
def plan(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Folder or file for the result; only checked."),
    ] = None,
    *,
    command: Annotated[
        str | None,
        opt(
            "Plan prune, compress, shrink, recover or import. Default: the one whose options are "
            "given.",
            "COMMAND",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    tensor_types: Annotated[
        Path | None,
        opt(
            "Choose types for llama-quantize --tensor-type-file.",
            "FILE",
            rich_help_panel="GGUF files",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        opt("Write an importance matrix for llama-quantize.", "FILE", rich_help_panel="GGUF files"),
    ] = None,
    fits: Annotated[
        str | None,
        opt(
            "Plan the largest GGUF file with which llama.cpp takes at most SIZE, such as 8GB.",
            "SIZE",
        ),
    ] = None,
    context: Annotated[
        int | None,
        opt("With --fits: tokens of the context. Default: the model's.", "N"),
    ] = None,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Show what a run would do and cost; write no model.

    With --bits, --size, --type or --fits it plans compress, with --blocks or --experts shrink, with
    --mode or --text recover.
    """
    from prunus.cli.plan import plan as plan_command

    options |= {
        "command": command,
        "tensor_types": tensor_types,
        "imatrix": imatrix,
        "progress": not is_quiet(),
    }
    starting = time.process_time()
    described = plan_command(model, output, recipe=recipe, fits=fits, context=context, **options)
    if described["seconds"] is not None:
        described["seconds"] = round(described["seconds"] + starting, 1)
    print_result(described, plan_facts(described))


@with_flags(RecoveryOptions, RunOptions, without=("memory", "trust_remote_code", "measure_error"))
def recover(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub id of a dense or pruned model.")
    ],
    output: Output,
    teacher: Annotated[
        str | None, opt("Learn the logits of this dense model. Default: learn the text.", "DENSE")
    ] = None,
    **options: Any,
) -> None:
    """Recover quality by a short training that keeps the zeros.

    In mode lora, OUT is an adapter. A killed run continues with the same command. Under torchrun,
    processes split the windows of a step.
    """
    work, of_training = RunOptions.pick(options)
    RunOptions.read(None, work)
    RecoveryOptions.read(None, {"mode": "lora"} | of_training)  # which has all options
    title = f"{options.get('mode', 'recover')} {output}"
    with shown_steps(show_recovery(title, progress_console()), output) as callbacks:
        from prunus.recovery.recover import recover as train

        record = train(
            model,
            output,
            teacher=teacher,
            progress=callbacks["report"],
            announce=callbacks["announce"],
            **options,
        )
    print_result(record, recovery_table(record))
