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
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.calibration.bos import Bos
from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.evaluation.cache import (
    ResultCache,
    checkpoint_digest,
    environment,
    file_states,
    ids_digest,
)
from prunus.evaluation.divergence import compare_windows, exponential, make_divergence
from prunus.evaluation.loss import WindowProgress, window_loss
from prunus.evaluation.model_input import check_language_model, check_same_vocabulary, find_folder
from prunus.evaluation.perplexity_result import PerplexityResult
from prunus.evaluation.reference import Reference
from prunus.evaluation.streamed_perplexity import StreamedModel, choose_streamed
from prunus.evaluation.text import (
    PROTOCOLS,
    Protocol,
    ScoringText,
    ScoringWindows,
    check_text,
    first_scored_row,
    load_scoring_text,
    scoring_windows,
)
from prunus.evaluation.whole_model import WholeModel, logits_of_windows
from prunus.hardware.sizes import parse_bytes
from prunus.model.device import choose_device
from prunus.model.dtypes import DTYPES, check_dtype
from prunus.model.loading import load_model
from prunus.model.tokenizer import load_tokenizer
from prunus.runs.progress_bar import shows_progress, window_step

__all__ = ["ScoringText", "load_scoring_text", "perplexity", "score_windows"]


def score_windows(
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    batch: int = 1,
    progress: WindowProgress | None = None,
) -> float:
    """The mean over windows of the mean next-token cross entropy, in nats per token.

    The cross entropy is computed in float32, a few rows of logits at a time, and summed in float64.

    >>> ids_WS = torch.zeros(2, 5, dtype=torch.int64)
    >>> uniform = lambda ids_BS: torch.zeros(*ids_BS.shape, 8)  # a vocabulary of 8
    >>> round(score_windows(uniform, ids_WS), 4)  # log 8
    2.0794

    Args:
        logits_fn: a function of ids (B, S) int64 that returns logits (B, S, V), any floating dtype
            and device.
        ids: token ids (W, S), int64.
        batch: B, the number of windows per call.
        progress: called with the number of windows done, and the number of all windows.

    Raises:
        ValueError: no windows, S < 2, batch < 1, or a loss that is not finite.
    """
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(
            "ids must be (windows, tokens) with at least 1 window of 2 tokens, not "
            f"{tuple(ids.shape)}"
        )
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    windows = logits_of_windows(logits_fn, ids, batch, progress)
    pairs = enumerate(zip(windows, ids, strict=True))
    return _mean([window_loss(rows, ids_S, window) for window, (rows, ids_S) in pairs])


def _mean(losses: list[float]) -> float:
    """The mean, added in the order of the windows, so that the number of ranks changes no bit."""
    total = 0.0
    for loss in losses:
        total += loss
    return total / len(losses)


@shows_progress("perplexity", window_step)
def perplexity(
    model_or_path: Any,
    text: str = "wikitext2",
    *,
    reference: Any = None,
    protocol: Protocol = "papers",
    bos: Bos = "auto",
    tokenizer: Any = None,
    seqlen: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    data_dir: Path | None = None,
    trust_remote_code: bool = False,
    memory: int | str | None = None,
    stream: bool | None = None,
    cache: Path | None = None,
    progress: WindowProgress | bool | None = True,
    ranks: Ranks = SINGLE_PROCESS,
) -> PerplexityResult:
    """The perplexity of a causal language model on a text, and how far it is from a reference.

    With a reference, as a rule the dense model, the result has a `divergence`: KL divergence, share
    of tokens with the same most likely prediction, and ratio of the perplexities, from the same
    tokens as the perplexity.

    Args:
        model_or_path: a folder or hub id (safetensors only), a loaded transformers model, or a
            `Reference`, whose blocks do not run again for a text that they ran for. A loaded model
            is scored in evaluation mode, on its device and in its dtype.
        text: name of a text, see `load_scoring_text`. A `.safetensors` file with input_ids (N, T)
            int needs no tokenizer; its rows are cut into windows one by one.
        reference: a folder, hub id or loaded model to compare with, which has the same vocabulary.
            A `Reference` runs once for several models. None compares with nothing.
        protocol: `papers` scores all tokens of a window but the first. `llama.cpp` scores those of
            its second half, as the perplexity tool of llama.cpp does.
        bos: whether BOS takes the place of every window's first token: `auto`, if the tokenizer
            puts it before a text, as generation and lm-eval do; `no`, as in the papers; or `yes`.
        tokenizer: None takes the one in the model's folder.
        seqlen: tokens per window. None takes 2048, or 512 with protocol `llama.cpp`.
        limit: score only this many windows, from the start of the text. None scores all.
        batch: number of windows in one forward pass.
        dtype: dtype of the computation: auto (the checkpoint's own), float32, bfloat16 or float16.
        device: auto (CUDA if there is a device), cpu, cuda or cuda:i.
        data_dir: local folder with the corpora. None takes the folder in PRUNUS_DATA, or the hub if
            that is unset.
        trust_remote_code: run model code that comes with the checkpoint.
        memory: memory budget of the process, in bytes or such as "8GB". None takes what is free.
        stream: True reads the model block by block and takes all windows through each block. False
            loads the whole model. None streams a checkpoint if the whole model, and the reference
            beside it, does not fit in `memory`. The perplexity is the same.
        cache: folder with earlier results, to which a new result is added. None uses no cache.
            Results of loaded models are not cached.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called with the number of windows done and of all windows; half of the blocks of a
            streamed model count as half of the windows.
        ranks: processes that make this call together and split the windows. Each has the whole
            model, or all blocks in turn. The perplexity is that of one process to the last digit.

    Raises:
        ValueError: an argument is out of range, the text is shorter than one window (the message
            gives its length in tokens), a token id is outside the vocabulary, there is no
            tokenizer, a window is longer than the model's context, the model cannot be loaded, the
            reference has another vocabulary, or the loss is not finite.
        FileNotFoundError, ModuleNotFoundError, OSError: see `load_scoring_text`.
    """
    seqlen = PROTOCOLS.get(protocol, 0) if seqlen is None else seqlen
    start = first_scored_row(protocol, seqlen)
    _check_arguments(limit, batch, dtype)
    if isinstance(model_or_path, nn.Module) and (dtype != "auto" or device != "auto"):
        raise ValueError(
            "a loaded model is scored as it is: leave dtype and device at 'auto', or convert it "
            "before"
        )
    check_text(text, data_dir)
    place = (
        model_or_path.get_input_embeddings().weight.device  # type: ignore[operator]
        if isinstance(model_or_path, nn.Module)
        else choose_device(device, processes=ranks.local_size)
    )
    model = model_or_path.model if isinstance(model_or_path, Reference) else model_or_path
    compared = reference.model if isinstance(reference, Reference) else reference
    models = [model] if reference is None else [model, compared]
    folders = [None if isinstance(one, nn.Module) else find_folder(one) for one in models]
    for stored in filter(None, folders):
        check_language_model(stored, trust_remote_code)
    if reference is not None:
        check_same_vocabulary(model, compared, trust_remote_code)

    def get_tokenizer() -> Any:
        if tokenizer is not None:
            return tokenizer
        if folders[0] is None:
            raise ValueError(
                "a loaded model comes without its tokenizer: pass tokenizer=, or score a file of "
                "input_ids"
            )
        return load_tokenizer(folders[0], trust_remote_code)

    ranks.set_location(
        f"the perplexity of {'the model' if folders[0] is None else model} on {text}"
    )
    with ranks.fail_together():
        windows = scoring_windows(text, get_tokenizer, seqlen, limit, data_dir, bos)
    ids = windows.ids
    budget = parse_bytes(memory) if isinstance(memory, str) else memory
    settings = (dtype, place, budget, trust_remote_code)
    with contextlib.ExitStack() as stack:
        other = reference if isinstance(reference, Reference) else None
        if other is None and reference is not None:
            other = stack.enter_context(Reference(reference))
        if other is not None:
            other.open(*settings)
        # A `Reference` is chosen for as if another model were beside it: one will come, and the
        # blocks need not run again for it.
        chosen = [*folders, folders[0]] if isinstance(model_or_path, Reference) else folders
        stored_folders = [folder for folder in chosen if folder is not None]
        decided = iter(
            choose_streamed(
                stored_folders, stream, budget, dtype, place, batch * seqlen, trust_remote_code
            )
        )
        streamed = [folder is not None and next(decided) for folder in folders]
        store, key = None, {}
        if cache is not None and folders[0] is not None and None not in folders:
            store = ResultCache(cache)
            key = _cache_key(
                _digest(folders[0], streamed[0], trust_remote_code),
                None if other is None else other.digest(not streamed[1], trust_remote_code),
                windows,
                start,
                batch,
                dtype,
                place,
            )
        found = ranks.on_rank_0(lambda: _look_up(store, key, reference is not None))
        if found is None:
            opened = _open(model_or_path, folders[0], streamed[0], settings)
            for one, by_blocks in zip((opened, other), streamed, strict=False):
                if isinstance(one, Reference):
                    one.choose(by_blocks)
            report = progress if callable(progress) else None
            found = _score(opened, other, ids, start, batch, report, ranks)
            if store is not None and ranks.rank == 0:
                # A cache that cannot be written is no error: the next call computes the result
                # again.
                store.put(key, found)
    scored = "" if start == 0 else f", scored from token {start + 2} of each on"
    return PerplexityResult(
        source=windows.source,
        perplexity=exponential(found["loss"]),
        loss=found["loss"],
        windows=len(ids),
        tokens=ids.numel(),
        seqlen=seqlen,
        protocol=f"{windows.protocol}; {len(ids)} windows of {seqlen} tokens without overlap "
        f"({ids.numel()} tokens){scored}, mean loss over windows, {found['dtype']}",
        seconds=found["seconds"],
        streamed=streamed[0],
        bos=windows.bos,
        divergence=None
        if reference is None
        else make_divergence(_name(compared), found["divergence"]),
    )


def _name(model: Any) -> str:
    if not isinstance(model, nn.Module):
        return str(model)
    return str(getattr(model, "name_or_path", "")) or type(model).__name__


def _open(
    model: Any, folder: Path | None, streamed: bool, settings: tuple[Any, ...]
) -> WholeModel | StreamedModel | Reference:
    """Open the model to score, as `perplexity` has chosen."""
    dtype, place, _, trust_remote_code = settings
    if isinstance(model, Reference):
        model.open(*settings)
        return model
    if folder is None:
        return WholeModel(model)
    if streamed:
        return StreamedModel.open(folder, *settings)
    return WholeModel(load_model(folder, DTYPES.get(dtype, "auto"), trust_remote_code).to(place))


def _digest(folder: Path, streamed: bool, code: bool) -> Any:
    """A model that does not fit in memory would be read twice, once for its hash."""
    return file_states(folder) if streamed else checkpoint_digest(folder, code)


def _look_up(
    store: ResultCache | None, key: dict[str, Any], compared: bool
) -> dict[str, Any] | None:
    """The earlier figures for a key; None if there are none, or if the entry is damaged."""
    found = None if store is None else store.get(key)
    if found is None:
        return None
    try:
        usable = math.isfinite(found["seconds"]) and exponential(found["loss"]) > 0
        usable = usable and isinstance(found["dtype"], str)
        if compared:
            make_divergence("", found["divergence"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return found if usable else None


def _cache_key(
    checkpoint: Any,
    reference: Any,
    windows: ScoringWindows,
    start: int,
    batch: int,
    dtype: str,
    place: torch.device,
) -> dict[str, Any]:
    """Everything that determines the loss. The batch is in it, because it changes the last bits."""
    key = {
        "kind": "perplexity",
        "checkpoint": checkpoint,
        "ids": ids_digest(windows.ids),
        "batch": batch,
        "dtype": dtype,
        **environment(place),
    }
    # Left out where they are not used, so that results of earlier versions are still found.
    if start:
        key["start"] = start
    if windows.bos == "yes":
        key["bos"] = windows.bos
    if reference is not None:
        key["reference"] = reference
    return key


def _score(
    model: WholeModel | StreamedModel | Reference,
    reference: Reference | None,
    ids: torch.Tensor,
    start: int,
    batch: int,
    progress: WindowProgress | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Score a model: loss in nats per token, seconds of scoring, dtype, divergence.

    Args:
        model: the model.
        reference: what to compare it with, or None.
        ids: token ids (W, S) of all ranks.
        start: the first row of a window that is scored.
        batch: number of windows in one forward pass.
        progress: see `perplexity`.
        ranks: processes that split the windows.
    """
    model.check(ids, "the model")
    if reference is not None:
        reference.check(ids, "the reference")
    started = time.perf_counter()
    if reference is not None:
        losses, divergence = compare_windows(model, reference, ids, batch, start, progress, ranks)
        figures = {"divergence": divergence}
    else:
        own = ranks.own_range(len(ids), batch)
        own_ids = ids[own.start : own.stop]
        with contextlib.closing(model.windows(own_ids, batch, progress)) as windows:
            pairs = enumerate(zip(windows, own_ids, strict=True))
            own_losses = [window_loss(rows, ids_S, n, start) for n, (rows, ids_S) in pairs]
        losses = ranks.all_gather(torch.tensor(own_losses, dtype=torch.float64)).tolist()
        figures = {}
    return {
        "loss": _mean(losses),
        "seconds": time.perf_counter() - started,
        "dtype": str(model.dtype).removeprefix("torch."),
        **figures,
    }


def _check_arguments(limit: int | None, batch: int, dtype: str) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 window, not {limit}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    check_dtype(dtype)
