"""Perplexity as pruning papers report it.

The text is tokenized as one string and cut into windows of `seqlen` tokens that do not overlap. The
rest at the end is dropped. The loss of a window is the mean cross entropy of its tokens 2..S, each
predicted from the tokens before it in the window. The perplexity is exp(mean loss over all
windows).

GPTQ, SparseGPT and Wanda all score this way, so we do too. Overlapping windows would give every
token more context and a lower perplexity, which could not be compared with the papers' numbers. A
perplexity means nothing without its protocol: text, context, number of windows, dtype.

Legend: W windows, B windows at once, S tokens per window (seqlen), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.evaluation.cache import ResultCache, checkpoint_digest, environment, file_states
from prunus.evaluation.loss import WindowProgress, window_loss
from prunus.evaluation.model_input import check_language_model, find_folder
from prunus.evaluation.streamed_perplexity import StreamedModel, should_stream
from prunus.evaluation.text import ScoringText, check_text, load_scoring_text, scoring_windows
from prunus.hardware.sizes import parse_bytes
from prunus.model.device import choose_device
from prunus.model.dtypes import DTYPES, check_dtype
from prunus.model.loading import load_model
from prunus.model.tokenizer import load_tokenizer

__all__ = [
    "PerplexityResult",
    "ScoringText",
    "load_scoring_text",
    "perplexity",
    "score_windows",
]


@dataclass(frozen=True)
class PerplexityResult:
    """The perplexity of a model on a text, and how it was measured.

    Attributes:
        source: where the text comes from.
        perplexity: exp(loss), or infinity if that does not fit in a float.
        loss: mean cross entropy in nats per token.
        windows: number of windows.
        tokens: windows * seqlen.
        seqlen: tokens per window.
        protocol: text, windows and dtype in words.
        seconds: time of scoring alone, without loading.
        streamed: whether the model went through memory block by block. The perplexity does not
            depend on it.
    """

    source: str
    perplexity: float
    loss: float
    windows: int
    tokens: int
    seqlen: int
    protocol: str
    seconds: float
    streamed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON, which has no infinity: None stands for it."""
        finite = self.perplexity if math.isfinite(self.perplexity) else None
        return dataclasses.asdict(self) | {"perplexity": finite}


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
    >>> round(math.exp(score_windows(uniform, ids_WS)), 4)
    8.0

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
    return _mean(_window_losses(logits_fn, ids, batch, progress))


def _mean(losses: list[float]) -> float:
    """The mean, added in the order of the windows, so that the number of ranks changes no bit."""
    total = 0.0
    for loss in losses:
        total += loss
    return total / len(losses)


def _losses_of_all_ranks(losses: list[float], ranks: Ranks) -> list[float]:
    found: list[float] = ranks.all_gather(torch.tensor(losses, dtype=torch.float64)).tolist()
    return found


def _window_losses(
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    batch: int,
    progress: WindowProgress | None,
) -> list[float]:
    """The mean loss of every window; see `score_windows`."""
    losses: list[float] = []
    # With more ranks than batches, a rank may have no windows.
    for ids_BS in ids.split(batch) if len(ids) else ():
        logits_BSV = logits_fn(ids_BS)
        targets_BS = ids_BS.to(logits_BSV.device)
        for logits_SV, targets_S in zip(logits_BSV, targets_BS, strict=True):
            losses.append(window_loss(partial(_rows, logits_SV), targets_S, len(losses)))
        if progress is not None:
            progress(len(losses), len(ids))
    return losses


def _rows(logits_SV: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    return logits_SV[first:stop]


def perplexity(
    model_or_path: Any,
    text: str = "wikitext2",
    *,
    tokenizer: Any = None,
    seqlen: int = 2048,
    limit: int | None = None,
    batch: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    data_dir: Path | None = None,
    trust_remote_code: bool = False,
    memory: int | str | None = None,
    stream: bool | None = None,
    cache: Path | None = None,
    progress: WindowProgress | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> PerplexityResult:
    """The perplexity of a causal language model on a text.

    Args:
        model_or_path: a folder or hub id (safetensors only), or a loaded transformers model. A
            loaded model is scored in evaluation mode, on its device and in its dtype.
        text: name of a text, see `load_scoring_text`. A `.safetensors` file with input_ids (N, T)
            int needs no tokenizer; its rows are cut into windows one by one.
        tokenizer: None takes the one in the model's folder.
        seqlen: tokens per window.
        limit: score only this many windows, from the start of the text. None scores all.
        batch: number of windows in one forward pass.
        dtype: dtype of the computation: auto (the checkpoint's own), float32, bfloat16 or float16.
        device: auto (CUDA if there is a device), cpu, cuda or cuda:i.
        data_dir: local folder with the corpora. None takes the folder in PRUNUS_DATA, or the hub if
            that is unset.
        trust_remote_code: run model code that comes with the checkpoint.
        memory: memory budget of the process, in bytes or such as "8GB". None takes what is free.
        stream: True reads the model block by block and takes all windows through each block. False
            loads the whole model. None streams a checkpoint if the whole model does not fit in
            `memory`. The perplexity is the same.
        cache: folder with earlier results, to which a new result is added. None uses no cache.
            Results of loaded models are not cached.
        progress: called with the number of windows done, and the number of all windows. A streamed
            model counts shares of windows: half of the blocks for all windows count as half of the
            windows.
        ranks: processes that make this call together and split the windows. Each has the whole
            model, or all blocks in turn. The perplexity is that of one process to the last digit.

    Raises:
        ValueError: an argument is out of range, the text is shorter than one window (the message
            gives its length in tokens), a token id is outside the vocabulary, there is no
            tokenizer, a window is longer than the model's context, the model cannot be loaded, or
            the loss is not finite.
        FileNotFoundError, ModuleNotFoundError, OSError: see `load_scoring_text`.
    """
    _check_arguments(seqlen, limit, batch, dtype)
    loaded = isinstance(model_or_path, nn.Module)
    if loaded and (dtype != "auto" or device != "auto"):
        raise ValueError(
            "a loaded model is scored as it is: leave dtype and device at 'auto', or convert it "
            "before"
        )
    check_text(text, data_dir)
    place = None if loaded else choose_device(device)
    folder = None if loaded else find_folder(model_or_path)
    if folder is not None:
        check_language_model(folder, trust_remote_code)

    def get_tokenizer() -> Any:
        if tokenizer is not None:
            return tokenizer
        if folder is None:
            raise ValueError(
                "a loaded model comes without its tokenizer: pass tokenizer=, or score a file of "
                "input_ids"
            )
        return load_tokenizer(folder, trust_remote_code)

    ranks.set_location(
        f"the perplexity of {model_or_path if folder is not None else 'the model'} on {text}"
    )
    with ranks.fail_together():
        ids, source, how = scoring_windows(text, get_tokenizer, seqlen, limit, data_dir)
    budget = parse_bytes(memory) if isinstance(memory, str) else memory
    streamed = (
        folder is not None
        and place is not None
        and should_stream(folder, stream, budget, dtype, place, batch * seqlen, trust_remote_code)
    )
    store, key = None, {}
    if cache is not None and folder is not None and place is not None:
        store = ResultCache(cache)
        # A model that does not fit in memory would be read twice, once for its hash.
        checkpoint = (
            file_states(folder) if streamed else checkpoint_digest(folder, trust_remote_code)
        )
        key = _cache_key(checkpoint, ids, batch, dtype, place)
    found = ranks.on_rank_0(lambda: None if store is None else store.get(key))
    if found is None:
        if folder is None or place is None:
            found = _score(model_or_path, ids, batch, progress, ranks)
        elif streamed:
            opened = StreamedModel.open(folder, dtype, place, budget, trust_remote_code)
            found = _score_streamed(opened, ids, batch, progress, ranks)
        else:
            model = load_model(folder, DTYPES.get(dtype, "auto"), trust_remote_code).to(place)
            found = _score(model, ids, batch, progress, ranks)
        if store is not None and ranks.rank == 0:
            # A cache that cannot be written is no error: the next call computes the result again.
            store.put(key, found)
    loss = found["loss"]
    return PerplexityResult(
        source=source,
        # exp(709.8) is the largest that a float64 holds.
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        loss=loss,
        windows=len(ids),
        tokens=ids.numel(),
        seqlen=seqlen,
        protocol=f"{how}; {len(ids)} windows of {seqlen} tokens without overlap "
        f"({ids.numel()} tokens), mean loss over windows, {found['dtype']}",
        seconds=found["seconds"],
        streamed=streamed,
    )


def _cache_key(
    checkpoint: Any, ids: torch.Tensor, batch: int, dtype: str, place: torch.device
) -> dict[str, Any]:
    """Everything that determines the loss. The batch is in it, because it changes the last bits."""
    return {
        "kind": "perplexity",
        "checkpoint": checkpoint,
        "ids": [list(ids.shape), hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()],
        "batch": batch,
        "dtype": dtype,
        **environment(place),
    }


def _score(
    model: Any,
    ids: torch.Tensor,
    batch: int,
    progress: WindowProgress | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Score a loaded model: loss in nats per token, seconds of scoring, dtype."""
    _check_model(model, ids)
    embedding = model.get_input_embeddings().weight
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            own = ranks.own_range(len(ids), batch)
            losses = _window_losses(
                lambda batch_ids: (
                    model(input_ids=batch_ids.to(embedding.device), use_cache=False).logits
                ),
                ids[own.start : own.stop],
                batch,
                progress,
            )
    finally:
        model.train(was_training)
    return {
        "loss": _mean(_losses_of_all_ranks(losses, ranks)),
        "seconds": time.perf_counter() - started,
        "dtype": str(embedding.dtype).removeprefix("torch."),
    }


def _score_streamed(
    model: StreamedModel,
    ids: torch.Tensor,
    batch: int,
    progress: WindowProgress | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Score a checkpoint block by block; returns the same as `_score`."""
    _check_model(model.skeleton.model, ids)
    started = time.perf_counter()
    own = ranks.own_range(len(ids), batch)
    losses = model.losses(ids[own.start : own.stop], batch, progress) if own else []
    return {
        "loss": _mean(_losses_of_all_ranks(losses, ranks)),
        "seconds": time.perf_counter() - started,
        "dtype": str(model.skeleton.dtype).removeprefix("torch."),
    }


def _check_arguments(seqlen: int, limit: int | None, batch: int, dtype: str) -> None:
    if seqlen < 2:
        raise ValueError(f"seqlen must be at least 2 tokens, not {seqlen}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 window, not {limit}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    check_dtype(dtype)


def _check_model(model: Any, ids: torch.Tensor) -> None:
    """Check that the token ids are in the vocabulary, and that the windows fit in the context."""
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = int(ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"token id {largest} is outside the model's vocabulary of {vocabulary}; "
            "are these another tokenizer's ids?"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and ids.shape[1] > positions:
        raise ValueError(
            f"windows of {ids.shape[1]} tokens are longer than the model's {positions} positions; "
            f"use --seqlen {positions} or less"
        )
