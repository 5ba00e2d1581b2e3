"""What `prunus eval --reference` measures: each metric is one entry of `METRICS`. Imports no torch.

An entry says how a metric is computed, what it is called and how it is shown. Its figures are
fields of `eval_records.Divergence`, so a new metric is an entry here and a field there.

Perplexity looks at the probability of one token per position, and pruning can raise some of these
while it lowers others. The Kullback-Leibler divergence compares all probabilities; see
`methods/divergence.py`.

Positions within a window share their context, so they are no independent samples. Standard errors
are therefore taken over the means of windows: sd(means) / √W.

The ratio of two perplexities is exp(d) with d the mean difference of the losses. The difference is
taken window by window, because both models find the same windows hard. By the delta method
the standard error of exp(d) is exp(d) · se(d).

Legend: W windows, T scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prunus.document import Measured
from prunus.methods.divergence import kl_divergence

if TYPE_CHECKING:
    from torch import Tensor

#: A function of the logits (T, V) of the reference and of the model, in any floating dtype, which
#: returns a number for every token (T,).
TokenMeasure = Callable[["Tensor", "Tensor"], "Tensor"]
#: A function of the values of all tokens, float64 (W, T), which returns one figure: `Measured` with
#: a standard error, which is None for a single window, or a number that has none.
Summary = Callable[["Tensor"], "Measured | float"]


@dataclass(frozen=True)
class TextMetric:
    """How the predictions of a model differ from those of a reference, in one figure per text."""

    #: The field of `Divergence` and of the JSON file.
    name: str
    #: Its heading in tables.
    title: str
    #: What one of its figures counts, in words.
    unit: str
    #: The Python format of its figures.
    form: str
    #: What is measured at every token; None for the change of the mean loss of every window.
    measure: TokenMeasure | None
    #: How these numbers become one figure. Those of the loss are (W, 1).
    summary: Summary
    #: Whether tables of quality leave it to the table of single tokens.
    of_tokens: bool = False


def same_top(reference_TV: Tensor, model_TV: Tensor) -> Tensor:
    """Whether two models find the same next token most likely, for every row of logits, bool (T,).

    >>> import torch
    >>> same_top(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0, 3.0], [2.0, 3.0]]))
    tensor([ True, False])
    """
    return reference_TV.float().argmax(dim=-1) == model_TV.float().argmax(dim=-1)


def mean(values_WT: Tensor) -> Measured:
    """The mean over windows of their means, and its standard error sd / √W.

    >>> import torch
    >>> mean(torch.tensor([[0.0, 2.0], [3.0, 3.0]]))
    Measured(value=2.0, stderr=1.0, form=None)
    """
    means = values_WT.mean(dim=1).tolist()
    centre = statistics.fmean(means)
    several = len(means) > 1
    error = statistics.stdev(means, centre) / math.sqrt(len(means)) if several else None
    return Measured(centre, error)


def quantile(share: float, values_WT: Tensor) -> float:
    """A quantile of all tokens with linear interpolation, as in numpy. It has no standard error.

    `torch.quantile` takes at most 2^24 values.

    >>> import torch
    >>> quantile(0.75, torch.tensor([[4.0, 1.0, 2.0]]))
    3.0
    """
    ordered = values_WT.flatten().sort().values
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below].item(), ordered[above].item()
    return low + (position - below) * (high - low)


def ratio(change_W1: Tensor) -> Measured:
    """exp(mean change of the loss), the ratio of two perplexities, and its standard error."""
    change = mean(change_W1)
    factor = exponential(change.value)
    return Measured(factor, None if change.stderr is None else factor * change.stderr)


def exponential(loss: float) -> float:
    """exp(loss), or infinity: exp(709.8) is the largest that a float64 holds."""
    return math.exp(loss) if loss < 700 else math.inf


#: All metrics, in the order of the columns of tables.
METRICS = (
    TextMetric("kl", "KL divergence", "nats per token", ",.5f", kl_divergence, mean),
    TextMetric(
        "kl_median", "KL median", "nats", ",.5f", kl_divergence, partial(quantile, 0.5), True
    ),
    TextMetric(
        "kl_q99", "KL 99 % quantile", "nats", ",.3f", kl_divergence, partial(quantile, 0.99), True
    ),
    TextMetric(
        "kl_q999", "KL 99.9 % quantile", "nats", ",.3f", kl_divergence, partial(quantile, 0.999)
    ),
    TextMetric("kl_max", "largest KL", "nats", ",.3f", kl_divergence, partial(quantile, 1.0), True),
    TextMetric("same_top", "same top token", "share of tokens", ".2%", same_top, mean),
    TextMetric("perplexity_ratio", "perplexity ratio", "times the reference's", ".4f", None, ratio),
)
