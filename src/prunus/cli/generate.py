"""The verb that lets a model write: `generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from prunus.cli import arguments as arg
from prunus.cli.flags import opt, with_flags
from prunus.cli.terminal import log, print_text, user_errors, write_json
from prunus.evaluation.options import WritingOptions

#: What a user types to end a conversation.
_END = ("/exit", "/quit")


@with_flags(WritingOptions)
def generate(
    model: arg.Model,
    prompt: Annotated[
        str | None,
        opt("Continue this text; with --chat, answer it as one message.", "TEXT"),
    ] = None,
    chat: Annotated[
        bool,
        opt(
            "Use the model's chat template. Without --prompt, answer messages from "
            "standard input, one per line, until it ends or a line is /exit.",
            names=("--chat",),
        ),
    ] = False,
    *,
    json_file: arg.Json = None,
    **options: Any,
) -> None:
    """Continue a prompt, or chat, with a dense or packed model.

    The text appears while the model writes it.
    """
    with user_errors(json_file):
        from prunus.evaluation.generation import Conversation
        from prunus.evaluation.generation import generate as generate_pieces

        if prompt is None and not chat:
            raise ValueError("give --prompt TEXT to continue, or --chat to talk with the model")
        talk: Any = Conversation(model, **options) if chat else None
        if prompt is None:
            _converse(talk, json_file)
            write_json(json_file, {"model": model, "messages": talk.messages})
            return
        pieces: list[str] = []
        steps = talk.answer(prompt) if talk else generate_pieces(model, prompt, **options)
        if _print_all(steps, pieces, json_file):
            print_text("\n", json_file)
            write_json(json_file, {"model": model, "prompt": prompt, "text": "".join(pieces)})


def _converse(talk: Any, json_file: Path | None) -> None:
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
        if not _print_all(pieces, [], json_file):
            return
        print_text("\n", json_file)


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


def _print_all(pieces: Iterator[str], seen: list[str], json_file: Path | None) -> bool:
    """Print pieces as they come, and add them to `seen`; false once nobody needs them."""
    for piece in pieces:
        seen.append(piece)
        # Without --json, text that nobody reads need not be written.
        if not print_text(piece.replace("\r", ""), json_file) and json_file is None:
            return False
    return True
