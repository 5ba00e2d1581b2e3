"""How far a model's predictions are from those of a reference, as a rule the dense model.

Perplexity looks at the probability of one token per position, and pruning can raise some of these
while it lowers others. The Kullback-Leibler divergence compares all probabilities. With p of the
reference and q of the model, it is at every position

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)   in nats, never below 0, and 0 only if p = q.

Positions within a window share their context, so they are no independent samples. Standard errors
are therefore taken over the means of windows: sd(means) / √W.

The ratio of two perplexities is exp(d) with d the mean difference of the losses. The difference is
taken window by window, because both models find the same windows hard. By the delta method
the standard error of exp(d) is exp(d) · se(d).

Legend: W windows, S tokens per window, T rows of logits, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunus.distributed import Ranks
from prunus.evaluation.loss import Rows, WindowModel, WindowProgress, check_loss, chunks, rows_loss

__all__ = ["Divergence", "compare_windows", "exponential", "make_divergence", "token_divergences"]

#: Rows of logits that are compared at the same time. A row takes some six rows in float32.
_PIECE = 32


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of a reference, on the same tokens.

    Standard errors are over windows; they are None for a single window.

    Attributes:
        reference: name of the reference.
        kl: mean of KL(reference ‖ model), in nats per token.
        kl_stderr: its standard error.
        kl_q999: the 99.9 % quantile of the KL divergences of all tokens.
        same_top: share of tokens for which both models find the same next token most likely.
        same_top_stderr: its standard error.
        reference_perplexity: perplexity of the reference.
        perplexity_ratio: perplexity of the model, divided by that of the reference.
        perplexity_ratio_stderr: its standard error, from losses paired by window.
    """

    reference: str
    kl: float
    kl_stderr: float | None
    kl_q999: float
    same_top: float
    same_top_stderr: float | None
    reference_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_stderr: float | None


def token_divergences(
    reference_TV: torch.Tensor, model_TV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare two models' logits row by row.

    With logits x and y whose largest is 0, and Z the sums of their exponentials,

        KL = Σ_v exp(x_v) (x_v − y_v) / Z_x + log Z_y − log Z_x.

    Exponentials are taken in float32, and all sums over the vocabulary in float64. A sum of 50,000
    probabilities in float32, as in `torch.log_softmax`, would be wrong by about 1e-5. Rounding may
    still put a value a little below 0. It is kept, because setting it to 0 would bias the mean.

    >>> even, odds = torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log()
    >>> kl, same = token_divergences(odds, even)
    >>> round(kl.item(), 4)  # 0.75 log 1.5 + 0.25 log 0.5
    0.1308

    Args:
        reference_TV: logits of the reference, any floating dtype.
        model_TV: logits of the model for the same tokens.

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


def compare_windows(
    model: WindowModel,
    reference: WindowModel,
    ids: torch.Tensor,
    batch: int,
    start: int,
    progress: WindowProgress | None,
    ranks: Ranks,
) -> tuple[list[float], dict[str, Any]]:
    """Take all windows through both models and compare their logits, a few rows at a time.

    Args:
        model: the model to score.
        reference: the model to compare with. If it runs block by block, it runs all of them first.
        ids: token ids (W, S), int64, of all ranks.
        batch: number of windows in one forward pass.
        start: the first row of a window that is scored.
        progress: called with the number of windows done, and the number of all windows. A window
            counts half when one of the models is done with it.
        ranks: processes that split the windows.

    Returns:
        The model's loss of every window in nats per token, and figures for `make_divergence`.

    Raises:
        ValueError: outputs are not finite, or the vocabularies differ.
    """
    own = ranks.own_range(len(ids), batch)
    own_ids = ids[own.start : own.stop]
    rows_per_window = ids.shape[1] - 1 - start
    kl_WT = torch.empty(len(own_ids), rows_per_window, dtype=torch.float64)
    same_WT = torch.empty(len(own_ids), rows_per_window, dtype=torch.float64)
    losses_W2 = torch.empty(len(own_ids), 2, dtype=torch.float64)
    halves = _halves(progress)
    with (
        contextlib.closing(reference.windows(own_ids, batch, halves[0], compared=True)) as before,
        contextlib.closing(model.windows(own_ids, batch, halves[1], compared=True)) as after,
    ):
        for window, pair in enumerate(zip(before, after, own_ids, strict=True)):
            losses, kl_T, same_T = _compare_window(*pair, window, start)
            losses_W2[window] = torch.tensor(losses, dtype=torch.float64)
            kl_WT[window], same_WT[window] = kl_T, same_T
    losses_W2, kl_WT, same_WT = (ranks.all_gather(x) for x in (losses_W2, kl_WT, same_WT))
    return losses_W2[:, 1].tolist(), _summary(losses_W2, kl_WT, same_WT)


def _halves(progress: WindowProgress | None) -> list[WindowProgress | None]:
    """Two functions for the progress of two models, each of which counts half of the windows."""
    if progress is None:
        return [None, None]
    done = [0, 0]

    def make(position: int) -> WindowProgress:
        def report(windows: int, of: int) -> None:
            done[position] = windows
            progress(sum(done) // 2, of)

        return report

    return [make(0), make(1)]


def _compare_window(
    reference: Rows, model: Rows, ids_S: torch.Tensor, window: int, start: int
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Mean losses (reference, model), KL divergences (T,) and agreements (T,) of one window."""
    totals = [0.0, 0.0]
    divergences, agreements = [], []
    for first, stop in chunks(start, len(ids_S)):
        model_TV = model(first, stop)
        reference_TV = reference(first, stop).to(model_TV.device)
        if reference_TV.shape != model_TV.shape:
            raise ValueError(
                f"the reference gives logits for {reference_TV.shape[1]} tokens, the model for "
                f"{model_TV.shape[1]}: give a reference with the same vocabulary"
            )
        for position, logits_TV in enumerate((reference_TV, model_TV)):
            totals[position] += rows_loss(logits_TV, ids_S[first + 1 : stop + 1])
        for pieces in zip(reference_TV.split(_PIECE), model_TV.split(_PIECE), strict=True):
            kl_T, same_T = token_divergences(*pieces)
            divergences.append(kl_T.cpu())
            agreements.append(same_T.cpu())
    for total in totals:
        check_loss(total, window)
    kl_T = torch.cat(divergences)
    if not kl_T.isfinite().all():
        raise ValueError(
            f"the KL divergence of window {window} is not finite: the model gives probability 0 to "
            "a token that the reference can predict"
        )
    rows = len(ids_S) - 1 - start
    return [total / rows for total in totals], kl_T, torch.cat(agreements)


def _summary(
    losses_W2: torch.Tensor, kl_WT: torch.Tensor, same_WT: torch.Tensor
) -> dict[str, float | None]:
    """Means, standard errors and the quantile. All are finite, so a cache can hold them."""
    kl, kl_stderr = _over_windows(kl_WT.mean(dim=1).tolist())
    same, same_stderr = _over_windows(same_WT.mean(dim=1).tolist())
    before, _ = _over_windows(losses_W2[:, 0].tolist())
    change, change_stderr = _over_windows((losses_W2[:, 1] - losses_W2[:, 0]).tolist())
    return {
        "kl": kl,
        "kl_stderr": kl_stderr,
        "kl_q999": _quantile(kl_WT.flatten(), 0.999),
        "same_top": same,
        "same_top_stderr": same_stderr,
        "reference_loss": before,
        "loss_change": change,
        "loss_change_stderr": change_stderr,
    }


def _over_windows(means: Sequence[float]) -> tuple[float, float | None]:
    """The mean over windows, and its standard error sd / √W; None for a single window."""
    mean = statistics.fmean(means)
    if len(means) < 2:
        return mean, None
    return mean, statistics.stdev(means, mean) / math.sqrt(len(means))


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


def make_divergence(reference: str, figures: dict[str, Any]) -> Divergence:
    """The result for figures that `compare_windows` returned."""
    ratio = exponential(figures["loss_change"])
    error = figures["loss_change_stderr"]
    return Divergence(
        reference,
        **{name: figures[name] for name in ("kl", "kl_stderr", "kl_q999")},
        **{name: figures[name] for name in ("same_top", "same_top_stderr")},
        reference_perplexity=exponential(figures["reference_loss"]),
        perplexity_ratio=ratio,
        perplexity_ratio_stderr=None if error is None else ratio * error,
    )


def exponential(loss: float) -> float:
    """exp(loss), or infinity: exp(709.8) is the largest that a float64 holds."""
    return math.exp(loss) if loss < 700 else math.inf
