"""The loss of a training on next tokens: KL divergence from a teacher, cross entropy, or both.

Legend: W windows, S tokens per window, R rows at a time, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunus.methods.divergence import kl_sum, log_probabilities

# Rows of logits that are in float32 at a time. On a CPU they should stay in the cache.
_ROWS = 64
# The same on a CUDA device, where few large kernels are faster than many small ones.
_CUDA_ROWS = 4096

# With p the teacher's and q the model's distribution of the next token, y the token that follows,
# and w the weight of the teacher (Hinton et al., arXiv 1503.02531, at temperature 1):
#
#     w · Σ_v p_v (log p_v − log q_v)  −  (1 − w) · log q_y
#
# Loss and gradient, (q − w·p − (1−w)·[v = y]) / tokens, are computed together in float32, a few
# rows at a time. The usual way, whole matrices of log-probabilities that wait for the backward
# pass, takes more memory than a small model and more time to move than to compute. For the same
# reason the logits are not cut and copied. The last position of a window predicts nothing; it gets
# a gradient of zeros.


def next_token_loss(
    logits_WSV: Tensor, ids_WS: Tensor, teacher_WSV: Tensor | None = None, weight: float = 1.0
) -> Tensor:
    """The mean loss of predicting tokens 2..S of every window, a float32 scalar.

    Args:
        logits_WSV: The model's logits, in any floating dtype. The loss is differentiable in them,
            and their gradient has the same dtype.
        ids_WS: Token ids, int64.
        teacher_WSV: The teacher's logits on the same windows; None for cross entropy alone.
        weight: The weight of the KL divergence, from 0 to 1. Without a teacher it counts as 0.

    Equal logits for four tokens are a cross entropy of log 4.

    >>> logits, ids = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
    >>> round(float(next_token_loss(logits, ids)), 4)
    1.3863
    >>> float(next_token_loss(logits, ids, teacher_WSV=logits))
    0.0
    """
    targets_WS = ids_WS[:, 1:].to(logits_WSV.device)
    loss: Tensor = _Loss.apply(
        logits_WSV, targets_WS, teacher_WSV, weight if teacher_WSV is not None else 0.0
    )
    return loss


class _Loss(torch.autograd.Function):
    """The formula above, with its gradient in the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_WSV: Tensor, targets_WS: Tensor, teacher_WSV: Tensor | None, weight: float
    ) -> Tensor:
        rows = _ROWS if logits_WSV.device.type == "cpu" else _CUDA_ROWS
        windows, predicted = targets_WS.shape
        gradient_WSV = torch.empty_like(logits_WSV) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits_WSV.device)
        for window in range(windows):
            for first in range(0, predicted, rows):
                part = window, slice(first, min(first + rows, predicted))
                logq_RV = log_probabilities(logits_WSV[part])
                targets_R1 = targets_WS[part][:, None]
                if weight < 1:
                    total -= (1 - weight) * logq_RV.gather(1, targets_R1).sum(dtype=torch.float64)
                p_RV = None
                if teacher_WSV is not None:
                    logp_RV = log_probabilities(teacher_WSV[part])
                    p_RV = logp_RV.exp()
                    total += weight * kl_sum(p_RV, logp_RV.sub_(logq_RV), by_term=True)
                if gradient_WSV is not None:
                    # q − w·p − (1−w)·[v = y], in place of log q.
                    change_RV = logq_RV.exp_()
                    if p_RV is not None:
                        change_RV.sub_(p_RV, alpha=weight)
                    if weight < 1:
                        ones_R1 = torch.ones_like(targets_R1, dtype=torch.float32)
                        change_RV.scatter_add_(1, targets_R1, (weight - 1) * ones_R1)
                    gradient_WSV[part] = change_RV.div_(windows * predicted)
            if gradient_WSV is not None:
                gradient_WSV[window, predicted] = 0
        if gradient_WSV is not None:
            ctx.save_for_backward(gradient_WSV)
        return (total / (windows * predicted)).float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_WSV,) = ctx.saved_tensors
        # Usually a step has one part and the factor is 1; then a pass over all logits is saved.
        if float(outer[0]) != 1:
            gradient_WSV = gradient_WSV * outer[0].to(gradient_WSV.dtype)
        return gradient_WSV, None, None, None
