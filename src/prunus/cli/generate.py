"""Verbs that let a model write: `generate`, and `serve` for clients of OpenAI's protocol."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import typer

from prunus.cli.flags import Model, opt, with_flags
from prunus.cli.terminal import log, print_text, write_json
from prunus.evaluation.options import TextOptions, WritingOptions

#: What a user types to end a conversation.
_END = ("/exit", "/quit")


@with_flags(WritingOptions)
def generate(
    model: Model,
    prompt: Annotated[
        str | None, opt("Continue this text; with --chat, answer it as one message.", "TEXT")
    ] = None,
    chat: Annotated[
        bool,
        opt(
            "Use the model's chat template. Without --prompt, answer messages from "
            "standard input, one per line, until it ends or a line is /exit.",
            names=("--chat",),
        ),
    ] = False,
    **options: Any,
) -> None:
    """Continue a prompt, or chat, with a dense or packed model.

    The text appears while the model writes it.
    """
    from prunus.evaluation.generation import Conversation
    from prunus.evaluation.generation import generate as generate_pieces

    if prompt is None and not chat:
        raise ValueError("give --prompt TEXT to continue, or --chat to talk with the model")
    talk: Any = Conversation(model, **options) if chat else None
    if prompt is None:
        _converse(talk)
        write_json({"model": model, "messages": talk.messages})
        return
    steps = talk.answer(prompt) if talk else generate_pieces(model, prompt, **options)
    text = _print_all(steps)
    if text is not None:
        print_text("\n")
        write_json({"model": model, "prompt": prompt, "text": text})


def _converse(talk: Any) -> None:
    """Answer messages from standard input until it ends, or nobody reads the answers."""
    forgotten = 0
    for message in _messages():
        try:
            pieces = talk.answer(message)
        except ValueError as error:
            log(f"error: {error}")
            continue
        if talk.forgotten > forgotten:
            forgotten = talk.forgotten
            log(f"the model's context is full; it no longer reads the first {forgotten} messages")
        if _print_all(pieces) is None:
            return
        print_text("\n")


def _messages() -> Iterator[str]:
    """Messages of the user, one per line. A person at a terminal gets a mark to type after."""
    person = sys.stdin.isatty()
    if person:
        log("type a message; /exit or Ctrl-D ends the conversation")
    while True:
        if person:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() in _END:
            return
        if line.strip():
            yield line.strip()


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
            "Address to listen on. Default: 127.0.0.1, which only this machine reaches. "
            "Any other needs a key.",
            "ADDRESS",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, opt("TCP port; 0 takes a free one. Default: 8000.", "N", min=0, max=65535)
    ] = 8000,
    api_key: Annotated[
        str | None,
        opt(
            "Key that every request must carry. Others can read it on a command line, but "
            "not in the environment. Default: none.",
            "KEY",
            names=("--api-key",),
            envvar="PRUNUS_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    name: Annotated[
        str | None,
        opt("How clients call the model. Default: the name of the folder, or the hub id.", "NAME"),
    ] = None,
    max_concurrent: Annotated[
        int,
        opt(
            "Requests that are computed at once, each in a thread; the others wait for "
            "their turn. Default: 1.",
            "N",
        ),
    ] = 1,
    max_waiting: Annotated[
        int,
        opt(
            "Requests that may wait. Those beyond get status 503 with Retry-After. Default: 32.",
            "N",
        ),
    ] = 32,
    log_level: Annotated[
        Literal["error", "warning", "info", "debug"],
        opt(
            "Choose what to log: info logs each request, warning and error only problems. "
            "Default: info.",
            "LEVEL",
        ),
    ] = "info",
    **options: Any,
) -> None:
    """Answer requests in OpenAI's protocol: chats, completions, streams.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/models, /health, /ready. Try it with:

    curl localhost:8000/v1/completions --json '{"prompt": "Once upon"}'

    SIGTERM and Ctrl-C end the server after the requests that are being computed.
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
