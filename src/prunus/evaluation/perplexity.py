"""Perplexity as pruning papers report it.

The text is tokenized as one string and cut into windows of `seqlen` tokens that do not overlap. The
rest at the end is dropped. The loss of a window is the mean cross entropy of its tokens 2..S, each
predicted from the tokens before it in the window. The perplexity is exp(mean loss over all
windows).

GPTQ, SparseGPT and Wanda all score this way, so we do too, and join the documents of a text as
they do: another separator changes the tokens. Overlapping windows would give every token more
context and a lower perplexity, which could not be compared with the papers' numbers. A perplexity
means nothing without its protocol: text, context, number of windows, dtype.

Protocol `llama.cpp` scores the second half of every window, as the perplexity tool of llama.cpp
does: rows S // 2 to S − 2 of the logits. Each scored token has at least half a window of context.

Legend: W windows, B windows at once, S tokens per window (seqlen), V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.catalogue import CORPORA
from prunus.calibration.corpora import check_corpus, load_corpus
from prunus.calibration.draw import encode
from prunus.calibration.files import (
    check_file,
    file_kind,
    read_documents,
    read_ids,
    read_json_rows,
)
from prunus.calibration.sources import AsChats, Documents, are_texts
from prunus.calibration.windows import (
    UsedBos,
    bos_token,
    cut_rows,
    hash_ids,
    put_bos_first,
    refuse_bos,
    used_bos,
)
from prunus.distributed import fail_together, set_location
from prunus.engine.calibration_windows import given_windows
from prunus.engine.progress import shows_progress, window_step
from prunus.evaluation.eval_options import PROTOCOLS, Protocol, TextOptions
from prunus.evaluation.eval_records import ALL_TEXTS, PerplexityResult, WorstToken
from prunus.evaluation.metrics import exponential
from prunus.evaluation.model_input import (
    ComputeOptions,
    ModelInput,
    check_as_loaded,
    check_reference,
    find_model,
    unchanged,
)
from prunus.evaluation.streamed_model import StreamedModel, choose_streamed
from prunus.evaluation.window_scores import (
    LogitsSource,
    WholeModel,
    WindowProgress,
    WindowScores,
    check_windows,
    score_windows,
)
from prunus.model.device import choose_device
from prunus.options import takes
from prunus.words import counted, did_you_mean

#: SHA-256 of the joined test text of WikiText-2, 1,296,370 bytes.
WIKITEXT2_TEST_SHA256 = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
#: The texts to score that have a name. `chats` is prose of python-docs as questions and answers.
TEXTS = (*CORPORA, "chats")
# Chats of the text `chats`.
_CHATS = 256
#: The tokens of the text before the worst token that a result shows.
_TOKENS_BEFORE = 12
#: Corpus -> how its documents are joined; the most documents and windows, None for all. GPTQ and
#: Wanda score the first 1100 documents of C4's validation shard, and at most 256 windows of them.
_JOINED: dict[str, tuple[str, int | None, int | None]] = {
    "c4": ("the first {count} documents joined with spaces, at most 256 windows", 1100, 256),
    "wikitext2": ("raw test lines joined with two newlines", None, None),
    "ptb": ("test sentences joined with spaces", None, None),
    "python-docs": ("paragraphs joined with blank lines", None, None),
    "python-code": ("modules joined with blank lines", None, None),
}


@takes(TextOptions)
def perplexity(
    model_or_path: Any,
    text: str | Path | torch.Tensor | Sequence[Any] = "wikitext2",
    *,
    reference: Any = None,
    progress: WindowProgress | bool | None = True,
    **options: Any,
) -> PerplexityResult:
    """The perplexity of a causal language model on a text, and how far it is from a reference.

    With a reference, as a rule the dense model, the result has a `divergence`: KL divergence, share
    of tokens with the same most likely prediction, and ratio of the perplexities, from the same
    tokens as the perplexity. `perplexities` scores several models, and several texts.

    Args:
        model_or_path: A folder, a GGUF file, a hub id (safetensors only), or a loaded transformers
            model. A loaded model is scored in evaluation mode, on its device and in its dtype, with
            the tokenizer of its `name_or_path`.
        text: Name of a text, see `load_scoring_text`, or a list of texts, rows or chats, which are
            joined with blank lines. Token ids (N, T), a tensor or input_ids of a `.safetensors`
            file, need no tokenizer. Their rows are cut into windows one by one; without `seqlen`
            each row of a tensor is a window.
        reference: A model to compare with, as `model_or_path`, which has the same vocabulary. None
            compares with nothing.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called with the number of windows done and of all windows; half of the blocks of a
            streamed model count as half of the windows.
        **options: See `TextOptions`.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ModuleNotFoundError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
    """
    shared = {"reference": reference, "progress": progress}
    return perplexities([model_or_path], [text], **shared, **options)[0][0]


@takes(TextOptions)
@shows_progress("perplexity", window_step)
def perplexities(
    models: Sequence[Any],
    texts: Sequence[Any] = ("wikitext2",),
    *,
    reference: Any = None,
    progress: WindowProgress | bool | None = True,
    **options: Any,
) -> list[list[PerplexityResult]]:
    """The perplexities of models on texts, each model side by side with the others.

    With a reference, all models and the reference score the same windows at the same time: its
    logits are computed once and kept nowhere, and differences between two models can be taken
    window by window. Without one, models are scored one after the other.

    Processes that work together make this call together, and split the windows. Each has the whole
    model, or all blocks in turn. The perplexity is that of one process to the last digit.

    Args:
        models: Models as `perplexity` takes them.
        texts: Texts as `perplexity` takes them.
        reference: As for `perplexity`.
        progress: As for `perplexity`, for one text after the other.
        **options: See `TextOptions`.

    Returns:
        For each model its results on all texts. For several texts, one over all of them is last.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ModuleNotFoundError, OSError: As
            `perplexity`.
    """
    chosen = TextOptions.read(None, options)
    first_scored_row(chosen.protocol, window_length(chosen, texts))
    for model in models:
        check_as_loaded(model, chosen.dtype, chosen.device)
    inputs = [find_model(model, chosen.trust_remote_code) for model in models]
    compared = None if reference is None else find_model(reference, chosen.trust_remote_code)
    for text in texts:
        check_text(text, chosen.data)
    if chosen.protocol == "llama.cpp" and chosen.dtype == "auto":
        # As llama.cpp adds. Rounding to bfloat16 is of the size of the errors of eight-bit types.
        chosen = chosen.model_copy(update={"dtype": "float32"})
    report = progress if callable(progress) else None
    groups = [[model] for model in inputs] if compared is None else [inputs]
    return [
        results
        for group in groups
        for results in _side_by_side(group, texts, compared, report, chosen)
    ]


def _side_by_side(
    inputs: Sequence[ModelInput],
    texts: Sequence[Any],
    compared: ModelInput | None,
    progress: WindowProgress | None,
    chosen: TextOptions,
) -> list[list[PerplexityResult]]:
    """Score models that share the tokens of the texts, beside a reference; see `perplexities`."""
    seqlen = window_length(chosen, texts)
    batch = 1 if chosen.batch == "auto" else chosen.batch
    loaded = next((model.loaded for model in inputs if model.folder is None), None)
    device = choose_device(chosen.device, loaded)
    compute = ComputeOptions(chosen.dtype, device, chosen.memory)
    if compared is not None:
        for model in inputs:
            check_reference(model, compared)
    set_location(f"the perplexity of {inputs[0].name} on {', '.join(map(_name, texts))}")
    with fail_together():
        tokenizer = functools.cache(lambda: inputs[0].tokenizer(chosen.tokenizer))
        windows = [scoring_windows(text, tokenizer, seqlen, chosen) for text in texts]
    everyone = inputs if compared is None else [*inputs, compared]
    folders = [model.folder for model in everyone]
    streamed = choose_streamed(folders, chosen.stream, batch * seqlen, compute)
    start = first_scored_row(chosen.protocol, seqlen)
    by_text, seconds = list[list[WindowScores]](), list[float]()
    with unchanged(*folders):
        opened = [_opened(*each, compute) for each in zip(everyone, streamed, strict=True)]
        scored = opened[: len(inputs)]
        for each in opened:
            for of_text in windows:
                called = "the model" if each in scored else "the reference"
                check_windows(each.model, of_text.ids, called)
        for of_text in windows:
            started = time.perf_counter()
            scores = score_windows(
                scored,
                of_text.ids,
                reference=None if compared is None else opened[-1],
                batch=batch,
                start=start,
                progress=progress,
            )
            by_text.append(scores)
            seconds.append(time.perf_counter() - started)
    if len(windows) > 1:
        windows.append(ScoringWindows.joined(windows))
        seconds.append(sum(seconds))
        by_text.append([WindowScores.joined(of_model) for of_model in zip(*by_text, strict=True)])
    return [
        [
            _result(of_text, scores[position], start, compared, each, took)
            for of_text, scores, took in zip(windows, by_text, seconds, strict=True)
        ]
        for position, each in enumerate(scored)
    ]


def window_length(options: TextOptions, texts: Sequence[Any]) -> int:
    """The tokens per window, by default those of the rows of token ids that a program gives."""
    widths = [text.shape[1] for text in texts if _name(text) == "token ids"]
    return options.seqlen or min(widths, default=PROTOCOLS[options.protocol])


def _name(text: Any) -> str:
    """The name of a text, or what a program gives in place of one."""
    return str(given_windows(text)[1]["calibration"])


def _result(
    windows: ScoringWindows,
    scores: WindowScores,
    start: int,
    reference: ModelInput | None,
    model: LogitsSource,
    seconds: float,
) -> PerplexityResult:
    """The figures of one model on one text, compared with the reference if there is one."""
    (count, seqlen), tokens = windows.ids.shape, windows.ids.numel()
    first = "" if start == 0 else f", scored from token {start + 2} of each on"
    divergence = None
    if reference is not None:
        worst = _worst_token(windows, *scores.largest_kl(), start)
        divergence = replace(scores.divergence(reference.name), kl_max_at=worst)
    return PerplexityResult(
        source=str(windows.source),
        perplexity=exponential(scores.loss),
        loss=scores.loss,
        windows=count,
        tokens=tokens,
        seqlen=seqlen,
        protocol=f"{windows.protocol}; {counted(count, 'window')} of {seqlen} tokens without "
        f"overlap ({tokens} tokens){first}, mean loss over windows, "
        f"{str(model.dtype).removeprefix('torch.')}",
        seconds=seconds,
        streamed=isinstance(model, StreamedModel),
        bos=windows.bos,
        windows_sha256=hash_ids(windows.ids),
        divergence=divergence,
        by_window=scores.means_by_window(),
    )


def _worst_token(windows: ScoringWindows, window: int, row: int, start: int) -> WorstToken:
    """The token that scored row `row` of a window predicts, with the text before it."""
    for part in windows.parts:
        if window < len(part.ids):
            windows = part
            break
        window -= len(part.ids)
    token = start + row + 1
    before = text = None
    if windows.tokenizer is not None:
        ids = windows.ids[window, : token + 1].tolist()
        before = windows.tokenizer.decode(ids[max(0, token - _TOKENS_BEFORE) : token])
        text = windows.tokenizer.decode(ids[token:])
    return WorstToken(windows.source, window, token, before, text)


def _opened(model: ModelInput, streamed: bool, compute: ComputeOptions) -> LogitsSource:
    """Open a model to score it, block by block if `streamed`."""
    if streamed and model.folder is not None:
        return StreamedModel(model.folder, compute)
    return WholeModel(model.load_model(compute))


# --- the text ---


@dataclass(frozen=True)
class ScoringText:
    """A text to score."""

    #: All documents, joined.
    text: str
    #: How they are joined, in words.
    protocol: str
    #: Where the text comes from.
    source: str
    #: Only this many windows are scored; None scores all.
    max_windows: int | None = None


@dataclass(frozen=True, eq=False)
class ScoringWindows:
    """The windows of a text to score."""

    #: Token ids (W, S), int64.
    ids: torch.Tensor
    #: Where the text comes from.
    source: str
    #: How the documents are joined and how windows begin, in words.
    protocol: str
    #: Whether every window begins with BOS.
    bos: UsedBos
    #: The tokenizer that cut the text into tokens; None for a file of input_ids.
    tokenizer: Any = None
    #: The windows of single texts, in order, where these are those of several; else empty.
    parts: tuple[ScoringWindows, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[ScoringWindows]) -> ScoringWindows:
        """The windows of several texts, which have the same length, as those of one."""
        ids = torch.cat([part.ids for part in parts])
        return cls(ids, ALL_TEXTS, f"{len(parts)} texts", parts[0].bos, parts=tuple(parts))


def load_scoring_text(name: Any, data: Path | None = None, tokenizer: Any = None) -> ScoringText:
    """Load a text to score: one of `TEXTS`, or a text file in a format that calibration takes.

    Lines of a `.jsonl` file may have `messages` in place of `text`: chats, which the tokenizer's
    template turns into text.

    Args:
        name: Name of the text, path of the file, or a list of texts, rows of a data set or chats.
        data: Folder with local copies of the corpora; None downloads them.
        tokenizer: The tokenizer with the template; None where no text is a chat.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, OSError: The text is unknown, damaged or
            cannot be downloaded.
    """
    check_text(name, data)
    if are_texts(name):
        documents = Documents(name, tokenizer).several(range(len(name)))
        return ScoringText(
            "\n\n".join(documents),
            f"{counted(len(documents), 'text')} joined with blank lines",
            _name(name),
        )
    if (chats := _chats(name)) is not None:
        documents = Documents(chats, tokenizer).several(range(len(chats)))
        how = f"{counted(len(documents), 'chat')} in the model's template"
        return ScoringText("".join(documents), how, name)
    if name not in CORPORA:
        documents = read_documents(Path(name))
        several = f"{len(documents)} documents joined with blank lines"
        how = several if len(documents) > 1 else "the whole text"
        return ScoringText("\n\n".join(documents), how, name)
    corpus = load_corpus(name, "scoring", data)
    how, most, max_windows = _JOINED[name]
    documents = list(itertools.islice(corpus.documents, most))
    how = how.format(count=len(documents))
    text = corpus.joiner.join(documents)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if name == "wikitext2" and digest != WIKITEXT2_TEST_SHA256:
        how += (
            f" (WARNING: not the text that papers score: sha256 {digest}, "
            f"{len(text.encode()):,} bytes)"
        )
    return ScoringText(text, how, corpus.source, max_windows)


def _chats(name: str) -> Sequence[Any] | None:
    """The chats of a text, each for `Documents`; None for a text of another kind."""
    if name == "chats":
        prose = load_corpus("python-docs", "scoring", None)
        return AsChats(prose.documents[:_CHATS])
    if name in CORPORA or file_kind(Path(name)) != "json":
        return None
    rows = list(read_json_rows(Path(name)).values())
    return rows if any("messages" in row for row in rows) else None


def check_text(name: Any, data: Path | None) -> None:
    """Raise the errors of `scoring_windows` that can be found without reading the text."""
    if _name(name) == "pixel values":
        raise ValueError("perplexity is measured on text or token ids, not on pixel values")
    if not isinstance(name, str | Path):
        return
    if name in TEXTS:
        check_corpus("python-docs" if name == "chats" else name, "scoring", data)
        return
    path = Path(name)
    if not str(name) or not (path.exists() or path.suffix):
        raise ValueError(
            f"unknown text {name!r}: give {', '.join(TEXTS)} or a file of text or input_ids"
            f"{did_you_mean(name, TEXTS)}"
        )
    check_file(path)


def first_scored_row(protocol: Protocol, seqlen: int) -> int:
    """The first row of logits of a window that is scored. Row t predicts token t + 1.

    llama.cpp skips the first half, and then scores the rows up to the last but one.

    Raises:
        ValueError: A window of `seqlen` tokens has no token to score.

    >>> first_scored_row("papers", 512), first_scored_row("llama.cpp", 512)
    (0, 256)
    """
    shortest = 2 if protocol == "papers" else 3
    if seqlen < shortest:
        raise ValueError(f"seqlen must be at least {shortest} tokens, not {seqlen}")
    return 0 if protocol == "papers" else seqlen // 2


def scoring_windows(
    name: Any, tokenizer: Callable[[], Any], seqlen: int, options: TextOptions
) -> ScoringWindows:
    """Cut a text, or the rows of a file with input_ids, into windows that do not overlap.

    Args:
        name: The text, see `load_scoring_text`, or token ids: a tensor (N, T), or a `.safetensors`
            file with input_ids.
        tokenizer: Loads the tokenizer of the model. It is not called for input_ids.
        seqlen: Tokens per window.
        options: Number of windows, BOS and data folder.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, OSError: As `load_scoring_text`.
            ValueError too if the text is shorter than a window.
    """
    ids = name.long().cpu() if isinstance(name, torch.Tensor) else _ids_of_file(name)
    if ids is not None:
        source = _name(name)
        refuse_bos(source, options.bos)
        windows = _cut(ids, seqlen, f"{source}: its rows have")[: options.samples]
        how = f"{tuple(ids.shape)} token ids, cut into windows row by row"
        return ScoringWindows(windows.contiguous(), source, how, "given")
    loaded_tokenizer = tokenizer()
    token = bos_token(loaded_tokenizer, options.bos)
    text = load_scoring_text(name, options.data, loaded_tokenizer)
    tokens = encode(loaded_tokenizer, text.text)
    windows = _cut(tokens[None], seqlen, f"{text.source}: the text has")
    windows = put_bos_first(windows[: text.max_windows][: options.samples], token)
    how = "no BOS added to windows" if token is None else "BOS first in every window"
    protocol = f"{text.protocol}, {how}"
    return ScoringWindows(windows, text.source, protocol, used_bos(token), loaded_tokenizer)


def _ids_of_file(name: Any) -> torch.Tensor | None:
    """The token ids of a file with input_ids; None for a text."""
    is_file = isinstance(name, str | Path) and name not in TEXTS
    return read_ids(Path(name)) if is_file and file_kind(Path(name)) == "safetensors" else None


def _cut(ids: torch.Tensor, seqlen: int, what: str) -> torch.Tensor:
    """The windows of rows of token ids; at least one. `what` begins the error if there is none."""
    windows = cut_rows(ids, seqlen)
    if not len(windows):
        raise ValueError(
            f"{what} {ids.shape[1]} tokens, less than a window of {seqlen}; use a smaller `seqlen`"
        )
    return windows
