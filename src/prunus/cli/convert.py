"""The command `import`, which stores a GGUF file as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from prunus.cli.flags import opt
from prunus.cli.terminal import note, print_text, write_json
from prunus.model.formats import refuse_packed


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
    from prunus.formats.gguf.import_checkpoint import import_gguf

    refuse_packed(file)
    summary = import_gguf(file, dest, overwrite=overwrite, dtype=dtype, progress=note)
    write_json(summary)
    print_text(f"{dest}: {', '.join(f'{key} {value}' for key, value in summary.items())}\n")
