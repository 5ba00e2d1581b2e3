"""Commands that let a model write: `generate`, and `serve` for clients of OpenAI's protocol."""

from __future__ import annotations

from typing import Annotated, Any

from prunus.cli.flags import Model, opt, with_flags
from prunus.cli.terminal import log, note, print_text, write_json
from prunus.evaluation.options import TextOptions, WritingOptions


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
    """Let a dense or packed model continue or answer a prompt.

    The text appears while the model writes it. prunus serve holds conversations.
    """
    from prunus.evaluation.generation import generate as generate_pieces

    pieces = []
    for piece in generate_pieces(model, prompt, chat=chat, progress=note, **options):
        pieces.append(piece)
        if not print_text(piece.replace("\r", "")):
            return  # nobody reads the text any more
    print_text("\n")
    write_json({"model": model, "prompt": prompt, "text": "".join(pieces)})


@with_flags(TextOptions, only=("device", "dtype", "trust_remote_code"))
def serve(
    model: Model,
    *,
    host: Annotated[
        str,
        opt(
            "Listen on this address. The server asks for no key: let other machines reach it "
            "through a proxy that does. Default: 127.0.0.1.",
            "ADDRESS",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        opt("Listen on this TCP port, or a free one (0). Default: 8000.", "N", min=0, max=65535),
    ] = 8000,
    **options: Any,
) -> None:
    """Answer chats in OpenAI's protocol, by transformers serve.

    Clients call the model, dense or packed, as you write it here. Try it with:

    curl localhost:8000/v1/completions --json '{"prompt": "Once upon"}'

    prunus checks the model first, and nothing is downloaded while the server runs.
    """
    from prunus.serving.server import serve as serve_model

    serve_model(model, host=host, port=port, log=log, **options)
