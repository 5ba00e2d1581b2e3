"""The sources of calibration windows: each says what it takes and refuses, and draws windows.

    find_source(choice) ► source.check(request, images) ► source.draw(request) ► Windows

`SOURCES` in `catalogue.py` names those that a user can choose. A program may also give token ids,
pixel values or texts: strings, rows of a data set with a column `text` or `messages`, or chats,
which the tokenizer's chat template turns into text.

A `request` says which windows a run wants. A source without a public name is only made by
`find_source`, at the end of this file.

Shape suffixes: N samples (windows), S tokens per window (seqlen).
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch

from prunus.calibration.catalogue import CORPORA, MIX, SOURCES
from prunus.calibration.corpora import check_corpus, data_folder, load_corpus
from prunus.calibration.draw import Text, draw_windows
from prunus.calibration.files import check_file, read_documents, read_ids
from prunus.calibration.images import draw_images, read_images
from prunus.calibration.windows import (
    WindowRequest,
    Windows,
    bos_token,
    hash_ids,
    put_bos_first,
    refuse_bos,
    used_bos,
)
from prunus.model.tokenizer import apply_chat_template
from prunus.words import counted, did_you_mean, reason

# What texts may be, for errors.
_CHOICES = (
    "give the name of a source, token ids (windows, tokens), or texts: strings, rows with a column "
    "text or messages, or chats (lists of messages with role and content)"
)


def are_texts(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether `value` is a list or a data set, and not the name of a source, a tensor or None.

    Raises:
        TypeError: It is none of these, such as a stream, or the parts of a data set in a mapping.

    >>> are_texts(["one text", "another"]), are_texts("c4"), are_texts(None)
    (True, False, False)
    """
    if value is None or isinstance(value, str | Path | torch.Tensor):
        return False
    hint = ""
    if isinstance(value, Mapping):
        hint = f". Choose one of its parts: {', '.join(map(str, list(value)[:5]))}"
    elif hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        return True
    elif hasattr(value, "__iter__"):
        hint = ". A stream has no end: take a list of its first rows, with itertools.islice"
    raise TypeError(f"{_CHOICES}, not {_kind(value)}{hint}")


class Documents(Sequence[str]):
    """The documents of texts that a program gives; each is read when it is drawn.

    Indexing raises TypeError where an entry is not a text, a row or a chat, and ValueError where it
    is a chat and the tokenizer has no chat template.

    Args:
        texts: Strings, rows of a data set with a column `text` or `messages`, or chats.
        tokenizer: The tokenizer whose template turns chats into text; None if there is none.

    >>> Documents(["one", {"text": "two"}], None)[1]
    'two'
    """

    def __init__(self, texts: Any, tokenizer: Any) -> None:
        self._texts = texts
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        return self.several([index])[0]

    def several(self, indices: Iterable[int]) -> list[str]:
        """The documents at these places; one process makes the texts of all chats."""
        texts = [self._text_of(index) for index in indices]
        chats = [text for text in texts if not isinstance(text, str)]
        made = iter(chats and apply_chat_template(self._tokenizer, chats, answer_follows=False))
        return [text if isinstance(text, str) else next(made) for text in texts]

    def _text_of(self, index: int) -> Any:
        """A text, or a chat for which there is a template."""
        entry = text = self._texts[index]
        if isinstance(entry, Mapping):
            text = entry["text"] if isinstance(entry.get("text"), str) else entry.get("messages")
        if not isinstance(text, str):
            if not _is_chat(text):
                what = (
                    f"a row with the columns {', '.join(map(str, entry))}"
                    if isinstance(entry, Mapping)
                    else _kind(entry)
                )
                raise TypeError(f"text {index} is {what}; {_CHOICES}")
            if not getattr(self._tokenizer, "chat_template", None):
                raise ValueError(
                    "the text holds chat messages, and the tokenizer has no chat template; give "
                    "texts instead, or a tokenizer with a template"
                )
        return text


def _is_chat(entry: Any) -> bool:
    """Whether a value is a list of messages with role and content."""
    return (
        isinstance(entry, list | tuple)
        and bool(entry)
        and all(isinstance(item, Mapping) and {"role", "content"} <= set(item) for item in entry)
    )


def _kind(value: Any) -> str:
    """What a value is, in few words: an error never prints the content of a tensor or a list."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"


class WindowSource(ABC):
    """Where the windows of a run come from.

    Attributes:
        name: The name of the source, a path, or what people call the data.
        images: Whether it gives images, for an image classifier. Others give token ids.
        cuts: Whether it cuts windows out of text, where BOS may take the place of a first token.
            Windows of other sources stay as they are.
    """

    images = False
    cuts = False

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, request: WindowRequest, images: bool = False) -> None:
        """Raise the errors of `draw` that can be found without reading text or the network.

        Args:
            request: The windows that a run asks for. Its tokenizer and its model are not called.
            images: Whether the model is an image classifier.

        Raises:
            ValueError: The source does not suit the model, the request or its own file.
            FileNotFoundError, ModuleNotFoundError: A file or a library that it needs is missing.
        """
        if images and not self.images:
            raise ValueError(
                f"an image classifier is calibrated on images, not on {self.name}: give a folder "
                "of images or of one subfolder of images per class, or pixel values (samples, "
                "channels, height, width)"
            )
        if self.images and not images:
            raise ValueError(f"this model takes text or token ids, and {self.name} gives images")
        if not self.cuts:
            refuse_bos(self.name, request.bos)
        self.check_data(request)

    def check_data(self, request: WindowRequest) -> None:  # noqa: B027 (not all need it)
        """The part of `check` that only this source knows: what it reads is there."""

    @abstractmethod
    def draw(self, request: WindowRequest) -> Windows:
        """Draw the windows. `check` comes first.

        The same request gives the same windows.

        Raises:
            ValueError: The source has fewer windows than asked for, or its data are damaged.
            OSError: The hub cannot be reached.
        """


class TextSource(WindowSource):
    """Text, out of which windows are cut at random."""

    cuts = True

    @abstractmethod
    def read(self, request: WindowRequest) -> list[Text]:
        """The text, or several texts with a share of the windows each.

        Raises:
            ValueError, OSError: As `draw`.
        """

    def tokenizer(self, request: WindowRequest) -> Any:
        """The tokenizer, without which no window can be cut.

        Raises:
            ValueError: The model has none.
        """
        tokenizer = request.tokenizer()
        if tokenizer is None:
            raise ValueError(
                f"{self.name} is text, and this model comes without a tokenizer; give token ids "
                "instead: a .safetensors file with input_ids"
            )
        return tokenizer

    def draw(self, request: WindowRequest) -> Windows:
        """Cut random windows out of the text, and put BOS first where the request says so."""
        tokenizer = self.tokenizer(request)
        token = bos_token(tokenizer, request.bos)
        texts = self.read(request)
        ids, described = draw_windows(
            texts, tokenizer, samples=request.samples, seqlen=request.seqlen, seed=request.seed
        )
        ids = put_bos_first(ids, token)
        return Windows(ids, described, hash_ids(ids), used_bos(token))


class _Corpus(TextSource):
    """A named corpus; see `corpora.py`."""

    def read(self, request: WindowRequest) -> list[Text]:
        return [load_corpus(self.name, "calibration", request.data)]

    def check_data(self, request: WindowRequest) -> None:
        check_corpus(self.name, "calibration", request.data)


class AsChats(Sequence[Any]):
    """Documents as chats, the last one first: a question of one sentence, the rest is the answer.

    The tokens of the template, and the features of what follows them, lower the loss on chats.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        """
        >>> [message["content"] for message in AsChats(["One? Two. Three."])[0]]
        ['One?', 'Two. Three.']
        """
        parts = re.split(r"(?<=[.!?])\s+", self._documents[-1 - index].strip(), maxsplit=1)
        roles = ("user", "assistant")
        # A document of one sentence is a question without an answer.
        return [{"role": role, "content": part} for role, part in zip(roles, parts, strict=False)]


class _Mix(TextSource):
    """Prose, code and chats, in the shares of `MIX`."""

    def read(self, request: WindowRequest) -> list[Text]:
        try:
            prose = load_corpus("c4", "calibration", request.data)
        except (OSError, ModuleNotFoundError) as fault:
            warnings.warn(
                f"mix: C4 cannot be loaded ({reason(fault.__cause__ or fault, most=120)}), so its "
                "prose is python-docs, the documentation of Python; `data` may name a folder with "
                "C4, or choose another `calibration`, such as a file of your own text",
                RuntimeWarning,
                stacklevel=1,
            )
            prose = load_corpus("python-docs", "calibration", None)
        texts = {"prose": prose, "code": load_corpus("python-code", "calibration", None)}
        shares = dict(MIX)
        tokenizer = self.tokenizer(request)
        if getattr(tokenizer, "chat_template", None):
            chats = Documents(AsChats(prose.documents), tokenizer)
            source = "the same prose in the chat template"
            texts["chats"] = Text(chats, "\n\n", source, True, joins_short=True, from_start=True)
        else:
            shares["prose"] += shares.pop("chats")
        return [
            replace(texts[kind], share=share, source=f"{100 * share:g}% {texts[kind].source}")
            for kind, share in shares.items()
        ]

    def check_data(self, request: WindowRequest) -> None:
        data_folder(request.data)
        check_corpus("python-code", "calibration", None)


class _TextFile(TextSource):
    """A file of text; several documents are drawn from like those of a corpus."""

    def read(self, request: WindowRequest) -> list[Text]:
        documents = read_documents(Path(self.name))
        several = len(documents) > 1
        name = Path(self.name).name  # cards and files that are published say it
        return [Text(documents, "\n\n", name, by_document=several, joins_short=True)]

    def check_data(self, request: WindowRequest) -> None:
        try:
            check_file(Path(self.name))
        except ValueError as error:
            if Path(self.name).exists():
                raise
            # It may be a misspelt name of a corpus as well as of a file.
            raise ValueError(
                f"unknown source {self.name!r}: it is none of {', '.join(SOURCES)}, and {error}"
                f"{did_you_mean(self.name, SOURCES)}"
            ) from None


class _Texts(TextSource):
    """Texts, rows of a data set, or chats; see `Documents`."""

    def __init__(self, texts: Any) -> None:
        super().__init__("texts")
        self._texts = texts

    def read(self, request: WindowRequest) -> list[Text]:
        documents = Documents(self._texts, request.tokenizer())
        source = f"{counted(len(documents), 'text')} given by the caller"
        return [Text(documents, "\n\n", source, by_document=True, joins_short=True)]


class IdsFile(WindowSource):
    """A .safetensors file of token ids. Its first windows are taken, cut to `seqlen`."""

    def check_data(self, request: WindowRequest) -> None:
        """Check that the file exists; `draw` compares the sizes of windows."""
        check_file(Path(self.name))

    def draw(self, request: WindowRequest) -> Windows:
        """The first windows of the file.

        Raises:
            ValueError: The file has fewer windows, or shorter ones; or as `read_ids`.
        """
        ids = read_ids(Path(self.name))
        windows, tokens = ids.shape
        if tokens < request.seqlen:
            raise ValueError(
                f"{self.name}: its windows have {tokens} tokens, fewer than `seqlen` "
                f"{request.seqlen}; use a smaller `seqlen`"
            )
        if windows < request.samples:
            raise ValueError(
                f"{self.name}: it has {windows} windows, fewer than `samples` {request.samples}; "
                "use a smaller `samples`"
            )
        ids = ids[: request.samples, : request.seqlen].contiguous()
        return Windows(ids, Path(self.name).name, hash_ids(ids))


class _ImageFolder(WindowSource):
    """A folder of images, of which some are drawn at random."""

    images = True

    # Only models of images load what reads them.

    def check_data(self, request: WindowRequest) -> None:
        draw_images(Path(self.name), request.samples, request.seed)

    def draw(self, request: WindowRequest) -> Windows:
        paths = draw_images(Path(self.name), request.samples, request.seed)
        pixels = read_images(paths, request.tokenizer())
        described = f"{Path(self.name).name}: {counted(len(pixels), 'image')} at random"
        return Windows(pixels, described, hash_ids(pixels))


class _Tensor(WindowSource):
    """Token ids or pixel values that a program gives, taken as they are."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.images = tensor.is_floating_point()
        super().__init__("pixel values" if self.images else "token ids")
        self._tensor = tensor.detach()

    def draw(self, request: WindowRequest) -> Windows:
        ids = self._tensor.to("cpu", torch.float32 if self.images else torch.int64)
        return Windows(ids, f"{self.name} given by the caller", hash_ids(ids))


def find_source(choice: Any) -> WindowSource:
    """The source that a user or a program chooses. Reads nothing.

    Args:
        choice: A name of `SOURCES`, a path, or data: token ids (N, S), pixel values (N, channels,
            height, width), or the texts of `Documents`.

    Raises:
        TypeError: The choice is none of these, see `are_texts`.

    >>> find_source("c4").name, find_source(torch.ones(1, 8, dtype=torch.int64)).name
    ('c4', 'token ids')
    """
    if isinstance(choice, torch.Tensor):
        return _Tensor(choice)
    if are_texts(choice):
        return _Texts(choice)
    named = dict.fromkeys(CORPORA, _Corpus) | {"mix": _Mix}
    if choice in named:
        return named[choice](choice)
    path = Path(choice)
    if path.is_dir():
        return _ImageFolder(str(choice))
    if path.suffix.lower() == ".safetensors":
        return IdsFile(str(path))
    return _TextFile(str(path))
