"""Commands that let a model write: `generate`, and `serve` for clients of OpenAI's protocol."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import typer

from prunus.cli.flags import Model, opt, with_flags
from prunus.cli.terminal import log, print_text, write_json
from prunus.evaluation.options import TextOptions, WritingOptions
from prunus.options.declaration import ADVANCED

_ADVANCED: dict[str, Any] = {"rich_help_panel": ADVANCED}


@with_flags(WritingOptions)
def generate(
    model: Model,
    prompt: Annotated[str, opt("Continue this text; with --chat, answer it as a message.", "TEXT")],
    chat: Annotated[bool, opt("Use the model's chat template.", names=("--chat",))] = False,
    **options: Any,
) -> None:
    """Let a dense or packed model continue or answer a prompt.

    The text appears while the model writes it. prunus serve holds conversations.
    """
    from prunus.evaluation.generation import generate as generate_pieces

    text = _print_all(generate_pieces(model, prompt, chat=chat, **options))
    if text is not None:
        print_text("\n")
        write_json({"model": model, "prompt": prompt, "text": text})


def _print_all(pieces: Iterable[str]) -> str | None:
    """Print pieces as the model writes them; the whole text, or None once nobody needs it."""
    seen = []
    for piece in pieces:
        seen.append(piece)
        if not print_text(piece.replace("\r", "")):
            return None
    return "".join(seen)


@with_flags(TextOptions, only=("device", "dtype", "trust_remote_code"))
def serve(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint, dense or packed, adapter, or hub id."),
    ],
    *,
    host: Annotated[
        str,
        opt(
            "Listen on this address. One that other machines reach needs a key. Default: "
            "127.0.0.1.",
            "ADDRESS",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        opt("Listen on this TCP port, or a free one (0). Default: 8000.", "N", min=0, max=65535),
    ] = 8000,
    api_key: Annotated[
        str | None,
        opt(
            "Require this key in every request. Others can read it on a command line, but "
            "not in the environment. Default: none.",
            "KEY",
            names=("--api-key",),
            envvar="PRUNUS_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    name: Annotated[
        str | None,
        opt("Give the model this name. Default: the name of the folder, or the hub id.", "NAME"),
    ] = None,
    max_concurrent: Annotated[
        int,
        opt("Compute N requests at once, each in a thread; others wait. Default: 1.", "N"),
    ] = 1,
    max_waiting: Annotated[
        int,
        opt("Let N requests wait. Others get status 503. Default: 32.", "N", **_ADVANCED),
    ] = 32,
    log_level: Annotated[
        Literal["error", "warning", "info", "debug"],
        opt(
            "Log each request (info), only problems (warning, error), or more (debug). "
            "Default: info.",
            "LEVEL",
            **_ADVANCED,
        ),
    ] = "info",
    **options: Any,
) -> None:
    """Answer requests in OpenAI's protocol: chats, completions, streams.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/models, /health, /ready. Try it with:

    curl localhost:8000/v1/completions --json '{"prompt": "Once upon"}'

    SIGTERM and Ctrl-C end the server once the running requests are answered.
    """
    from prunus.serving.server import serve as serve_model

    # uvicorn says at the level "info" of its start and end what the server says itself.
    level = "WARNING" if log_level == "info" else log_level.upper()
    logging.basicConfig(format="prunus: %(message)s", level=level)
    logging.getLogger("prunus.serving").setLevel(log_level.upper())
    serve_model(
        model,
        name=name,
        host=host,
        port=port,
        api_key=api_key,
        max_concurrent=max_concurrent,
        max_waiting=max_waiting,
        log=log,
        **options,
    )
