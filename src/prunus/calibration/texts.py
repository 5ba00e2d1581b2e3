"""Calibration text that a Python program gives: lists of texts, data sets, chat messages.

A document is a string, a row of a data set with a column `text` or `messages`, or a chat: a list of
messages {"role": …, "content": …}, which the tokenizer's chat template turns into text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch

ChatText = Callable[[Any, Any], str]

_WANTED = (
    "calibration takes the name of a source, token ids (samples, seqlen), or texts: strings, rows "
    "with a column text or messages, or chats (lists of messages with role and content)"
)


def are_texts(given: Any) -> TypeGuard[Sequence[Any]]:
    """Whether `given` is a list or a data set, and not the name of a source or a tensor.

    >>> are_texts(["one text", "another"]), are_texts("c4"), are_texts(None)
    (True, False, False)
    """
    if given is None or isinstance(given, str | Path | torch.Tensor):
        return False
    hint = ""
    if isinstance(given, Mapping):
        hint = f". Choose one of its parts: {', '.join(map(str, list(given)[:5]))}"
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        return True
    elif hasattr(given, "__iter__"):
        hint = ". A stream has no end: take a list of its first rows, with itertools.islice"
    raise TypeError(f"{_WANTED}, not {_kind(given)}{hint}")


class Documents(Sequence[str]):
    """The documents of texts that a program gives; each is read when it is drawn.

    >>> Documents(["one", {"text": "two"}], None, None)[1]
    'two'
    """

    def __init__(self, given: Any, tokenizer: Any, chat_text: ChatText | None) -> None:
        self._given, self._tokenizer, self._chat_text = given, tokenizer, chat_text

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, place: Any) -> Any:
        """Return document `place`.

        Raises:
            TypeError: the entry is no text, no row with text, and no chat; says which one.
            ValueError: a chat comes with a tokenizer without a template.
        """
        entry = self._given[place]
        if isinstance(entry, str):
            return entry
        if isinstance(entry, Mapping):
            if isinstance(entry.get("text"), str):
                return entry["text"]
            if _is_chat(entry.get("messages")):
                return self._of_chat(entry["messages"])
            raise TypeError(
                f"calibration text {place} is a row with the columns {', '.join(map(str, entry))}; "
                "it needs text (a string) or messages (a list of messages with role and content)"
            )
        if _is_chat(entry):
            return self._of_chat(entry)
        raise TypeError(f"calibration text {place} is {_kind(entry)}; {_WANTED}")

    def _of_chat(self, messages: Any) -> str:
        if self._chat_text is None or not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                "the calibration holds chat messages, and the tokenizer has no chat template; give "
                "texts instead, or a tokenizer with a template"
            )
        return self._chat_text(self._tokenizer, messages)


def _is_chat(entry: Any) -> bool:
    return (
        isinstance(entry, list | tuple)
        and bool(entry)
        and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in entry)
    )


def _kind(given: Any) -> str:
    """What a value is, in few words: an error never prints the content of a tensor or a list."""
    if isinstance(given, torch.Tensor):
        return f"a tensor {tuple(given.shape)}"
    return f"a {type(given).__name__}"
