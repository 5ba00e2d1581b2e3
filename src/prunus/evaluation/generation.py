"""Text that a model writes, piece by piece: for a person at a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from prunus.model.chat_template import apply_chat_template
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.loading import load_model
from prunus.model.tokenizer import load_tokenizer

__all__ = ["Conversation", "Sampling", "generate", "token_settings"]

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
_SEEDS = 2**63


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, where it is not as the checkpoint says.

    Attributes:
        temperature: logits are divided by it. 0 always takes the most likely token, and None keeps
            the checkpoint's.
        top_p: only the most likely tokens are drawn that have this probability together, in (0, 1];
            None keeps the checkpoint's.
        seed: of the random numbers; None draws others each time.

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.temperature == 0 and self.top_p is not None:
            raise ValueError(
                f"temperature 0 takes the most likely token, and top-p {self.top_p} draws among "
                "several: leave one of them out"
            )
        if self.seed is not None and not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")

    def applied_to(self, settings: Any) -> Any:
        """Return transformers' generation settings with these choices in place of theirs."""
        from transformers import GenerationConfig

        if self.temperature is None and self.top_p is None:
            return settings
        found = settings.to_diff_dict()
        if self.temperature == 0:
            drawn = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p")
            return GenerationConfig(**{key: x for key, x in found.items() if key not in drawn})
        chosen = {"temperature": self.temperature, "top_p": self.top_p}
        found |= {key: value for key, value in chosen.items() if value is not None}
        return GenerationConfig(**found | {"do_sample": True})


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    chat: bool = False,
    sampling: Sampling | None = None,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, with the model's own generation settings.

    Args:
        model: checkpoint folder or hub id, dense or packed.
        prompt: the text to continue. With `chat`, the message of the user.
        max_new_tokens: the largest number of tokens to generate.
        chat: put the prompt into the tokenizer's chat template.
        sampling: how tokens are chosen, in place of the checkpoint's settings.

    Raises:
        ValueError: an empty prompt, a length below 1, or `chat` with a tokenizer that has no
            template, or one that cannot be applied (see `apply_chat_template`).
    """
    if not prompt:
        raise ValueError("the prompt is empty; give some text")
    if chat:
        conversation = Conversation(model, max_new_tokens=max_new_tokens, sampling=sampling)
        return conversation.answer(prompt)
    _check_length(max_new_tokens)
    folder = resolve_folder(model)
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    return _stream(_load(folder, sampling), tokenizer, inputs, max_new_tokens)


class Conversation:
    """A model and the messages that were exchanged with it.

    Args:
        model: checkpoint folder or hub id, dense or packed. It is loaded at the first message.
        max_new_tokens: the largest number of tokens of an answer.
        sampling: how tokens are chosen, in place of the checkpoint's settings.

    Attributes:
        messages: as chat templates read them, `{"role": "user", "content": "…"}`, in order.
        forgotten: how many of them the model no longer reads, because its context is full.

    Raises:
        ValueError: a length below 1, or a tokenizer without a chat template.
    """

    def __init__(
        self, model: str | Path, *, max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> None:
        _check_length(max_new_tokens)
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0
        self._folder = resolve_folder(model)
        self._tokenizer = load_tokenizer(self._folder)
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(f"{model}: the tokenizer has no chat template; leave `chat` out")
        self._length = max_new_tokens
        self._sampling = sampling
        self._model: Any = None

    def answer(self, message: str) -> Iterator[str]:
        """Yield the answer to a message piece by piece. Both become part of the conversation.

        An answer that the caller does not read to its end is kept as far as it was read.

        Raises:
            ValueError: the message is empty or longer than the model's context, or the template
                cannot be applied.
        """
        if not message.strip():
            raise ValueError("the message is empty; give some text")
        asked = {"role": "user", "content": message}
        # The template comes first: what is wrong with it shows before the weights are read.
        inputs = self._inputs([*self.messages[self.forgotten :], asked])
        if self._model is None:
            self._model = _load(self._folder, self._sampling)
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        while context is not None and inputs["input_ids"].shape[1] + self._length > context:
            if self.forgotten >= len(self.messages):
                raise ValueError(
                    f"the message has {inputs['input_ids'].shape[1]} tokens, and an answer may "
                    f"have {self._length}; the model reads {context} in all. Give a shorter "
                    "message, or a smaller `max_new_tokens`"
                )
            # A template expects a question before each answer, so both go.
            self.forgotten += 2
            inputs = self._inputs([*self.messages[self.forgotten :], asked])
        return self._answer(asked, inputs)

    def _inputs(self, messages: list[dict[str, str]]) -> Any:
        text = apply_chat_template(self._tokenizer, messages)
        # The template writes special tokens itself.
        return self._tokenizer(text, add_special_tokens=False, return_tensors="pt")

    def _answer(self, asked: dict[str, str], inputs: Any) -> Iterator[str]:
        pieces: list[str] = []
        try:
            for piece in _stream(self._model, self._tokenizer, inputs, self._length):
                pieces.append(piece)
                yield piece
        finally:
            self.messages += [asked, {"role": "assistant", "content": "".join(pieces)}]


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


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max-new-tokens must be at least 1, not {max_new_tokens}")


def _load(folder: Path, sampling: Sampling | None) -> Any:
    """The model of a folder with its settings, ready to write."""
    loaded = load_model(folder)
    settings = token_settings(loaded.generation_config)
    chosen = sampling or Sampling()
    loaded.generation_config = chosen.applied_to(settings)
    if chosen.seed is not None:
        torch.manual_seed(chosen.seed)
    return loaded


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
