"""The texts on which perplexity is measured, cut into windows.

Papers join the documents of a text into one string before they tokenize it: WikiText-2 with two
newlines between its lines, C4 with spaces, PTB with spaces. We join them in the same way. Another
separator would change the tokens, and the perplexity could not be compared with a paper's any more.

Legend: W windows, S tokens per window (seqlen).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.catalogue import CORPORA
from prunus.calibration.corpora import check_corpus, load_corpus
from prunus.calibration.draw import encode
from prunus.calibration.files import check_file, file_kind, read_documents, read_ids
from prunus.calibration.windows import UsedBos, bos_token, put_bos_first, refuse_bos, used_bos
from prunus.evaluation.options import Protocol, TextOptions

#: SHA-256 of the joined test text of WikiText-2, 1,296,370 bytes.
WIKITEXT2_TEST_SHA256 = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
#: GPTQ and Wanda score the first 1100 documents of C4's validation shard, and at most 256 windows
#: of them.
_C4_DOCUMENTS, _C4_WINDOWS = 1100, 256


@dataclass(frozen=True)
class ScoringText:
    """A text to score.

    Attributes:
        text: all documents, joined.
        protocol: how they were joined, in words.
        source: where the text was read.
        max_windows: the largest number of windows by convention, or None.
    """

    text: str
    protocol: str
    source: str
    max_windows: int | None = None


@dataclass(frozen=True, eq=False)
class ScoringWindows:
    """A text to score, cut into windows.

    Attributes:
        ids: token ids (W, S), int64.
        source: where the text was read.
        protocol: how the text was joined and how windows begin, in words.
        bos: whether every window begins with BOS; see `UsedBos`.
    """

    ids: torch.Tensor
    source: str
    protocol: str
    bos: UsedBos


def load_scoring_text(name: str, data: Path | None = None) -> ScoringText:
    """Load a text to score.

    Args:
        name: `wikitext2`, `c4`, `ptb`, `python-docs`, or a text file in a format that calibration
            takes.
        data: local folder with the corpora. None takes PRUNUS_DATA, or the hub.

    Raises:
        ValueError: an unknown name, or a file without text.
        FileNotFoundError, ModuleNotFoundError: no such file, or an extra is not installed.
        OSError: the hub does not answer.
    """
    check_text(name, data)
    if name not in CORPORA:
        documents = read_documents(Path(name))
        how = (
            f"{len(documents)} documents joined with blank lines"
            if len(documents) > 1
            else "the whole text"
        )
        return ScoringText("\n\n".join(documents), how, name)
    corpus = load_corpus(name, "scoring", data)
    if name == "c4":
        count = min(len(corpus.documents), _C4_DOCUMENTS)
        documents = [corpus.documents[index] for index in range(count)]
        how = (
            f"the first {len(documents)} documents joined with spaces, "
            f"at most {_C4_WINDOWS} windows"
        )
        return ScoringText(corpus.joiner.join(documents), how, corpus.source, _C4_WINDOWS)
    text = corpus.whole()
    if name == "wikitext2":
        how = "raw test lines joined with two newlines"
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest != WIKITEXT2_TEST_SHA256:
            how += (
                f" (WARNING: not the text that papers score: sha256 {digest}, "
                f"{len(text.encode()):,} bytes)"
            )
    else:
        how = {
            "ptb": "test sentences joined with spaces",
            "python-docs": "paragraphs joined with blank lines",
        }[name]
    return ScoringText(text, how, corpus.source)


def check_text(name: str, data: Path | None) -> None:
    """Raise the errors of `load_scoring_text` that can be found without reading the text."""
    if name in CORPORA:
        check_corpus(name, "scoring", data)
        return
    path = Path(name)
    if not name or (not path.exists() and (name == "self" or not path.suffix)):
        raise ValueError(
            f"unknown text {name!r}: give {', '.join(CORPORA)} or a file of text or input_ids"
        )
    check_file(path)


def first_scored_row(protocol: Protocol, seqlen: int) -> int:
    """The first row of logits of a window that is scored. Row t predicts token t + 1.

    llama.cpp skips the first half, and then scores the rows up to the last but one:

    >>> first_scored_row("papers", 512), first_scored_row("llama.cpp", 512)
    (0, 256)
    """
    shortest = 2 if protocol == "papers" else 3
    if seqlen < shortest:
        raise ValueError(f"seqlen must be at least {shortest} tokens, not {seqlen}")
    return 0 if protocol == "papers" else seqlen // 2


def scoring_windows(
    name: str, tokenizer: Callable[[], Any], seqlen: int, options: TextOptions
) -> ScoringWindows:
    """Cut a text into windows that do not overlap, from its start.

    Args:
        name: see `load_scoring_text`, or a `.safetensors` file with input_ids, whose windows stay
            as they are.
        seqlen: S, tokens per window.
    """
    bos, samples, data = options.bos, options.samples, options.data
    check_text(name, data)
    if name not in CORPORA and file_kind(Path(name)) == "safetensors":
        refuse_bos(name, bos)
        ids = read_ids(Path(name))
        per_row = ids.shape[1] // seqlen
        if per_row == 0:
            raise ValueError(
                f"{name}: its rows have {ids.shape[1]} tokens, less than a window of {seqlen}; "
                "use a smaller `seqlen`"
            )
        windows = ids[:, : per_row * seqlen].reshape(-1, seqlen)
        how = f"{tuple(ids.shape)} token ids, cut into windows row by row"
        return ScoringWindows(windows[:samples].contiguous(), name, how, "given")
    loaded_tokenizer = tokenizer()
    token = bos_token(loaded_tokenizer, bos)
    text = load_scoring_text(name, data)
    tokens = encode(loaded_tokenizer, text.text)
    count = len(tokens) // seqlen
    if count == 0:
        raise ValueError(
            f"{text.source}: the text has {len(tokens)} tokens, less than a window of {seqlen}; "
            "use a smaller `seqlen`"
        )
    count = min([count, *(bound for bound in (samples, text.max_windows) if bound is not None)])
    windows = put_bos_first(tokens[: count * seqlen].view(count, seqlen), token)
    how = "no BOS added to windows" if token is None else "BOS first in every window"
    return ScoringWindows(windows, text.source, f"{text.protocol}, {how}", used_bos(token))
