"""The sources of calibration windows: each says what it takes and refuses, and draws windows.

    find_source(given) ► source.check(wanted, images) ► source.draw(wanted) ► Windows

`SOURCES` in `catalogue.py` names those that a user can choose. A program may also give token ids,
pixel values or texts: strings, rows of a data set with a column `text` or `messages`, or chats,
which the tokenizer's chat template turns into text.

Shape suffixes: N samples (windows), S tokens per window (seqlen).
"""

from __future__ import annotations

import random
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
    Wanted,
    Windows,
    bos_token,
    hash_ids,
    put_bos_first,
    refuse_bos,
    used_bos,
)
from prunus.hardware.errors import did_you_mean, reason
from prunus.hardware.sizes import counted
from prunus.model.tokenizer import apply_chat_template

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

    >>> Documents(["one", {"text": "two"}], None)[1]
    'two'
    """

    def __init__(self, given: Any, tokenizer: Any) -> None:
        self._given, self._tokenizer = given, tokenizer

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, place: Any) -> Any:
        given = entry = self._given[place]
        what = _kind(given)
        if isinstance(given, Mapping):
            entry = given["text"] if isinstance(given.get("text"), str) else given.get("messages")
            what = f"a row with the columns {', '.join(map(str, given))}"
        if isinstance(entry, str):
            return entry
        if not _is_chat(entry):
            raise TypeError(f"calibration text {place} is {what}; {_WANTED}")
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                "the calibration holds chat messages, and the tokenizer has no chat template; give "
                "texts instead, or a tokenizer with a template"
            )
        return apply_chat_template(self._tokenizer, entry, answer_follows=False)


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


#: What tensors that a program gives are called.
TENSORS = ("token ids", "pixel values")


class Source(ABC):
    """Where the windows of a run come from: `name` is for people, `images` for an image classifier.

    It `cuts` windows out of text where BOS may take the place of a first token.
    """

    images = False
    cuts = False

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, wanted: Wanted, images: bool = False) -> None:
        """Raise the errors of `draw` that can be found without reading text or the network."""
        if images and not self.images:
            raise ValueError(
                f"an image classifier is calibrated on images, not on {self.name}: give a folder "
                "of images or of one subfolder of images per class, or pixel values (samples, "
                "channels, height, width)"
            )
        if self.images and not images:
            raise ValueError(f"this model takes text or token ids, and {self.name} gives images")
        if not self.cuts:
            refuse_bos(self.name, wanted.bos)

    @abstractmethod
    def draw(self, wanted: Wanted) -> Windows:
        """Draw the windows. `check` comes first."""


class TextSource(Source):
    """Text, out of which windows are cut at random."""

    cuts = True

    @abstractmethod
    def read(self, wanted: Wanted) -> list[Text]:
        """The text, or several texts with a share of the windows each."""

    def tokenizer(self, wanted: Wanted) -> Any:
        """The tokenizer, without which no window can be cut."""
        found = wanted.tokenizer()
        if found is None:
            raise ValueError(
                f"{self.name} is text, and this model comes without a tokenizer; give token ids "
                "instead: a .safetensors file with input_ids"
            )
        return found

    def draw(self, wanted: Wanted) -> Windows:
        tokenizer = self.tokenizer(wanted)
        token, texts = bos_token(tokenizer, wanted.bos), self.read(wanted)
        ids, described = draw_windows(
            texts, tokenizer, samples=wanted.samples, seqlen=wanted.seqlen, seed=wanted.seed
        )
        ids = put_bos_first(ids, token)
        return Windows(ids, described, hash_ids(ids), used_bos(token))


class _Corpus(TextSource):
    """A named corpus; see `corpora.py`."""

    def read(self, wanted: Wanted) -> list[Text]:
        return [load_corpus(self.name, "calibration", wanted.data)]

    def check(self, wanted: Wanted, images: bool = False) -> None:
        super().check(wanted, images)
        check_corpus(self.name, "calibration", wanted.data)


class _AsChats(Sequence[Any]):
    """Documents as chats, the last one first: a question of one sentence, the rest is the answer.

    The tokens of the template, and the features of what follows them, lower the loss on chats.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, place: Any) -> Any:
        """
        >>> [turn["content"] for turn in _AsChats(["One? Two. Three."])[0]]
        ['One?', 'Two. Three.']
        """
        turns = re.split(r"(?<=[.!?])\s+", self._documents[-1 - place].strip(), maxsplit=1)
        roles = ("user", "assistant")
        return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


class _Mix(TextSource):
    """Prose, code and chats, in the shares of `MIX`."""

    def read(self, wanted: Wanted) -> list[Text]:
        try:
            prose = load_corpus("c4", "calibration", wanted.data)
        except (OSError, ModuleNotFoundError) as fault:
            warnings.warn(
                f"mix: C4 cannot be loaded ({reason(fault.__cause__ or fault, most=120)}), so its "
                "prose is python-docs, the documentation of Python; `data` may name a folder with "
                "C4, or choose another `calibration`",
                RuntimeWarning,
                stacklevel=1,
            )
            prose = load_corpus("python-docs", "calibration", None)
            prose = replace(prose, source=f"{prose.source}, because c4 could not be loaded")
        texts = {"prose": prose, "code": load_corpus("python-code", "calibration", None)}
        shares, tokenizer = dict(MIX), self.tokenizer(wanted)
        if getattr(tokenizer, "chat_template", None):
            chats = Documents(_AsChats(prose.documents), tokenizer)
            source = "the same prose in the chat template"
            texts["chats"] = Text(chats, "\n\n", source, True, joins_short=True, from_start=True)
        else:
            shares["prose"] += shares.pop("chats")
        return [
            replace(texts[kind], share=share, source=f"{100 * share:g}% {texts[kind].source}")
            for kind, share in shares.items()
        ]

    def check(self, wanted: Wanted, images: bool = False) -> None:
        super().check(wanted, images)
        data_folder(wanted.data)
        check_corpus("python-code", "calibration", None)


class _TextFile(TextSource):
    """A file of text; several documents are drawn from like those of a corpus."""

    def read(self, wanted: Wanted) -> list[Text]:
        documents = read_documents(Path(self.name))
        several = len(documents) > 1
        return [Text(documents, "\n\n", self.name, by_document=several, joins_short=True)]

    def check(self, wanted: Wanted, images: bool = False) -> None:
        super().check(wanted, images)
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

    def __init__(self, given: Any) -> None:
        super().__init__("texts")
        self._given = given

    def read(self, wanted: Wanted) -> list[Text]:
        documents = Documents(self._given, wanted.tokenizer())
        source = f"{counted(len(documents), 'text')} given by the caller"
        return [Text(documents, "\n\n", source, by_document=True, joins_short=True)]


class IdsFile(Source):
    """A .safetensors file of token ids. Its first windows are taken, cut to `seqlen`."""

    def read(self) -> torch.Tensor:
        """All windows of the file, (windows, tokens)."""
        return read_ids(Path(self.name))

    def check(self, wanted: Wanted, images: bool = False) -> None:
        super().check(wanted, images)
        check_file(Path(self.name))

    def draw(self, wanted: Wanted) -> Windows:
        ids = self.read()
        for size, name, what in (
            (1, "seqlen", "its windows have {} tokens"),
            (0, "samples", "it has {} windows"),
        ):
            if (there := ids.shape[size]) < (asked := getattr(wanted, name)):
                raise ValueError(
                    f"{self.name}: {what.format(there)}, fewer than `{name}` {asked}; use a "
                    f"smaller `{name}`"
                )
        ids = ids[: wanted.samples, : wanted.seqlen].contiguous()
        return Windows(ids, self.name, hash_ids(ids))


class _OwnText(Source):
    """Text that the model writes itself; see `generate.py`."""

    cuts = True

    def draw(self, wanted: Wanted) -> Windows:
        from prunus.calibration.generate import first_ids, start_token, write_windows

        if wanted.model is None:
            raise ValueError("the source 'self' needs the model, to let it write text")
        model, tokenizer = wanted.model(), wanted.tokenizer()
        token = start_token(model, tokenizer, wanted.bos)
        rng = random.Random(wanted.seed)
        first_N = first_ids(model, tokenizer, wanted.samples, rng, token)
        ids = write_windows(model, first_N, seqlen=wanted.seqlen, seed=wanted.seed)
        source = "self (sampled from the model at temperature 1)"
        return Windows(ids, source, hash_ids(ids), used_bos(token))


class _ImageFolder(Source):
    """A folder of images, of which some are drawn at random."""

    images = True

    def check(self, wanted: Wanted, images: bool = False) -> None:
        super().check(wanted, images)
        draw_images(Path(self.name), wanted.samples, wanted.seed)

    def draw(self, wanted: Wanted) -> Windows:
        paths = draw_images(Path(self.name), wanted.samples, wanted.seed)
        pixels = read_images(paths, wanted.tokenizer())
        described = f"{self.name}: {counted(len(pixels), 'image')} at random"
        return Windows(pixels, described, hash_ids(pixels))


class _Tensor(Source):
    """Token ids or pixel values that a program gives, taken as they are."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__(TENSORS[given.is_floating_point()])
        self.images, self._given = given.is_floating_point(), given.detach()

    def draw(self, wanted: Wanted) -> Windows:
        ids = self._given.to("cpu", torch.float32 if self.images else torch.int64)
        return Windows(ids, f"{self.name} given by the caller", hash_ids(ids))


def find_source(given: Any) -> Source:
    """The source that a user or a program gives: a name of `SOURCES`, a path, or data. Reads
    nothing.

    Data are token ids (N, S), pixel values (N, channels, height, width), or `Documents`.
    """
    if isinstance(given, torch.Tensor):
        return _Tensor(given)
    if are_texts(given):
        return _Texts(given)
    named = dict.fromkeys(CORPORA, _Corpus) | {"mix": _Mix, "self": _OwnText}
    if given in named:
        return named[given](given)
    path = Path(given)
    if path.is_dir():
        return _ImageFolder(str(given))
    if path.suffix.lower() == ".safetensors":
        return IdsFile(str(path))
    return _TextFile(str(path))
