"""How far outputs of a block are from their targets: relative error, or KL divergence of logits.

The KL divergence Σ_t Σ_v p_tv (log p_tv − log q_tv) compares the next-token distributions that the
head computes: p from the target (the dense model) and q from the output (the pruned model). Block
reconstruction uses it for the last block only. Logits are expensive in two ways, and the code
has an answer to each:

- *Memory*: the logits of one window can take more memory than the block. So they are computed for
  `CHUNK_TOKENS` tokens at a time, and the gradient of each chunk is computed together with its sum.
- *Time*: they take about ten times as long as the block itself. So only some tokens are compared:
  other ones in each call that needs a gradient, always the same ones for validation.

Several ranks that hold the same hidden states split the chunks among themselves.

`relative_error`, at the end of the file, is the loss of all other blocks. `OutputLoss` describes
what both have in common.

Legend: W windows, T tokens per window, H hidden size, P chunks of tokens.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prunus.distributed import SINGLE_PROCESS, Ranks, ranks, split_range
from prunus.engine.block_memory import CHUNK_TOKENS
from prunus.methods.divergence import kl_sum, log_probabilities
from prunus.model.stream import Stream

#: One token in this many is compared during validation, and for gradients by default.
LOGIT_STRIDE = 4


@contextlib.contextmanager
def logits_of(stream: Stream) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the function from hidden states after the last block to logits.

    It maps (windows, tokens, hidden) to (windows, tokens, vocabulary). The final norm and the head
    are in memory while the context is active.
    """
    skeleton = stream.skeleton

    def logits(hidden: Tensor) -> Tensor:
        # The head needs no token ids, only their shape.
        ids = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        return skeleton.logits(ids, hidden.to(skeleton.dtype))

    with skeleton.outside_blocks(stream.source.read_outside, stream.device, with_head=True):
        yield logits


def divergence_loss(
    logits: Callable[[Tensor], Tensor], splits_tokens: bool = False, stride: int = LOGIT_STRIDE
) -> OutputLoss:
    """Return a loss: the KL divergence summed over the compared tokens, and their number.

    Windows of up to `CHUNK_TOKENS` tokens are compared in full. In longer ones, a call without
    gradient compares every `LOGIT_STRIDE`-th token from the first on, so that validation errors are
    comparable. A call with gradient compares one token in `stride` and starts one token later than
    the call before, so that training sees all tokens in turn.

    Args:
        logits: From hidden states (windows, tokens, hidden) after the last block to logits. It must
            be differentiable and treat every token independently.
        splits_tokens: The ranks call the loss with the same two tensors at the same time. They
            split the tokens, and all get the same sum and the whole gradient.
        stride: Compare one token in this many for a gradient; 1 if the caller has chosen the tokens
            already.

    >>> x = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    >>> loss = divergence_loss(lambda hidden: hidden)
    >>> [float(value) for value in loss(x, x)]
    [0.0, 2.0]
    >>> bool(loss(x.flip(-1), x)[0] > 0)
    True
    """
    gradient_calls = itertools.count()
    everyone = ranks() if splits_tokens else SINGLE_PROCESS

    def loss(output_WTH: Tensor, target_WTH: Tensor) -> tuple[Tensor, Tensor]:
        if output_WTH.shape[1] > CHUNK_TOKENS:
            with_gradient = output_WTH.requires_grad and torch.is_grad_enabled()
            compared = (
                slice(next(gradient_calls) % stride, None, stride)
                if with_gradient
                else slice(None, None, LOGIT_STRIDE)
            )
            output_WTH, target_WTH = output_WTH[:, compared], target_WTH[:, compared]
        total: Tensor = _KLDivergence.apply(output_WTH, target_WTH, logits, everyone)
        tokens = float(output_WTH.shape[:-1].numel())
        return total, torch.tensor(tokens, device=output_WTH.device)

    return loss


class _KLDivergence(torch.autograd.Function):
    """The sum over all tokens, chunk by chunk; the forward pass computes the gradient as well.

    The usual order, all chunks forward and then all backward, would keep the logits of every chunk.
    With q = softmax(logits), the gradient with respect to the logits is q − p.

    The arguments are those of `divergence_loss` and of the loss that it returns. The result is a
    float32 scalar; the sums of the chunks add up in float64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output_WTH: Tensor,
        target_WTH: Tensor,
        logits: Callable[[Tensor], Tensor],
        everyone: Ranks,
    ) -> Tensor:
        with_gradient = ctx.needs_input_grad[0]
        gradient_WTH = torch.empty_like(output_WTH) if with_gradient else None
        tokens, device = output_WTH.shape[1], output_WTH.device
        sums_P = torch.zeros(-(-tokens // CHUNK_TOKENS), dtype=torch.float64, device=device)
        parts = split_range(tokens, everyone.size, CHUNK_TOKENS)
        part = parts[everyone.rank]
        for first in part[::CHUNK_TOKENS]:
            chunk = slice(None), slice(first, first + CHUNK_TOKENS)
            # The target is fixed: no graph, and no gradient, is needed for it.
            with torch.no_grad():
                logp = log_probabilities(logits(target_WTH[chunk]))
            # A graph for this chunk alone. It ends at the hidden states, whose gradient stays.
            x = output_WTH[chunk].detach()
            with torch.set_grad_enabled(with_gradient):
                output_logits = logits(x.requires_grad_(with_gradient))
            logq = log_probabilities(output_logits.detach())
            p = logp.exp()
            # In place: logp becomes log p − log q, and below logq becomes q − p.
            sums_P[first // CHUNK_TOKENS] = kl_sum(p, logp.sub_(logq))
            if gradient_WTH is not None:
                (gradient_WTH[chunk],) = torch.autograd.grad(
                    output_logits, x, logq.exp_().sub_(p).to(output_logits.dtype)
                )
        # Each chunk belongs to one rank and is zero on the others, so this sum is exact.
        everyone.all_reduce(sums_P)
        if gradient_WTH is not None:
            part_TWH = gradient_WTH[:, part.start : part.stop].movedim(1, 0)
            gradient_WTH = everyone.all_gather(part_TWH, list(map(len, parts))).movedim(0, 1)
            ctx.save_for_backward(gradient_WTH)
        # Python's sum adds the chunks in order, whatever rank computed them.
        return sum(sums_P, torch.zeros_like(sums_P[0])).float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        # The forward pass has computed the gradient of the sum; only the outer factor is missing.
        (gradient_WTH,) = ctx.saved_tensors
        return gradient_WTH * outer[0].to(gradient_WTH.dtype), None, None, None


#: (output_WTH, target_WTH) -> (loss summed over tokens, what to divide that sum by), two scalars.
#: The first is differentiable in the output. They stay apart because several batches, and several
#: ranks, add up both before they divide.
OutputLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def relative_error(output_WTH: Tensor, target_WTH: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ_t ‖output_t − target_t‖² / ‖target_t‖² and the number of tokens, both float32.

    Tokens whose target is exactly zero do not count: no error is relative to zero. Both arguments
    can have any floating dtype.

    Why each token is measured against its own target: most language models have a few tokens with
    enormous hidden states. In a plain squared error these few would outweigh all others.

    A large and a small token that are both 10 % off count equally.

    >>> target = torch.tensor([[[1000.0, 0.0], [0.0, 1.0]]])
    >>> total, tokens = relative_error(1.1 * target, target)
    >>> round(float(total / tokens), 4)
    0.01
    """
    target_WTH = target_WTH.float()
    error_WT = (output_WTH.float() - target_WTH).square().sum(dim=-1)
    size_WT = target_WTH.square().sum(dim=-1)
    counts_WT = size_WT > 0
    return (error_WT[counts_WT] / size_WT[counts_WT]).sum(), counts_WT.float().sum()
