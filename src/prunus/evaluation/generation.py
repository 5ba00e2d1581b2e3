"""Text that a model writes, piece by piece: for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from prunus.model.chat_template import apply_chat_template
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.loading import load_model
from prunus.model.tokenizer import load_tokenizer

__all__ = ["generate", "token_settings"]

#: Settings of a checkpoint that choose the next token or end the text: flags, numbers, tokens.
_FLAGS = ("do_sample",)
_NUMBERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
_TOKENS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


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
            template, or one that cannot be applied (see `apply_chat_template`).
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
        # The template writes special tokens itself.
        text = apply_chat_template(tokenizer, [{"role": "user", "content": prompt}])
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    loaded = load_model(folder)
    loaded.generation_config = token_settings(loaded.generation_config)
    return _stream(loaded, tokenizer, inputs, max_new_tokens)


def token_settings(settings: Any) -> Any:
    """The settings of a checkpoint's generation_config.json that choose tokens, and no others.

    The others can ask for any number of beams or sequences, or for a cache of any length.

    Raises:
        ValueError: a setting is of another kind; names it.
    """
    from transformers import GenerationConfig

    found = {}
    for name in (*_FLAGS, *_NUMBERS, *_TOKENS):
        if (value := getattr(settings, name, None)) is None:
            continue
        listed = value if isinstance(value, list) and name in _TOKENS else [value]
        kind = bool if name in _FLAGS else int if name in _TOKENS else int | float
        if not all(
            isinstance(x, kind) and (name in _FLAGS or not isinstance(x, bool)) and abs(x) < 2**31
            for x in listed
        ):
            raise ValueError(
                f"generation_config.json sets {name} to {str(value)[:80]!r}, which is no "
                f"{'flag' if name in _FLAGS else 'number or token id'}; correct it or delete it"
            )
        found[name] = value
    return GenerationConfig(**found)


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
