"""The loop over windows: loss, and how far the predictions are from those of a reference.

The logits of windows are those of a model in memory (`WholeModel`), of a model that is read block
by block (`StreamedModel`), or of a model that others are compared with (`Reference`).

Perplexity looks at the probability of one token per position, and pruning can raise some of these
while it lowers others. The Kullback-Leibler divergence compares all probabilities. With p of the
reference and q of the model, it is at every position

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)   in nats, never below 0, and 0 only if p = q.

Positions within a window share their context, so they are no independent samples. Standard errors
are therefore taken over the means of windows: sd(means) / √W.

The ratio of two perplexities is exp(d) with d the mean difference of the losses. The difference is
taken window by window, because both models find the same windows hard. By the delta method
the standard error of exp(d) is exp(d) · se(d).

Legend: W windows, B windows at once, S tokens per window, T rows of logits, V vocabulary,
M models.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional

from prunus.calibration.windows import check_ids
from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.evaluation.records import Divergence
from prunus.hardware.numerics import fast_linears

#: Rows of logits (one per token) that are in float32 at the same time. A whole window of 2048
#: tokens and a vocabulary of 128,000 would take 1 GB in float32.
ROWS = 512
#: Rows of logits that are compared at the same time. A row takes some six rows in float32.
_PIECE = 32

#: A function of (first, stop) that returns the logits (T, V) of these rows of a window, in the
#: dtype of the model. Row t predicts token t + 1.
Rows = Callable[[int, int], torch.Tensor]
#: Called with the number of windows done, and the number of all windows.
WindowProgress = Callable[[int, int], None]


class LogitsSource(Protocol):
    """A model that gives the logits of windows, and checks token ids by `check_windows`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""

    def check(self, ids: torch.Tensor, name: str) -> None:
        """Check token ids (W, S), int64; `name` is that of the model in messages.

        Raises:
            ValueError: An id is outside the vocabulary, or windows are longer than the context.
        """

    def windows(
        self, ids: torch.Tensor, batch: int, progress: WindowProgress, compared: bool
    ) -> Generator[Rows, None, None]:
        """The logits of every window, in order. Read them before the next window is taken.

        `ids` are int64 (W, S); W may be 0. `progress` counts shares of windows: half of the blocks
        for all W windows are W / 2. With `compared`, half of the memory is left to another model of
        this size.
        """


class WholeModel:
    """A loaded transformers model, a `LogitsSource`.

    It is scored in evaluation mode, on its device, and is left in the mode that it was in.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        embedding = model.get_input_embeddings()
        self._device: torch.device = embedding.weight.device
        # A packed embedding stores bytes, and says in which dtype it gives rows.
        self.dtype: torch.dtype = getattr(embedding, "dtype", embedding.weight.dtype)

    def check(self, ids: torch.Tensor, name: str) -> None:
        """Check token ids; see `LogitsSource`."""
        check_windows(self._model, ids, name)

    def windows(
        self, ids: torch.Tensor, batch: int, progress: WindowProgress, compared: bool
    ) -> Generator[Rows, None, None]:
        """The logits of every window; see `LogitsSource`. The model is in memory as it is."""
        was_training = self._model.training
        self._model.eval()
        done = 0
        try:
            for ids_BS in ids.split(batch) if len(ids) else ():
                yield from map(rows_of, self._logits(ids_BS))
                done += len(ids_BS)
                progress(done, len(ids))
        finally:
            self._model.train(was_training)

    # The mode ends before a window is handed out, so it never holds for the caller.
    @torch.inference_mode()
    def _logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        ids_BS = ids_BS.to(self._device)
        logits: torch.Tensor = self._model(input_ids=ids_BS, use_cache=False).logits
        return logits


def rows_of(logits_SV: torch.Tensor) -> Rows:
    """The logits of one window as a function of the first row and the row after the last."""
    return lambda first, stop: logits_SV[first:stop]


def check_windows(model: Any, ids: torch.Tensor, name: str) -> None:
    """Check that token ids (W, S) are in the vocabulary, and that windows fit in the context.

    `model` is a transformers model, with or without weights.

    Raises:
        ValueError: They do not.
    """
    check_ids(ids, model.get_input_embeddings().num_embeddings, f"the token ids for {name}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and ids.shape[1] > positions:
        raise ValueError(
            f"windows of {ids.shape[1]} tokens are longer than {name}'s {positions} positions; "
            f"use a `seqlen` of {positions} or less"
        )


@dataclass(frozen=True, eq=False)
class WindowScores:
    """The figures of all windows of all ranks.

    M is 1, or 2 with a reference, which comes first. T are the scored tokens of a window, none
    without a reference.
    """

    #: Mean loss of every window in nats per token, float64.
    losses_WM: torch.Tensor
    #: KL divergence of every scored token in nats, float64.
    kl_WT: torch.Tensor
    #: 1 where both models find the same next token most likely, else 0; float64.
    same_WT: torch.Tensor

    @property
    def loss(self) -> float:
        """The model's mean loss, added window by window: the number of ranks changes no bit."""
        losses: list[float] = self.losses_WM[:, -1].tolist()
        total = 0.0
        for loss in losses:
            total += loss
        return total / len(losses)

    def divergence(self, reference: str) -> Divergence:
        """The comparison with the reference, whose name is `reference`."""
        kl, kl_stderr = _over_windows(self.kl_WT.mean(dim=1).tolist())
        same, same_stderr = _over_windows(self.same_WT.mean(dim=1).tolist())
        before, _ = _over_windows(self.losses_WM[:, 0].tolist())
        change, error = _over_windows((self.losses_WM[:, 1] - self.losses_WM[:, 0]).tolist())
        ratio = exponential(change)
        return Divergence(
            reference=reference,
            kl=kl,
            kl_stderr=kl_stderr,
            kl_q999=_quantile(self.kl_WT.flatten(), 0.999),
            same_top=same,
            same_top_stderr=same_stderr,
            reference_perplexity=exponential(before),
            perplexity_ratio=ratio,
            perplexity_ratio_stderr=None if error is None else ratio * error,
        )


def score_windows(
    model: LogitsSource,
    ids: torch.Tensor,
    *,
    reference: LogitsSource | None = None,
    batch: int = 1,
    start: int = 0,
    progress: WindowProgress | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> WindowScores:
    """Score all windows, a few rows of logits at a time.

    The cross entropy is computed in float32, and summed in float64.

    Args:
        model: The model to score.
        ids: Token ids (W, S), int64, of all ranks. S is at least 2.
        reference: The model to compare with; None compares with nothing.
        batch: Number of windows in one forward pass.
        start: The first row of a window that is scored. Rows before it are context only.
        progress: Called with the number of windows done, and the number of all windows of this
            rank. A window counts half when one of two models is done with it.
        ranks: The processes that split the windows.

    Raises:
        ValueError: Outputs are not finite, or the vocabularies differ.
    """
    span = ranks.own_range(len(ids), batch)
    ids_of_rank = ids[span.start : span.stop]
    sources = [model] if reference is None else [reference, model]
    tokens = 0 if reference is None else ids.shape[1] - 1 - start
    losses_WM, kl_WT, same_WT = (
        torch.empty(len(ids_of_rank), width, dtype=torch.float64)
        for width in (len(sources), tokens, tokens)
    )
    done = [0] * len(sources)

    def report(position: int, windows: int, of: int) -> None:
        done[position] = windows
        if progress is not None:
            progress(sum(done) // len(done), of)

    with contextlib.ExitStack() as stack:
        stack.enter_context(fast_linears())
        windows = [
            stack.enter_context(
                contextlib.closing(
                    source.windows(ids_of_rank, batch, partial(report, position), len(sources) > 1)
                )
            )
            for position, source in enumerate(sources)
        ]
        for window, (*rows, ids_S) in enumerate(zip(*windows, ids_of_rank, strict=True)):
            losses, kl_T, same_T = _score_window(rows, ids_S, window, start)
            losses_WM[window] = torch.tensor(losses, dtype=torch.float64)
            kl_WT[window], same_WT[window] = kl_T, same_T
    if reference is None:
        return WindowScores(ranks.all_gather(losses_WM), kl_WT, same_WT)
    return WindowScores(*(ranks.all_gather(x) for x in (losses_WM, kl_WT, same_WT)))


def _score_window(
    rows: Sequence[Rows], ids_S: torch.Tensor, window: int, start: int
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Mean losses of the models, KL divergences (T,) and agreements (T,) of one window.

    Args:
        rows: The logits by the reference, if there is one, and by the model.
        ids_S: The tokens of the window.
        window: Number of the window, for messages.
        start: The first row that is scored.
    """
    totals = [0.0] * len(rows)
    # `torch.cat` takes no empty list, and there are no pieces without a reference.
    divergences = [torch.empty(0)]
    agreements = [torch.empty(0)]
    # Row t predicts token t + 1, so the last row of a window predicts nothing and is left out.
    last = len(ids_S) - 1
    for first in range(start, last, ROWS):
        stop = min(first + ROWS, last)
        model_TV = rows[-1](first, stop)
        targets_T = ids_S[first + 1 : stop + 1].to(model_TV.device)
        logits = [*(other(first, stop).to(model_TV.device) for other in rows[:-1]), model_TV]
        if logits[0].shape != model_TV.shape:
            raise ValueError(
                f"the reference gives logits for {logits[0].shape[1]} tokens, the model for "
                f"{model_TV.shape[1]}: give a reference with the same vocabulary"
            )
        for model, logits_TV in enumerate(logits):
            loss = functional.cross_entropy(logits_TV.float(), targets_T, reduction="sum")
            totals[model] += loss.item()
        if len(rows) == 1:
            continue
        for pieces in zip(*(logits_TV.split(_PIECE) for logits_TV in logits), strict=True):
            kl_T, same_T = token_divergences(*pieces)
            divergences.append(kl_T.cpu())
            agreements.append(same_T.cpu())
    for total in totals:
        if not math.isfinite(total):
            raise ValueError(
                f"the loss of window {window} is {total}: the model's outputs are not finite. "
                "Damaged weights, or a dtype too small for this model; try `dtype` float32"
            )
    kl_T = torch.cat(divergences)
    if not kl_T.isfinite().all():
        raise ValueError(
            f"the KL divergence of window {window} is not finite: the model gives probability 0 to "
            "a token that the reference can predict"
        )
    return [total / (last - start) for total in totals], kl_T, torch.cat(agreements)


def token_divergences(
    reference_TV: torch.Tensor, model_TV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare two models' logits (T, V) row by row, in any floating dtype.

    With logits x and y whose largest is 0, and Z the sums of their exponentials,

        KL = Σ_v exp(x_v) (x_v − y_v) / Z_x + log Z_y − log Z_x.

    Exponentials are taken in float32, and all sums over the vocabulary in float64. A sum of 50,000
    probabilities in float32, as in `torch.log_softmax`, would be wrong by about 1e-5. Rounding may
    still put a value a little below 0. It is kept, because setting it to 0 would bias the mean.

    >>> even, odds = torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log()
    >>> kl, same = token_divergences(odds, even)
    >>> round(kl.item(), 4)  # 0.75 log 1.5 + 0.25 log 0.5
    0.1308

    Returns:
        KL(reference ‖ model) per row (T,) in nats, float64, and whether the most likely token is
        the same (T,), bool.
    """
    x_TV, y_TV = (
        logits.float() - logits.float().amax(dim=-1, keepdim=True)
        for logits in (reference_TV, model_TV)
    )
    p_TV = x_TV.exp()  # not yet divided by its sum
    sum_p_T = p_TV.sum(dim=-1, dtype=torch.float64)
    sum_q_T = y_TV.exp().sum(dim=-1, dtype=torch.float64)
    # A token that the reference rules out adds 0 log 0 = 0, where the product may be NaN.
    terms_TV = (p_TV * (x_TV - y_TV)).masked_fill(p_TV == 0, 0)
    mean_T = terms_TV.sum(dim=-1, dtype=torch.float64) / sum_p_T
    kl_T = mean_T + sum_q_T.log() - sum_p_T.log()
    return kl_T, x_TV.argmax(dim=-1) == y_TV.argmax(dim=-1)


def _over_windows(means: Sequence[float]) -> tuple[float, float | None]:
    """The mean over windows, and its standard error sd / √W; None for a single window."""
    mean = statistics.fmean(means)
    error = statistics.stdev(means, mean) / math.sqrt(len(means)) if len(means) > 1 else None
    return mean, error


def _quantile(values: torch.Tensor, share: float) -> float:
    """A quantile with linear interpolation, as in numpy. `torch.quantile` takes 2^24 values.

    >>> _quantile(torch.tensor([4.0, 1.0, 2.0]), 0.75)
    3.0
    """
    ordered = values.sort().values
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below].item(), ordered[above].item()
    return low + (position - below) * (high - low)


def exponential(loss: float) -> float:
    """exp(loss), or infinity: exp(709.8) is the largest that a float64 holds."""
    return math.exp(loss) if loss < 700 else math.inf
