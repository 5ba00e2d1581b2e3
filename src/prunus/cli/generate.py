"""The command `generate`, which lets a model write."""

from __future__ import annotations

from typing import Annotated, Any

from prunus.cli.flags import Model, opt, with_flags
from prunus.cli.terminal import note, print_text, write_json
from prunus.evaluation.eval_options import WritingOptions


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
    from prunus.evaluation.generation import generate as generate_pieces

    pieces = []
    for piece in generate_pieces(model, prompt, chat=chat, progress=note, **options):
        pieces.append(piece)
        if not print_text(piece.replace("\r", "")):
            return  # nobody reads the text any more
    print_text("\n")
    write_json({"model": model, "prompt": prompt, "text": "".join(pieces)})
