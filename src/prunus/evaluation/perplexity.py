"""Perplexity as pruning papers report it.

The text is tokenized as one string and cut into windows of `seqlen` tokens that do not overlap. The
rest at the end is dropped. The loss of a window is the mean cross entropy of its tokens 2..S, each
predicted from the tokens before it in the window. The perplexity is exp(mean loss over all
windows).

GPTQ, SparseGPT and Wanda all score this way, so we do too. Overlapping windows would give every
token more context and a lower perplexity, which could not be compared with the papers' numbers. A
perplexity means nothing without its protocol: text, context, number of windows, dtype.

Protocol `llama.cpp` scores the second half of every window, as the perplexity tool of llama.cpp
does: rows S // 2 to S − 2 of the logits. Each scored token has at least half a window of context.

Legend: W windows, B windows at once, S tokens per window (seqlen), V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from torch import nn

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.evaluation.logits import LogitsSource, WholeModel, WindowProgress
from prunus.evaluation.model_input import (
    ModelInput,
    check_as_loaded,
    check_same_vocabulary,
    find_model,
)
from prunus.evaluation.options import PROTOCOLS, TextOptions
from prunus.evaluation.records import PerplexityResult
from prunus.evaluation.reference import Reference
from prunus.evaluation.streamed_model import ComputeOptions, StreamedModel, choose_streamed
from prunus.evaluation.text import check_text, first_scored_row, scoring_windows
from prunus.evaluation.watched import unchanged
from prunus.evaluation.window_scores import exponential, score_windows
from prunus.model.device import choose_device
from prunus.options import takes
from prunus.runs.progress import shows_progress, window_step


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
        model_or_path: a folder or hub id (safetensors only), a loaded transformers model, or a
            `Reference`, whose blocks do not run again for a text that they ran for. A loaded model
            is scored in evaluation mode, on its device and in its dtype, with the tokenizer of its
            `name_or_path`.
        text: name of a text, see `load_scoring_text`. A `.safetensors` file with input_ids (N, T)
            int needs no tokenizer; its rows are cut into windows one by one.
        reference: a folder, hub id or loaded model to compare with, which has the same vocabulary.
            A `Reference` runs once for several models. None compares with nothing.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called with the number of windows done and of all windows; half of the blocks of a
            streamed model count as half of the windows.
        ranks: processes that make this call together and split the windows. Each has the whole
            model, or all blocks in turn. The perplexity is that of one process to the last digit.
        **options: see `TextOptions`.

    Raises:
        ValueError: an argument is out of range, the text is shorter than one window (the message
            gives its length in tokens), a token id is outside the vocabulary, there is no
            tokenizer, a window is longer than the model's context, the model cannot be loaded, a
            checkpoint is changed during the work, the reference has another vocabulary, or the loss
            is not finite.
        FileNotFoundError, ModuleNotFoundError, OSError: see `load_scoring_text`.
    """
    given = TextOptions.read(None, options)
    seqlen = given.seqlen or PROTOCOLS[given.protocol]
    start = first_scored_row(given.protocol, seqlen)
    batch = 1 if given.batch == "auto" else given.batch
    check_as_loaded(model_or_path, given.dtype, given.device)
    check_text(text, given.data)
    place = (
        model_or_path.get_input_embeddings().weight.device  # type: ignore[operator]
        if isinstance(model_or_path, nn.Module)
        else choose_device(given.device, processes=ranks.local_size)
    )
    compute = ComputeOptions(given.dtype, place, given.memory, given.trust_remote_code)
    inputs = [
        find_model(one.model if isinstance(one, Reference) else one, given.trust_remote_code)
        for one in ([model_or_path] if reference is None else [model_or_path, reference])
    ]
    model, folders = inputs[0], [one.folder for one in inputs]
    if reference is not None:
        check_same_vocabulary(*inputs)
    ranks.set_location(f"the perplexity of {model.name} on {text}")
    with ranks.fail_together():
        windows = scoring_windows(text, lambda: model.tokenizer(given.tokenizer), seqlen, given)
    # A `Reference` that is scored itself is opened as if another model were in memory with it. One
    # will be, and the blocks need not run again for it.
    later = [model.folder] if isinstance(model_or_path, Reference) else []
    streamed = choose_streamed([*folders, *later], given.stream, batch * seqlen, compute)
    with contextlib.ExitStack() as stack:
        compared: Reference | None = None
        if isinstance(reference, Reference):
            compared = reference
        elif reference is not None:
            compared = stack.enter_context(Reference(reference))
        if compared is not None:
            compared.open(compute, streamed[1])
        is_kept = isinstance(model_or_path, Reference)
        watched = [model_or_path.watched if is_kept else model.watch()]
        watched += [] if compared is None else [compared.watched]
        stack.enter_context(unchanged(watched, ranks))
        source = _opened(model_or_path, model, compute, streamed[0])
        source.check(windows.ids, "the model")
        if compared is not None:
            compared.check(windows.ids, "the reference")
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
        protocol=f"{windows.protocol}; {count} windows of {seqlen} tokens without overlap "
        f"({tokens} tokens){scored}, mean loss over windows, "
        f"{str(source.dtype).removeprefix('torch.')}",
        seconds=seconds,
        streamed=streamed[0],
        bos=windows.bos,
        divergence=None if compared is None else scores.divergence(inputs[1].name),
    )


def _opened(given: Any, model: ModelInput, compute: ComputeOptions, streamed: bool) -> LogitsSource:
    """The model to score, opened as `perplexity` has chosen."""
    if isinstance(given, Reference):
        given.open(compute, streamed)
        return given
    if model.folder is None:
        return WholeModel(model.loaded)
    if streamed:
        return StreamedModel.open(model.folder, compute)
    return WholeModel(compute.load(model.folder))
