"""Verbs that store a checkpoint in another form: `import`, `pack` and `unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunus.cli.flags import Model, Output, opt, with_flags
from prunus.cli.terminal import (
    counted_steps,
    is_quiet,
    note,
    print_result,
    print_text,
    progress_console,
    write_json,
)
from prunus.compression.records import PackOptions
from prunus.runs.options import RunOptions

if TYPE_CHECKING:
    from prunus.evaluation.records import PerplexityResult


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the checkpoint.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        opt(
            "Dtype of the stored weights: bfloat16, float16 or float32. Default: bfloat16.", "DTYPE"
        ),
    ] = "bfloat16",
    overwrite: Annotated[bool, opt("Replace DEST.", names=("--overwrite",))] = False,
) -> None:
    """Turn a GGUF file into a Hugging Face checkpoint.

    Quantised weights are dequantised to --dtype.
    """
    from prunus.model.checkpoint.gguf import import_gguf

    summary = import_gguf(file, dest, overwrite=overwrite, dtype=dtype, progress=note)
    write_json(summary)
    print_text(f"{dest}: {', '.join(f'{key} {value}' for key, value in summary.items())}\n")


@with_flags(PackOptions, RunOptions, only=("values", "data", "overwrite"))
def pack(
    model: Model,
    output: Output,
    *,
    perplexity: Annotated[
        str,
        opt(
            "With int8, score MODEL and OUT on this text (as for eval) to show the cost "
            "of rounding; none: do not. Default: python-docs.",
            "TEXT",
        ),
    ] = "python-docs",
    seqlen: Annotated[int, opt("Tokens per window of that score. Default: 512.", "N")] = 512,
    samples: Annotated[int, opt("Windows of that score. Default: 8.", "N")] = 8,
    **options: Any,
) -> None:
    """Store a pruned checkpoint in a compressed format.

    Bitmaps mark the kept weights. The packed model is smaller on disk and in memory, and it decodes
    faster.
    """
    from prunus.compression.pack import pack as pack_checkpoint
    from prunus.evaluation.perplexity import perplexity as measure_perplexity
    from prunus.reporting.console import show_pruning
    from prunus.reporting.tables import packing_table

    windows: dict[str, Any] = {
        "seqlen": seqlen,
        "samples": samples,
        "data": options.pop("data", None),
    }

    def score(folder: str | Path) -> PerplexityResult:
        note(f"scoring {folder} on {perplexity}")
        return measure_perplexity(folder, perplexity, progress=not is_quiet(), **windows)

    is_scored = options.get("values") == "int8" and perplexity != "none"
    # MODEL is scored before OUT is written: a text that cannot be scored fails early.
    try:
        before = score(model) if is_scored else None
    except ValueError as error:
        raise ValueError(f"{error} (--perplexity none packs without scoring)") from error
    title = f"pack {output}"
    with show_pruning(title, progress_console()) as show, counted_steps(output, show) as step:
        record = pack_checkpoint(model, output, progress=step, **options)
    content = record.model_dump(mode="json")
    scores = ""
    if before is not None:
        after = score(output)
        content["perplexity"] = [before.as_dict(), after.as_dict()]
        change = f"{before.perplexity:.3f} before, {after.perplexity:.3f} with int8 values"
        scores = f"perplexity {change} ({after.protocol})"
    print_result(content, packing_table(record, scores))


@with_flags(RunOptions, only=("overwrite",))
def unpack(model: Model, output: Output, **options: Any) -> None:
    """Turn a packed checkpoint back into an ordinary one."""
    from prunus.compression.pack import unpack as unpack_checkpoint
    from prunus.reporting.console import show_pruning
    from prunus.reporting.tables import packing_table

    title = f"unpack {output}"
    with show_pruning(title, progress_console()) as show, counted_steps(output, show) as step:
        record = unpack_checkpoint(model, output, progress=step, **options)
    print_result(record, packing_table(record))
