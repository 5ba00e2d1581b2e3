"""The Kullback-Leibler divergence of one model's next-token distributions from another's.

With p of the reference and q of the model, it is at every position

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)   in nats, never below 0, and 0 only if p = q.

All code that measures or lowers it calls a function of this file. They differ on purpose in what
they sum in which precision:

- `kl_divergence` measures, one number for every position. All sums over the vocabulary are in
  float64, because figures of 1e-5 are compared.
- `kl_sum` is for whole sums. Reconstruction of the last block and the search for blocks to remove
  add up a position in float32, as one dot product that needs no third matrix of logits, and
  positions in float64. Training (`recover`) takes few rows at a time, so that a third matrix is
  small, and adds every term in float64 (`by_term`).

The two ways agree but for rounding. Neither takes the place of the other, because results are
compared to the last bit.

torch is imported when a function is called: the table of metrics is read without it.

Shape suffixes: T positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def log_probabilities(logits_TV: Tensor) -> Tensor:
    """The log probabilities of logits (…, V) in any floating dtype, float32 (…, V)."""
    return logits_TV.float().log_softmax(dim=-1)


def kl_divergence(reference_TV: Tensor, model_TV: Tensor) -> Tensor:
    """KL(reference ‖ model) in nats for every row of two models' logits (T, V), float64 (T,).

    With logits x and y whose largest is 0, and Z the sums of their exponentials,

        KL = Σ_v exp(x_v) (x_v − y_v) / Z_x + log Z_y − log Z_x.

    Exponentials are taken in float32, and all sums over the vocabulary in float64. A sum of 50,000
    probabilities in float32, as in `torch.log_softmax`, would be wrong by about 1e-5. Rounding may
    still put a value a little below 0. It is kept, because setting it to 0 would bias the mean.

    >>> import torch
    >>> even, odds = torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log()
    >>> round(kl_divergence(odds, even).item(), 4)  # 0.75 log 1.5 + 0.25 log 0.5
    0.1308
    """
    import torch

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
    return mean_T + sum_q_T.log() - sum_p_T.log()


def kl_sum(p_TV: Tensor, change_TV: Tensor, by_term: bool = False) -> Tensor:
    """The sum over all positions of Σ_v p_v (log p_v − log q_v), a float64 scalar.

    Args:
        p_TV: The probabilities of the reference, float32 (…, V).
        change_TV: log p − log q, of the same shape; see `log_probabilities`.
        by_term: Add every term in float64, not only the sums of positions.

    >>> import torch
    >>> half, other = (log_probabilities(torch.tensor([[0.0, x]])) for x in (0.0, 2.0))
    >>> round(kl_sum(half.exp(), half - other).item(), 4)
    0.4338
    """
    import torch

    parts = p_TV * change_TV if by_term else torch.linalg.vecdot(p_TV, change_TV)
    return parts.sum(dtype=torch.float64)
