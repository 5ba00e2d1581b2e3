"""How far apart two hidden states behind the last block are: by what the head makes of them.

Σ_t Σ_v p_tv (log p_tv − log q_tv), p the distribution of the next token by the target and q by the output. For block
matching: a few tokens at a time, whose gradient is computed along with the sum, because logits of a whole window
take more memory than the block. They also take ten times as long as the block itself, so that not all tokens are
looked at: others each time for a gradient, always the same ones where none is wanted. Ranks that have the same
hidden states share these pieces out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunus.distributed import SINGLE_PROCESS, Ranks, split_range

__all__ = ["LOGIT_STRIDE", "TOKENS", "OutputLoss", "kl_divergence"]

#: (output, target) -> what is lost, and what it is a share of; the first is differentiable in the output.
OutputLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: Tokens whose logits are in memory at a time.
TOKENS = 128
#: Tokens of which one counts where none other is asked for, and where no gradient is wanted.
LOGIT_STRIDE = 4


def kl_divergence(
    logits: Callable[[Tensor], Tensor], ranks: Ranks = SINGLE_PROCESS, stride: int = LOGIT_STRIDE
) -> OutputLoss:
    """The divergence of one batch's output from its target, summed over the tokens that count, and their number.

    Of more than `TOKENS` every fourth counts, from the first on; for gradients one of `stride`, beginning one later with
    every call.

    Args:
        logits: hidden states (windows, tokens, hidden) behind the last block -> logits, differentiable; what of a
            sequence it is given makes no difference.
        ranks: who compares the same two at the same time.
        one_in: 1 where whoever calls for a gradient has chosen the tokens.
    """
    gradients = itertools.count()

    def compare(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if output.shape[1] > TOKENS:
            wanted = output.requires_grad and torch.is_grad_enabled()
            some = (
                slice(next(gradients) % stride, None, stride)
                if wanted
                else slice(None, None, LOGIT_STRIDE)
            )
            output, target = output[:, some], target[:, some]
        lost: Tensor = _KLDivergence.apply(output, target, logits, ranks)
        return lost, torch.tensor(float(output.shape[:-1].numel()), device=output.device)

    return compare


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, target: Tensor, logits: Callable[[Tensor], Tensor], ranks: Ranks
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(output) if wanted else None
        tokens = output.shape[1]
        lost_P = torch.zeros(-(-tokens // TOKENS), dtype=torch.float64, device=output.device)
        parts = split_range(tokens, ranks.size, TOKENS)
        mine = parts[ranks.rank]
        for first in mine[::TOKENS]:
            part = slice(None), slice(first, first + TOKENS)
            with torch.no_grad():
                logp = logits(target[part]).float().log_softmax(dim=-1)
            x = output[part].detach()
            with torch.set_grad_enabled(wanted):
                found = logits(x.requires_grad_(wanted))
            logq = found.detach().float().log_softmax(dim=-1)
            p = logp.exp()
            lost_P[first // TOKENS] = torch.linalg.vecdot(p, logp.sub_(logq)).sum(
                dtype=torch.float64
            )
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(
                    found, x, logq.exp_().sub_(p).to(found.dtype)
                )
        ranks.all_reduce(lost_P)  # each piece is one rank's, and zero with the others
        if gradient is not None:
            of_mine = gradient[:, mine.start : mine.stop].movedim(1, 0)
            gradient = ranks.all_gather(of_mine, [len(part) for part in parts]).movedim(0, 1)
            ctx.save_for_backward(gradient)
        return sum(lost_P, torch.zeros_like(lost_P[0])).float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None
