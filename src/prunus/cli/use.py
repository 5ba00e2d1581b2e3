"""Commands that use a model, or store it in another form: `generate`, `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunus.cli.flags import Model, opt, with_flags
from prunus.cli.terminal import note, print_text, write_json
from prunus.evaluation.eval_options import WritingOptions
from prunus.model.formats import reader_of


@with_flags(WritingOptions)
def generate(
    model: Model,
    prompt: Annotated[
        str,
        opt(
            "Continue this text; with --chat, answer it as a message.",
            "TEXT",
            names=("--prompt", "-p"),
        ),
    ],
    chat: Annotated[bool, opt("Use the model's chat template.", names=("--chat",))] = False,
    **options: Any,
) -> None:
    """Let a model continue or answer a prompt, also a compressed one.

    The text appears while the model writes it.
    """
    WritingOptions.read(None, options)
    from prunus.evaluation.generation import generate as generate_pieces

    pieces = []
    for piece in generate_pieces(model, prompt, chat=chat, progress=note, **options):
        pieces.append(piece)
        if not print_text(piece.replace("\r", "")):
            return  # nobody reads the text any more
    print_text("\n")
    write_json({"model": model, "prompt": prompt, "text": "".join(pieces)})


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the checkpoint.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        opt("Store weights in bfloat16, float16 or float32. Default: bfloat16.", "DTYPE"),
    ] = "bfloat16",
    overwrite: Annotated[
        bool, opt("Replace an earlier import in DEST.", names=("--overwrite",))
    ] = False,
) -> None:
    """Turn a GGUF file into a Hugging Face checkpoint.

    Quantised weights are dequantised to --dtype.
    """
    from prunus.formats.gguf.import_checkpoint import import_gguf

    reader_of(file)  # a packed folder of an earlier version is refused
    summary = import_gguf(file, dest, overwrite=overwrite, dtype=dtype, progress=note)
    write_json(summary)
    print_text(f"{dest}: {', '.join(f'{key} {value}' for key, value in summary.items())}\n")
