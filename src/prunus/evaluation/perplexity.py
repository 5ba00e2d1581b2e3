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

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.calibration.catalogue import CORPORA
from prunus.calibration.corpora import check_corpus, load_corpus
from prunus.calibration.draw import encode
from prunus.calibration.files import check_file, file_kind, read_documents, read_ids
from prunus.calibration.windows import UsedBos, bos_token, put_bos_first, refuse_bos, used_bos
from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.engine.progress import shows_progress, window_step
from prunus.evaluation.metrics import exponential
from prunus.evaluation.model_input import (
    ComputeOptions,
    ModelInput,
    check_as_loaded,
    check_reference,
    file_states,
    find_model,
    unchanged,
)
from prunus.evaluation.options import PROTOCOLS, Protocol, TextOptions
from prunus.evaluation.records import PerplexityResult
from prunus.evaluation.reference import Reference
from prunus.evaluation.streamed_model import StreamedModel, choose_streamed
from prunus.evaluation.window_scores import (
    LogitsSource,
    WholeModel,
    WindowProgress,
    score_windows,
)
from prunus.hardware.errors import did_you_mean
from prunus.hardware.sizes import counted
from prunus.model.device import choose_device
from prunus.options import takes

#: SHA-256 of the joined test text of WikiText-2, 1,296,370 bytes.
WIKITEXT2_TEST_SHA256 = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
# GPTQ and Wanda score the first 1100 documents of C4's validation shard, and at most 256 windows
# of them.
_C4_DOCUMENTS, _C4_WINDOWS = 1100, 256
#: Corpus -> how its documents are joined.
_JOINED = {
    "c4": f"the first {{count}} documents joined with spaces, at most {_C4_WINDOWS} windows",
    "wikitext2": "raw test lines joined with two newlines",
    "ptb": "test sentences joined with spaces",
    "python-docs": "paragraphs joined with blank lines",
    "python-code": "modules joined with blank lines",
}


@takes(TextOptions)
@shows_progress("perplexity", window_step)
def perplexity(
    model_or_path: Any,
    text: str = "wikitext2",
    *,
    reference: Any = None,
    progress: WindowProgress | bool | None = True,
    ranks: Ranks = SINGLE_PROCESS,
    **options: Any,
) -> PerplexityResult:
    """The perplexity of a causal language model on a text, and how far it is from a reference.

    With a reference, as a rule the dense model, the result has a `divergence`: KL divergence, share
    of tokens with the same most likely prediction, and ratio of the perplexities, from the same
    tokens as the perplexity.

    Args:
        model_or_path: A folder or hub id (safetensors only), a loaded transformers model, or a
            `Reference`, whose blocks do not run again for a text that they ran for. A loaded model
            is scored in evaluation mode, on its device and in its dtype, with the tokenizer of its
            `name_or_path`.
        text: Name of a text, see `load_scoring_text`. A `.safetensors` file with input_ids (N, T)
            int needs no tokenizer; its rows are cut into windows one by one.
        reference: A folder, hub id or loaded model to compare with, which has the same vocabulary.
            A `Reference` runs once for several models. None compares with nothing.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called with the number of windows done and of all windows; half of the blocks of a
            streamed model count as half of the windows.
        ranks: Processes that make this call together and split the windows. Each has the whole
            model, or all blocks in turn. The perplexity is that of one process to the last digit.
        **options: See `TextOptions`.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ModuleNotFoundError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
    """
    chosen = TextOptions.read(None, options)
    seqlen = chosen.seqlen or PROTOCOLS[chosen.protocol]
    start = first_scored_row(chosen.protocol, seqlen)
    batch = 1 if chosen.batch == "auto" else chosen.batch
    check_as_loaded(model_or_path, chosen.dtype, chosen.device)
    check_text(text, chosen.data)
    loaded = model_or_path if isinstance(model_or_path, nn.Module) else None
    device = choose_device(chosen.device, loaded, ranks.local_size)
    compute = ComputeOptions(chosen.dtype, device, chosen.memory, chosen.trust_remote_code)
    inputs = [
        find_model(one.model if isinstance(one, Reference) else one, chosen.trust_remote_code)
        for one in ([model_or_path] if reference is None else [model_or_path, reference])
    ]
    model = inputs[0]
    folders = [one.folder for one in inputs]
    if reference is not None:
        check_reference(*inputs)
    ranks.set_location(f"the perplexity of {model.name} on {text}")
    with ranks.fail_together():
        windows = scoring_windows(text, lambda: model.tokenizer(chosen.tokenizer), seqlen, chosen)
    # A `Reference` that is scored itself is opened as if another model were in memory with it. One
    # will be, and the blocks need not run again for it.
    later = [model.folder] if isinstance(model_or_path, Reference) else []
    streamed = choose_streamed([*folders, *later], chosen.stream, batch * seqlen, compute)
    with contextlib.ExitStack() as stack:
        compared: Reference | None = reference
        if reference is not None and not isinstance(reference, Reference):
            compared = stack.enter_context(Reference(reference))
        watched = file_states(*folders)
        # A `Reference` is watched since it was made.
        for one in (model_or_path, compared):
            watched |= one.watched if isinstance(one, Reference) else {}
        stack.enter_context(unchanged(watched, ranks))
        if compared is not None:
            compared.open(compute, streamed[1])
            compared.check(windows.ids, "the reference")
        source = _opened(model_or_path, model, compute, streamed[0])
        source.check(windows.ids, "the model")
        started = time.perf_counter()
        scores = score_windows(
            source,
            windows.ids,
            reference=compared,
            batch=batch,
            start=start,
            progress=progress if callable(progress) else None,
            ranks=ranks,
        )
        seconds = time.perf_counter() - started
    count, tokens = len(windows.ids), windows.ids.numel()
    scored = "" if start == 0 else f", scored from token {start + 2} of each on"
    return PerplexityResult(
        source=str(windows.source),
        perplexity=exponential(scores.loss),
        loss=scores.loss,
        windows=count,
        tokens=tokens,
        seqlen=seqlen,
        protocol=f"{windows.protocol}; {counted(count, 'window')} of {seqlen} tokens without "
        f"overlap ({tokens} tokens){scored}, mean loss over windows, "
        f"{str(source.dtype).removeprefix('torch.')}",
        seconds=seconds,
        streamed=streamed[0],
        bos=windows.bos,
        divergence=None if compared is None else scores.divergence(inputs[1].name),
    )


def _opened(asked: Any, model: ModelInput, compute: ComputeOptions, streamed: bool) -> LogitsSource:
    """The model to score, opened as `perplexity` has chosen: block by block if `streamed`."""
    if isinstance(asked, Reference):
        asked.open(compute, streamed)
        return asked
    if model.folder is None:
        return WholeModel(model.loaded)
    if streamed:
        return StreamedModel(model.folder, compute)
    return WholeModel(compute.load(model.folder))


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


def load_scoring_text(name: str, data: Path | None = None) -> ScoringText:
    """Load a text to score: one of `CORPORA`, or a text file in a format that calibration takes.

    Args:
        name: Name of the corpus, or path of the file.
        data: Folder with local copies of the corpora; None downloads them.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, OSError: The text is unknown, damaged or
            cannot be downloaded.
    """
    check_text(name, data)
    if name not in CORPORA:
        documents = read_documents(Path(name))
        several = f"{len(documents)} documents joined with blank lines"
        how = several if len(documents) > 1 else "the whole text"
        return ScoringText("\n\n".join(documents), how, name)
    corpus = load_corpus(name, "scoring", data)
    how = _JOINED[name]
    max_windows = None
    if name == "c4":
        count, max_windows = min(len(corpus.documents), _C4_DOCUMENTS), _C4_WINDOWS
        how = how.format(count=count)
        text = corpus.joiner.join(corpus.documents[index] for index in range(count))
    else:
        text = corpus.whole()
    if name == "wikitext2":
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest != WIKITEXT2_TEST_SHA256:
            how += (
                f" (WARNING: not the text that papers score: sha256 {digest}, "
                f"{len(text.encode()):,} bytes)"
            )
    return ScoringText(text, how, corpus.source, max_windows)


def check_text(name: str, data: Path | None) -> None:
    """Raise the errors of `load_scoring_text` that can be found without reading the text."""
    if name in CORPORA:
        check_corpus(name, "scoring", data)
        return
    path = Path(name)
    if not name or not (path.exists() or path.suffix):
        raise ValueError(
            f"unknown text {name!r}: give {', '.join(CORPORA)} or a file of text or input_ids"
            f"{did_you_mean(name, CORPORA)}"
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
    name: str, tokenizer: Callable[[], Any], seqlen: int, options: TextOptions
) -> ScoringWindows:
    """Cut a text, or the rows of a file with input_ids, into windows that do not overlap.

    Args:
        name: The text, see `load_scoring_text`, or a `.safetensors` file with input_ids.
        tokenizer: Loads the tokenizer of the model. It is not called for input_ids.
        seqlen: Tokens per window.
        options: Number of windows, BOS and data folder.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, OSError: As `load_scoring_text`.
            ValueError too if the text is shorter than a window.
    """
    if name not in CORPORA and file_kind(Path(name)) == "safetensors":
        refuse_bos(name, options.bos)
        ids = read_ids(Path(name))
        per_row = ids.shape[1] // seqlen
        if per_row == 0:
            raise ValueError(
                f"{name}: its rows have {ids.shape[1]} tokens, less than a window of {seqlen}; "
                "use a smaller `seqlen`"
            )
        windows = ids[:, : per_row * seqlen].reshape(-1, seqlen)
        how = f"{tuple(ids.shape)} token ids, cut into windows row by row"
        return ScoringWindows(windows[: options.samples].contiguous(), name, how, "given")
    loaded_tokenizer = tokenizer()
    token = bos_token(loaded_tokenizer, options.bos)
    text = load_scoring_text(name, options.data)
    tokens = encode(loaded_tokenizer, text.text)
    count = len(tokens) // seqlen
    if count == 0:
        raise ValueError(
            f"{text.source}: the text has {len(tokens)} tokens, less than a window of {seqlen}; "
            "use a smaller `seqlen`"
        )
    count = min(count, options.samples or count, text.max_windows or count)
    windows = put_bos_first(tokens[: count * seqlen].view(count, seqlen), token)
    how = "no BOS added to windows" if token is None else "BOS first in every window"
    return ScoringWindows(windows, text.source, f"{text.protocol}, {how}", used_bos(token))
