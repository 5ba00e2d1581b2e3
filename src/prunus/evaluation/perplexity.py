"""Perplexity as pruning papers report it.

The text is tokenised as one string and cut into windows of `seqlen` tokens that do not overlap; what is
left at the end is dropped. Loss of a window: mean cross entropy of its tokens 2..S, each given those before
it in the window. Perplexity: exp of the mean over windows. (GPTQ, SparseGPT and Wanda all score this way.)
A number says nothing without its protocol: text, context, windows, dtype.

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
from prunus.evaluation.cache import ResultCache, checkpoint_digest, environment, files_as_they_are
from prunus.evaluation.loss import window_loss
from prunus.evaluation.model_input import find_folder, require_text
from prunus.evaluation.streamed_perplexity import StreamedModel, streams
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
    """perplexity = exp(loss); loss in nats per token; tokens = windows * seqlen; seconds of scoring alone.

    `streamed` says that the model went through memory block by block; the figure does not depend on it.
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
        """The fields as plain values, for JSON, which knows no infinity: None stands for it."""
        finite = self.perplexity if math.isfinite(self.perplexity) else None
        return dataclasses.asdict(self) | {"perplexity": finite}


def score_windows(
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean over windows of the mean next-token cross entropy, in nats per token.

    Computed in float32, a few rows of logits at a time, and summed in float64.

    Args:
        logits_fn: ids (B, S) int64 -> logits (B, S, V), any floating dtype, any device.
        ids: (W, S) int64.
        batch: B, windows per call.
        progress: called with windows done and windows in all.

    Raises:
        ValueError: no windows, S < 2, batch < 1, a loss that is not finite.
    """
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(
            f"ids must be (windows, tokens) with at least 1 window of 2 tokens, not {tuple(ids.shape)}"
        )
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    return _mean(_window_losses(logits_fn, ids, batch, progress))


def _mean(losses: list[float]) -> float:
    """Added from the first to the last, whoever computed them."""
    total = 0.0
    for loss in losses:
        total += loss
    return total / len(losses)


def _everybodys(losses: list[float], ranks: Ranks) -> list[float]:
    found: list[float] = ranks.all_gather(torch.tensor(losses, dtype=torch.float64)).tolist()
    return found


def _window_losses(
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> list[float]:
    """The mean loss of every window; see `score_windows`."""
    losses: list[float] = []
    for ids_BS in ids.split(batch) if len(ids) else ():  # a rank may have none
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
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> PerplexityResult:
    """Perplexity of a causal LM on a text.

    Args:
        model_or_path: a folder or hub id (safetensors only), or a loaded transformers model, which is scored
            where and as it is, in evaluation mode.
        text: see `load_scoring_text`; or a `.safetensors` file with input_ids (N, T) int, whose rows are cut
            into windows, which needs no tokenizer.
        tokenizer: default is the one in the model's folder.
        seqlen: tokens per window.
        limit: score at most this many windows, the first ones.
        batch: windows at once.
        dtype: auto (the checkpoint's own), float32, bfloat16 or float16, of the computation.
        device: auto (CUDA where there is one), cpu, cuda, cuda:i.
        data_dir: local copy of the corpora; None means the folder in PRUNUS_DATA, or the hub where that is
            unset.
        trust_remote_code: run model code that comes with the checkpoint.
        memory: budget of the process, such as "8GB" or bytes; default what is free.
        stream: True takes all windows through one block before the next is read, False loads the whole model; by
            default a checkpoint is streamed where the whole model does not fit in `memory`. The figure is the same.
        cache: folder to find an earlier result in and to keep a new one; None for neither. Loaded models have none.
        progress: called with windows done and windows in all; a streamed model's are shares of each window.
        ranks: processes that call this alike and share the windows, each with the whole model or all of its blocks in
            turn; the figure is that of one process to the last digit.

    Raises:
        ValueError: arguments out of range, a text shorter than one window (the message gives its length in
            tokens), token ids outside the vocabulary, no tokenizer, a window longer than the model's context,
            a model that cannot be loaded, a loss that is not finite.
        FileNotFoundError, ModuleNotFoundError, OSError: see `load_scoring_text`.
    """
    _check_arguments(seqlen, limit, batch, dtype)
    loaded = isinstance(model_or_path, nn.Module)
    if loaded and (dtype != "auto" or device != "auto"):
        raise ValueError(
            "a loaded model is scored as it is: leave dtype and device at 'auto', or convert it before"
        )
    check_text(text, data_dir)
    place = None if loaded else choose_device(device)
    folder = None if loaded else find_folder(model_or_path)
    if folder is not None:
        require_text(folder, trust_remote_code)

    def get_tokenizer() -> Any:
        if tokenizer is not None:
            return tokenizer
        if folder is None:
            raise ValueError(
                "a loaded model comes without its tokenizer: pass tokenizer=, or score a file of input_ids"
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
        and streams(folder, stream, budget, dtype, place, batch * seqlen, trust_remote_code)
    )
    store, key = None, {}
    if cache is not None and folder is not None and place is not None:
        store = ResultCache(cache)
        key = {
            "kind": "perplexity",
            # To read what does not fit in memory for its hash alone would double the traffic.
            "checkpoint": files_as_they_are(folder)
            if streamed
            else checkpoint_digest(folder, trust_remote_code),
            "ids": [
                list(ids.shape),
                hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest(),
            ],
            "batch": batch,
            "dtype": dtype,
            **environment(place),
        }
    found = ranks.on_rank_0(lambda: None if store is None else store.find(key))
    if found is None:
        if folder is None or place is None:
            found = _score(model_or_path, ids, batch, progress, ranks)
        elif streamed:
            found = _score_streamed(
                StreamedModel.open(folder, dtype, place, budget, trust_remote_code),
                ids,
                batch,
                progress,
                ranks,
            )
        else:
            model = load_model(folder, DTYPES.get(dtype, "auto"), trust_remote_code).to(place)
            found = _score(model, ids, batch, progress, ranks)
        if store is not None and ranks.rank == 0:
            store.keep(
                key, found
            )  # one that cannot be written costs nothing but the next computation
    loss = found["loss"]
    return PerplexityResult(
        source=source,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        loss=loss,
        windows=len(ids),
        tokens=ids.numel(),
        seqlen=seqlen,
        protocol=f"{how}; {len(ids)} windows of {seqlen} tokens without overlap ({ids.numel()} tokens), "
        f"mean loss over windows, {found['dtype']}",
        seconds=found["seconds"],
        streamed=streamed,
    )


def _score(
    model: Any,
    ids: torch.Tensor,
    batch: int,
    progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Loss in nats per token, seconds of scoring, dtype of the computation."""
    _check_model(model, ids)
    where = model.get_input_embeddings().weight
    was_training = model.training
    model.eval()
    begin = time.perf_counter()
    try:
        with torch.inference_mode():
            mine = ranks.own_range(len(ids), batch)
            losses = _window_losses(
                lambda batch_ids: (
                    model(input_ids=batch_ids.to(where.device), use_cache=False).logits
                ),
                ids[mine.start : mine.stop],
                batch,
                progress,
            )
    finally:
        model.train(was_training)
    return {
        "loss": _mean(_everybodys(losses, ranks)),
        "seconds": time.perf_counter() - begin,
        "dtype": str(where.dtype).removeprefix("torch."),
    }


def _score_streamed(
    model: StreamedModel,
    ids: torch.Tensor,
    batch: int,
    progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """As `_score`, block by block."""
    _check_model(model.skeleton.model, ids)
    begin = time.perf_counter()
    mine = ranks.own_range(len(ids), batch)
    losses = model.losses(ids[mine.start : mine.stop], batch, progress) if mine else []
    return {
        "loss": _mean(_everybodys(losses, ranks)),
        "seconds": time.perf_counter() - begin,
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
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = int(ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"token id {largest} is outside the model's vocabulary of {vocabulary}; another tokenizer's ids?"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and ids.shape[1] > positions:
        raise ValueError(
            f"windows of {ids.shape[1]} tokens are longer than the model's {positions} positions; "
            f"use --seqlen {positions} or less"
        )
