"""The calibration windows of a run, from any source.

A source is a named corpus (from the hub or from local datasets), a file of the user, or the model
itself, which then writes the text.

Shape suffixes: N samples (windows), S tokens per window (seqlen).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.bos import Bos, UsedBos, bos_token, put_bos_first, refuse_bos, used_bos
from prunus.calibration.corpora import NAMES, check_corpus, load_corpus
from prunus.calibration.draw import (
    TextTooShort,
    encode,
    windows_from_documents,
    windows_from_stream,
)
from prunus.calibration.files import check_file, file_kind, read_documents, read_ids

__all__ = ["SOURCES", "Windows", "check_context", "check_source", "hash_ids", "load_windows"]

SOURCES = {
    "c4": "C4, English, first train shard: random windows of random documents, as in the papers",
    "wikitext2": "WikiText-2, train: random windows of the whole text",
    "ptb": "Penn Treebank, train: random windows of the whole text",
    "python-docs": "the documentation that ships with Python: first half; needs no download",
    "self": "text that the model writes itself (arXiv 2410.17170)",
    "FILE": ".txt, .jsonl, .jsonl.gz or .parquet (text in the field or column `text`), "
    "or .safetensors with `input_ids` (windows, tokens)",
    "FOLDER": "for image classifiers: images, or a subfolder of images per class",
}


@dataclass(frozen=True, eq=False)
class Windows:
    """Calibration windows.

    Attributes:
        ids: (samples, seqlen) int64, on the CPU. For an image classifier these are pixel values
            (samples, channels, height, width) float32.
        source: where they come from, for people.
        sha256: of the shape and the ids; see `hash_ids`.
        bos: whether every window begins with BOS; see `UsedBos`.
    """

    ids: torch.Tensor
    source: str
    sha256: str
    bos: UsedBos = "given"


def hash_ids(ids: torch.Tensor) -> str:
    """SHA-256 (hex) of the text `<rows>x<columns>:` and of the ids (N, S) as little-endian int32.

    The definition does not depend on torch or on the host, so that any program can check it.

    >>> hash_ids(torch.tensor([[1, 2, 3]]))[:8]
    '89c48fa8'
    """
    digest = hashlib.sha256(f"{ids.shape[0]}x{ids.shape[1]}:".encode())
    digest.update(ids.numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def check_source(source: str, data_dir: Path | None) -> None:
    """Raise the errors of `load_windows` that can be found without reading text or the network.

    Raises:
        ValueError: an unknown name or kind of file, or an empty file.
        FileNotFoundError: a missing file or data folder, or a data folder without the corpus.
        ModuleNotFoundError: an extra that is not installed; names it.
    """
    if source in NAMES:
        check_corpus(source, "calibration", data_dir)
    elif source != "self":
        _check_path(source)


def load_windows(
    source: str,
    *,
    tokenizer: Any,
    samples: int,
    seqlen: int,
    seed: int,
    data_dir: Path | None,
    model: Callable[[], Any] | None = None,
    bos: Bos = "auto",
) -> Windows:
    """Draw `samples` windows of `seqlen` tokens from a source.

    Args:
        source: a name of `SOURCES` or the path of a file.
        tokenizer: of the model; it adds the special tokens that it adds by default. May be None for
            `.safetensors` and `self`.
        samples: number of windows, at least 1.
        seqlen: tokens per window, at least 2.
        seed: the same seed gives the same windows.
        data_dir: folder of local datasets. None means the folder in PRUNUS_DATA, or the hub if that
            is not set.
        model: returns the loaded causal LM. Only `self` calls it.
        bos: whether BOS takes the place of every window's first token; see `Bos`. Windows of a
            `.safetensors` file stay as they are.

    Raises:
        ValueError: samples or seqlen out of range, an unknown source, a missing tokenizer or model,
            BOS where there is none, or text without such windows; the message then says how long
            the text is, in tokens.
        FileNotFoundError, ModuleNotFoundError: see `check_source`.
        OSError: the hub does not answer.
    """
    if samples < 1:
        raise ValueError(
            f"samples must be at least 1, not {samples}: pruning needs something to calibrate on"
        )
    if seqlen < 2:
        raise ValueError(f"seqlen must be at least 2 tokens, not {seqlen}")
    check_source(source, data_dir)
    rng = random.Random(seed)
    if source == "self":
        return _from_model(model, tokenizer, samples=samples, seqlen=seqlen, seed=seed, bos=bos)
    if source not in NAMES and file_kind(Path(source)) == "safetensors":
        refuse_bos(source, bos)
        ids = _from_ids(Path(source), samples, seqlen)
        return Windows(ids, source, hash_ids(ids))
    if tokenizer is None:
        raise ValueError(
            f"{source} is text, and this model comes without a tokenizer; calibrate on token ids "
            "instead: a .safetensors file with input_ids"
        )
    token = bos_token(tokenizer, bos)
    if source in NAMES:
        ids, described = _from_corpus(
            source, data_dir, tokenizer, samples=samples, seqlen=seqlen, rng=rng
        )
    else:
        ids, described = _from_file(
            Path(source), tokenizer, samples=samples, seqlen=seqlen, rng=rng
        )
    assert tuple(ids.shape) == (samples, seqlen)
    ids = put_bos_first(ids, token)
    return Windows(ids, described, hash_ids(ids), used_bos(token))


def _check_path(source: str) -> None:
    path = Path(source)
    try:
        check_file(path)
    except ValueError as error:
        if path.exists():
            raise
        # It may be a misspelt name of a corpus as well as of a file.
        raise ValueError(
            f"unknown source {source!r}: it is none of {', '.join(SOURCES)}, and {error}"
        ) from None


def _from_model(
    model: Callable[[], Any] | None,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    bos: Bos,
) -> Windows:
    from prunus.calibration.generate import first_ids, start_token, write_windows

    if model is None:
        raise ValueError("the source 'self' needs the model, to let it write text")
    loaded = model()
    token = start_token(loaded, tokenizer, bos)
    first_N = first_ids(loaded, tokenizer, samples, random.Random(seed), token)
    ids = write_windows(loaded, first_N, seqlen=seqlen, seed=seed)
    source = "self (sampled from the model at temperature 1)"
    return Windows(ids, source, hash_ids(ids), used_bos(token))


def _from_ids(path: Path, samples: int, seqlen: int) -> torch.Tensor:
    """The first windows of a file of token ids, cut to `seqlen`."""
    ids = read_ids(path)
    if ids.shape[1] < seqlen:
        raise ValueError(
            f"{path}: its windows have {ids.shape[1]} tokens, fewer than --seqlen {seqlen}; use a "
            "smaller --seqlen"
        )
    if ids.shape[0] < samples:
        raise ValueError(
            f"{path}: it has {ids.shape[0]} windows, fewer than --samples {samples}; use fewer "
            "--samples"
        )
    return ids[:samples, :seqlen].contiguous()


def _from_corpus(
    name: str,
    data_dir: Path | None,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    rng: random.Random,
) -> tuple[torch.Tensor, str]:
    corpus = load_corpus(name, "calibration", data_dir)
    try:
        # As the papers do: C4 consists of documents, the others are one long text.
        if name == "c4":
            ids, used = windows_from_documents(
                corpus.documents, tokenizer, samples=samples, seqlen=seqlen, rng=rng
            )
            return ids, f"{corpus.source}; windows from {used} documents"
        tokens = encode(tokenizer, corpus.text())
        return windows_from_stream(tokens, samples=samples, seqlen=seqlen, rng=rng), corpus.source
    except ValueError as error:
        raise ValueError(f"{corpus.source}: {error}") from error


def _from_file(
    path: Path, tokenizer: Any, *, samples: int, seqlen: int, rng: random.Random
) -> tuple[torch.Tensor, str]:
    """Windows of documents longer than a window; if there are none, of all documents joined."""
    documents = read_documents(path)
    if len(documents) > 1:
        try:
            ids, used = windows_from_documents(
                documents, tokenizer, samples=samples, seqlen=seqlen, rng=rng
            )
            return ids, f"{path}; windows from {used} documents"
        except TextTooShort:
            pass
    try:
        ids = windows_from_stream(
            encode(tokenizer, "\n\n".join(documents)), samples=samples, seqlen=seqlen, rng=rng
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    joined = (
        f"; {len(documents)} documents joined, none is longer than a window"
        if len(documents) > 1
        else ""
    )
    return ids, f"{path}{joined}"


def check_context(positions: int | None, seqlen: int, needs: str) -> None:
    """Check that a window is no longer than the model's context.

    Args:
        positions: the longest window of the model in tokens; None if it is not known.
        seqlen: tokens per window.
        needs: statistics that the method needs; with "none" no window is run.

    Raises:
        ValueError: names both lengths.

    >>> check_context(2048, 1024, "norms")
    """
    if needs != "none" and positions is not None and seqlen > positions:
        raise ValueError(
            f"windows of {seqlen} tokens do not fit: the model has {positions} positions. "
            f"Use --seqlen {positions} or less"
        )
