"""What training minimises: cross entropy with the text, divergence from a teacher, or a mix of both.

With p the teacher's and q the model's distribution of the next token, y the token that comes, and w the weight:

    w · Σ_v p_v (log p_v − log q_v)  −  (1 − w) · log q_y      (Hinton et al., arXiv 1503.02531, at temperature 1)

Loss and gradient, (q − w·p − (1−w)·[v = y]) / tokens, are computed together, a few rows at a time, in float32:
whole matrices of probabilities over a vocabulary would take more memory than the model, and more time to move.

Legend: W windows, S tokens per window, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["next_token_loss"]

_ROWS = 64  # rows of logits that are in float32 at a time: they should stay in a CPU's cache
_CUDA_ROWS = 4096


def next_token_loss(
    logits_WSV: Tensor, ids_WS: Tensor, teacher_WSV: Tensor | None = None, weight: float = 1.0
) -> Tensor:
    """Mean loss of predicting tokens 2..S of every window, a float32 scalar; differentiable in the logits.

    Args:
        logits_WSV: the model's, any floating dtype; the gradient has the same.
        ids_WS: int64.
        teacher_WSV: the teacher's logits on the same windows, or None for cross entropy alone.
        weight: of the divergence, in [0, 1]; without a teacher it is 0.
    """
    vocabulary = logits_WSV.shape[-1]
    logits_NV = logits_WSV[:, :-1].reshape(-1, vocabulary)
    targets_N = ids_WS[:, 1:].reshape(-1).to(logits_NV.device)
    teacher_NV = None if teacher_WSV is None else teacher_WSV[:, :-1].reshape(-1, vocabulary)
    loss: Tensor = _Loss.apply(logits_NV, targets_N, teacher_NV, weight if teacher_NV is not None else 0.0)
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, teacher_NV: Tensor | None, weight: float
    ) -> Tensor:
        count = len(logits_NV)
        rows = _ROWS if logits_NV.device.type == "cpu" else _CUDA_ROWS
        wanted = ctx.needs_input_grad[0]
        gradient_NV = torch.empty_like(logits_NV) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=logits_NV.device)
        for first in range(0, count, rows):
            part = slice(first, first + rows)
            logq_NV = logits_NV[part].float().log_softmax(dim=-1)
            targets_N1 = targets_N[part, None]
            total -= (1 - weight) * logq_NV.gather(1, targets_N1).sum(dtype=torch.float64)
            p_NV = None
            if teacher_NV is not None:
                logp_NV = teacher_NV[part].float().log_softmax(dim=-1)
                p_NV = logp_NV.exp()
                total += weight * (p_NV * (logp_NV - logq_NV)).sum(dtype=torch.float64)
            if gradient_NV is not None:
                change_NV = logq_NV.exp_()
                if p_NV is not None:
                    change_NV.sub_(p_NV, alpha=weight)
                ones_N1 = torch.ones_like(targets_N1, dtype=torch.float32)
                change_NV.scatter_add_(1, targets_N1, (weight - 1) * ones_N1)
                gradient_NV[part] = change_NV.div_(count)
        if gradient_NV is not None:
            ctx.save_for_backward(gradient_NV)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * outer[0].to(gradient_NV.dtype), None, None, None
