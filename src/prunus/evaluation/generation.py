"""Text that a model writes, piece by piece: for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.loading import load_model
from prunus.model.tokenizer import load_tokenizer

__all__ = ["generate"]


def generate(
    model: str | Path, prompt: str, *, max_new_tokens: int = 128, chat: bool = False
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, with the model's own generation settings.

    Args:
        model: checkpoint folder or hub id, dense or packed.
        prompt: the text to continue. With `chat`, the message of the user.
        max_new_tokens: the largest number of tokens to generate.
        chat: put the prompt into the tokenizer's chat template.

    Raises:
        ValueError: an empty prompt, a length below 1, or `chat` with a tokenizer that has no
            template.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give some text")
    if max_new_tokens < 1:
        raise ValueError(f"max-new-tokens must be at least 1, not {max_new_tokens}")
    folder = resolve_folder(model)
    tokenizer = load_tokenizer(folder)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{model}: the tokenizer has no chat template; leave --chat out")
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    loaded = load_model(folder)
    return _stream(loaded, tokenizer, inputs, max_new_tokens)


def _stream(loaded: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> Iterator[str]:
    """Generate in a second thread, and yield each piece as soon as it is there.

    A caller that takes no more pieces ends the thread after the token that it is at.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    unwanted = Event()
    criteria = StoppingCriteriaList([lambda *_, **__: unwanted.is_set()])

    def generate_in_thread() -> None:
        try:
            with torch.no_grad():
                loaded.generate(
                    **inputs,
                    streamer=streamer,
                    max_new_tokens=max_new_tokens,
                    stopping_criteria=criteria,
                )
        except BaseException as fault:
            # The reader below would wait forever for the next piece.
            failure.append(fault)
            streamer.end()

    thread = Thread(target=generate_in_thread, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        unwanted.set()
        thread.join()
    if failure:
        raise failure[0]
