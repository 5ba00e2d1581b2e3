"""Text that a model writes, piece by piece: for a person at a terminal.

The settings of a checkpoint's generation_config.json decide how tokens are chosen, but only those
that choose tokens are read. The options of the caller come before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from prunus.calibration.windows import check_ids
from prunus.evaluation.eval_options import WritingOptions
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.loading import load_model
from prunus.model.tokenizer import apply_chat_template, load_tokenizer

#: Settings of a checkpoint that draw the next token.
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p")
# The types of a setting. True is an int to Python, and no number here.
_FLAG, _NUMBER, _TOKENS = (bool,), (int, float), (int,)
#: Settings of a checkpoint that choose the next token or end the text, with their types.
_SETTINGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_DRAWING, _NUMBER),
    "do_sample": _FLAG,
    "repetition_penalty": _NUMBER,
    "no_repeat_ngram_size": _NUMBER,
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "bos_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "pad_token_id": _TOKENS,
}
#: Below it the likeliest token is taken: logits that are divided by less can overflow.
_LOWEST_TEMPERATURE = 1e-5


def generate(
    model: str | Path,
    prompt: str,
    *,
    chat: bool = False,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[str]:
    """Yield the continuation of a prompt in pieces. For the options, see `WritingOptions`.

    With `chat`, it is the answer to the prompt as one message, by the chat template of the model.

    Args:
        model: A checkpoint folder, a hub id, or a result of compress.
        prompt: The text to continue, or the message of the user.
        chat: Whether to put the prompt into the chat template.
        progress: Called with what is loaded, before it is; None to be silent.
        **options: Fields of `WritingOptions`.

    Raises:
        ValueError: The prompt is empty, an option is out of range, the tokenizer has no chat
            template, or a setting of the checkpoint is damaged.
        FileNotFoundError: There is no such model.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give some text")
    writing, folder = WritingOptions.read(None, options), open_folder(model, say=progress)
    folder.require_config()
    tokenizer = load_tokenizer(folder)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{model}: the tokenizer has no chat template; leave `chat` out")
        # The template writes special tokens itself.
        [prompt] = apply_chat_template(tokenizer, [[{"role": "user", "content": prompt}]])
    inputs = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")
    if progress is not None:
        progress(f"loading {model}")
    loaded = load_model(folder)
    loaded.generation_config = chosen_settings(loaded.generation_config, writing)
    rows = loaded.get_input_embeddings().num_embeddings
    check_ids(inputs["input_ids"], rows, "the token ids of the prompt")
    return _pieces(loaded, tokenizer, inputs, writing)


def _pieces(model: Any, tokenizer: Any, inputs: Any, options: WritingOptions) -> Iterator[str]:
    """Generate in a second thread, which ends when the caller takes no more pieces."""
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    unwanted = Event()
    if options.seed is not None:
        torch.manual_seed(options.seed)

    def generate_in_thread() -> None:
        try:
            with torch.no_grad():
                model.generate(
                    **inputs,
                    streamer=streamer,
                    logits_processor=[_check_logits],
                    max_new_tokens=options.max_new_tokens,
                    stopping_criteria=StoppingCriteriaList([lambda *_, **__: unwanted.is_set()]),
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


def chosen_settings(settings: Any, options: WritingOptions) -> Any:
    """The settings by which a checkpoint chooses tokens, with those of the options in their place.

    Only settings that choose tokens are taken. The others can ask for any number of beams or
    sequences, or for a cache of any length.

    Args:
        settings: The `GenerationConfig` of the checkpoint's generation_config.json.
        options: `temperature` or `top_p` draw tokens, except for a temperature of 0, which takes
            the likeliest. None keeps the setting of the checkpoint.

    Raises:
        ValueError: A setting is neither the flag nor the number that it has to be.
    """
    from transformers import GenerationConfig

    chosen = {"temperature": options.temperature, "top_p": options.top_p}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    merged = _token_settings(settings) | chosen | ({"do_sample": True} if chosen else {})
    if merged.get("temperature", 1) < _LOWEST_TEMPERATURE or not merged.get("do_sample"):
        # Without drawing, its settings have no effect, and transformers warns of them. A flag that
        # is not set would be that of the model's own settings.
        merged = {key: x for key, x in merged.items() if key not in _DRAWING} | {"do_sample": False}
    return GenerationConfig(**merged)


def _token_settings(settings: Any) -> dict[str, Any]:
    """The settings that are named in `_SETTINGS`, each of the type that it must have."""
    checked = {}
    for name, kinds in _SETTINGS.items():
        if (value := getattr(settings, name, None)) is None:
            continue
        listed = value if isinstance(value, list) and kinds is _TOKENS else [value]
        if not all(type(x) in kinds and abs(x) < 2**31 for x in listed):
            raise ValueError(
                f"generation_config.json sets {name} to {str(value)[:80]!r}, which is no "
                f"{'flag' if kinds is _FLAG else 'number or token id'}; correct it or delete it"
            )
        checked[name] = value
    return checked


def _check_logits(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    """A logits processor of transformers that changes nothing, and raises where NaN would draw."""
    # The probabilities are checked, not the logits: some models exclude tokens by minus infinity.
    if not torch.isfinite(torch.softmax(logits_BV.float(), dim=-1)).all():
        raise ValueError(
            "the model's logits are not finite, so it cannot write text. Weights are damaged, or "
            "the dtype is too small for this model: try `dtype` float32"
        )
    return logits_BV
