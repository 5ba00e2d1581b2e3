"""Calibration text that a Python program gives: lists of texts, data sets, chat messages.

A document is a string, a row of a data set with a column `text` or `messages`, or a chat: a list of
messages {"role": …, "content": …}, which the tokenizer's chat template turns into text.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch

from prunus.calibration.bos import Bos, bos_token, put_bos_first, used_bos
from prunus.calibration.draw import (
    TextTooShort,
    encode,
    windows_from_documents,
    windows_from_stream,
)
from prunus.calibration.windows import Windows, hash_ids

__all__ = ["are_texts", "documents_of", "windows_from_texts"]

_WANTED = (
    "calibration takes the name of a source, token ids (samples, seqlen), or texts: strings, rows "
    "with a column text or messages, or chats (lists of messages with role and content)"
)


def are_texts(given: Any) -> TypeGuard[Sequence[Any]]:
    """Whether `given` is a list or a data set, and not the name of a source or a tensor.

    Raises:
        TypeError: it is nothing that calibration takes, or it has no length.

    >>> are_texts(["one text", "another"]), are_texts("c4"), are_texts(None)
    (True, False, False)
    """
    if given is None or isinstance(given, str | Path | torch.Tensor):
        return False
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not _is_mapping(given):
        return True
    hint = ""
    if hasattr(given, "__iter__") and not _is_mapping(given):
        hint = ". A stream has no end: take a list of its first rows, with itertools.islice"
    elif _is_mapping(given):
        hint = f". Choose one of its parts: {', '.join(map(str, list(given)[:5]))}"
    raise TypeError(f"{_WANTED}, not {_kind(given)}{hint}")


def documents_of(given: Sequence[Any], tokenizer: Any) -> list[str]:
    """The documents of texts that a program gives, without empty ones.

    Args:
        given: strings, rows of a data set, or chats.
        tokenizer: its chat template is used for chats.

    Raises:
        TypeError: an entry is none of these; says which one.
        ValueError: there is no text, or chats come with a tokenizer without a template.
    """
    found = [_document(entry, place, tokenizer) for place, entry in enumerate(given)]
    documents = [document for document in found if document.strip()]
    if not documents:
        raise ValueError(f"the {len(found)} calibration texts that were given hold no text")
    return documents


def windows_from_texts(
    given: Sequence[Any],
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    bos: Bos = "auto",
) -> Windows:
    """Draw windows of documents longer than a window.

    If there are none, they are drawn of all documents, joined by blank lines.

    Args:
        given: see `documents_of`.
        tokenizer: of the model.
        samples, seqlen, seed, bos: as in `prunus.calibration.load_windows`.

    Raises:
        TypeError, ValueError: see `documents_of`; or the texts are too short.
    """
    documents, rng = documents_of(given, tokenizer), random.Random(seed)
    source, token = f"{len(documents)} texts given by the caller", bos_token(tokenizer, bos)
    try:
        try:
            ids, used = windows_from_documents(
                documents, tokenizer, samples=samples, seqlen=seqlen, rng=rng
            )
            described = f"{source}; windows from {used} of them"
        except TextTooShort:
            joined = encode(tokenizer, "\n\n".join(documents))
            ids = windows_from_stream(joined, samples=samples, seqlen=seqlen, rng=rng)
            described = f"{source}, joined, because none is longer than a window"
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    ids = put_bos_first(ids, token)
    return Windows(ids, described, hash_ids(ids), used_bos(token))


def _document(entry: Any, place: int, tokenizer: Any) -> str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping):
        if isinstance(entry.get("text"), str):
            return str(entry["text"])
        if _is_chat(entry.get("messages")):
            return _chat(entry["messages"], tokenizer)
        raise TypeError(
            f"calibration text {place} is a row with the columns {', '.join(map(str, entry))}; it "
            "needs text (a string) or messages (a list of messages with role and content)"
        )
    if _is_chat(entry):
        return _chat(entry, tokenizer)
    raise TypeError(f"calibration text {place} is {_kind(entry)}; {_WANTED}")


def _is_chat(entry: Any) -> bool:
    return (
        isinstance(entry, list | tuple)
        and bool(entry)
        and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in entry)
    )


def _chat(messages: Any, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the calibration holds chat messages, and the tokenizer has no chat template; give "
            "texts instead, or a tokenizer with a template"
        )
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False))


def _is_mapping(given: Any) -> bool:
    return isinstance(given, Mapping)


def _kind(given: Any) -> str:
    """What a value is, in few words: an error never prints the content of a tensor or a list."""
    if isinstance(given, torch.Tensor):
        return f"a tensor {tuple(given.shape)}"
    return f"a {type(given).__name__}"
