"""Commands that store a checkpoint in another form: `import`, `pack` and `unpack`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunus.cli.flags import Model, Output, opt, with_flags
from prunus.cli.terminal import (
    note,
    print_result,
    print_text,
    progress_console,
    shown_steps,
    write_json,
)
from prunus.compression.records import PackOptions
from prunus.engine.options import RunOptions
from prunus.model.formats import format_named, format_of


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the checkpoint.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        opt("Store weights in bfloat16, float16 or float32. Default: bfloat16.", "DTYPE"),
    ] = "bfloat16",
    overwrite: Annotated[bool, opt("Replace DEST.", names=("--overwrite",))] = False,
) -> None:
    """Turn a GGUF file into a Hugging Face checkpoint.

    Quantised weights are dequantised to --dtype.
    """
    # A file without a suffix may be one all the same, such as a blob of Ollama.
    entry = format_of(file) or format_named("gguf")
    summary = entry.load().unpack(file, dest, overwrite=overwrite, dtype=dtype, progress=note)
    write_json(summary)
    print_text(f"{dest}: {', '.join(f'{key} {value}' for key, value in summary.items())}\n")


@with_flags(PackOptions, RunOptions, only=("values", "overwrite"))
def pack(model: Model, output: Output, **options: Any) -> None:
    """Store a pruned checkpoint in a compressed format.

    The packed model is smaller on disk and in memory, and it decodes faster.
    """
    from prunus.compression.pack import pack as pack_checkpoint

    _convert(pack_checkpoint, f"pack {output}", model, output, options)


@with_flags(RunOptions, only=("overwrite",))
def unpack(model: Model, output: Output, **options: Any) -> None:
    """Turn a packed checkpoint back into an ordinary one."""
    from prunus.compression.pack import unpack as unpack_checkpoint

    _convert(unpack_checkpoint, f"unpack {output}", model, output, options)


def _convert(
    convert: Callable[..., Any], title: str, model: str, output: Path, options: dict[str, Any]
) -> None:
    """Convert a checkpoint with a progress bar, and print how its size changes.

    `convert` is the function of the library that does it, and `options` are its keyword arguments.
    """
    from prunus.reporting.console import show_pruning
    from prunus.reporting.tables import packing_table

    with shown_steps(show_pruning(title, progress_console()), output) as callbacks:
        record = convert(model, output, progress=callbacks["report"], **options)
    print_result(record, packing_table(record))
