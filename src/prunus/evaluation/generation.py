"""Text that a model writes, piece by piece: for a person at a terminal."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from prunus.calibration.windows import check_ids
from prunus.evaluation.model_input import find_folder
from prunus.evaluation.options import WritingOptions
from prunus.model.loading import load_model
from prunus.model.tokenizer import apply_chat_template, load_tokenizer

#: Settings of a checkpoint that draw the next token.
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p")
#: Settings of a checkpoint that choose the next token or end the text.
_SETTINGS = (
    *_DRAWING,
    "repetition_penalty",
    "no_repeat_ngram_size",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
#: Below it the likeliest token is taken: logits that are divided by less can overflow.
LOWEST_TEMPERATURE = 1e-5


def generate(model: str | Path, prompt: str, **options: Any) -> Iterator[str]:
    """Yield the continuation of a prompt in pieces. For the options, see `WritingOptions`."""
    if not prompt:
        raise ValueError("the prompt is empty; give some text")
    writer = _Writer(model, options)
    return writer.write(writer.tokenizer(prompt, return_tensors="pt"))


class _Writer:
    """A model that continues token ids. Its weights are loaded when they are first needed."""

    def __init__(self, model: str | Path, options: dict[str, Any]) -> None:
        self.options = WritingOptions.read(None, options)
        self._folder = find_folder(model)
        self.tokenizer = load_tokenizer(self._folder)

    @functools.cached_property
    def model(self) -> Any:
        """The model with its settings for generation."""
        loaded = load_model(self._folder)
        settings = token_settings(loaded.generation_config)
        loaded.generation_config = chosen_settings(settings, self.options)
        if self.options.seed is not None:
            torch.manual_seed(self.options.seed)
        return loaded

    def write(self, inputs: Any) -> Iterator[str]:
        """Generate in a second thread, which ends when the caller takes no more pieces."""
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        unwanted = Event()
        criteria = StoppingCriteriaList([lambda *_, **__: unwanted.is_set()])
        model, most = self.model, self.options.max_new_tokens
        rows = model.get_input_embeddings().num_embeddings
        check_ids(inputs["input_ids"], rows, "the token ids of the prompt")

        def generate_in_thread() -> None:
            try:
                with torch.no_grad():
                    model.generate(
                        **inputs,
                        streamer=streamer,
                        max_new_tokens=most,
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


class Conversation:
    """A model, loaded at the first message, and the messages that were exchanged with it.

    Attributes:
        messages: as chat templates read them, `{"role": "user", "content": "…"}`, in order.
        forgotten: how many of them the model no longer reads, because its context is full.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._writer = _Writer(model, options)
        if not getattr(self._writer.tokenizer, "chat_template", None):
            raise ValueError(f"{model}: the tokenizer has no chat template; leave `chat` out")
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0

    def answer(self, message: str) -> Iterator[str]:
        """Yield the answer to a message piece by piece. Both become part of the conversation.

        An answer that the caller does not read to its end is kept as far as it was read.
        """
        if not message.strip():
            raise ValueError("the message is empty; give some text")
        asked = {"role": "user", "content": message}
        # The template is applied first: what is wrong with it shows before the weights are read.
        inputs = self._inputs(asked)
        config = self._writer.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or math.inf
        length = self._writer.options.max_new_tokens
        while (tokens := inputs["input_ids"].shape[1]) + length > context:
            if self.forgotten >= len(self.messages):
                raise ValueError(
                    f"the message has {tokens} tokens, and an answer may have {length}; the model "
                    f"reads {context} in all. Give a shorter message, or a smaller "
                    "`max_new_tokens`"
                )
            # A template expects a question before each answer, so both are left out.
            self.forgotten += 2
            inputs = self._inputs(asked)
        return self._answer(asked, inputs)

    def _inputs(self, asked: dict[str, str]) -> Any:
        messages = [*self.messages[self.forgotten :], asked]
        text = apply_chat_template(self._writer.tokenizer, messages)
        # The template writes special tokens itself.
        return self._writer.tokenizer(text, add_special_tokens=False, return_tensors="pt")

    def _answer(self, asked: dict[str, str], inputs: Any) -> Iterator[str]:
        pieces: list[str] = []
        try:
            for piece in self._writer.write(inputs):
                pieces.append(piece)
                yield piece
        finally:
            self.messages += [asked, {"role": "assistant", "content": "".join(pieces)}]


def chosen_settings(settings: Any, options: Any) -> Any:
    """A copy of transformers' settings with the `temperature` and `top_p` of the options.

    Each of them turns drawing on, and a temperature of 0 turns it off.
    """
    from transformers import GenerationConfig

    given = {"temperature": options.temperature, "top_p": options.top_p}
    chosen = {name: value for name, value in given.items() if value is not None}
    found = settings.to_diff_dict() | chosen | ({"do_sample": True} if chosen else {})
    if found.get("temperature", 1) < LOWEST_TEMPERATURE or not found.get("do_sample"):
        # Without drawing, its settings have no effect, and transformers warns of them. A flag that
        # is not set would be that of the model's own settings.
        found = {key: x for key, x in found.items() if key not in _DRAWING} | {"do_sample": False}
    return GenerationConfig(**found)


def token_settings(settings: Any) -> Any:
    """The settings of a checkpoint's generation_config.json that choose tokens, and no others.

    The others can ask for any number of beams or sequences, or for a cache of any length.
    """
    from transformers import GenerationConfig

    found = {}
    for name in _SETTINGS:
        if (value := getattr(settings, name, None)) is None:
            continue
        is_token, is_flag = "token" in name, name == "do_sample"
        kinds = (bool,) if is_flag else (int,) if is_token else (int, float)
        # True is an int to Python, and no number here.
        listed = value if isinstance(value, list) and is_token else [value]
        if not all(type(x) in kinds and abs(x) < 2**31 for x in listed):
            raise ValueError(
                f"generation_config.json sets {name} to {str(value)[:80]!r}, which is no "
                f"{'flag' if is_flag else 'number or token id'}; correct it or delete it"
            )
        found[name] = value
    if found.get("temperature", 1) < LOWEST_TEMPERATURE:
        found = {key: x for key, x in found.items() if key not in _DRAWING}
    return GenerationConfig(**found)
