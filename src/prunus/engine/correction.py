"""The linear that writes a block's output, corrected in closed form for all that the pruned model is off by so far.

What a block gives is wrong by R = Y − Ŷ: by what pruning this block did, and by what came in wrong from the blocks
before. A linear whose outputs are added to the block's (down in an MLP; the attention's output too where both stand in
parallel) can take some of it back: with its inputs X̂ and the mask as it is,

    minimise over Δ on the support   Σ_t (‖R_t − Δx̂_t‖² / ‖Y_t‖²) + λ‖ΔD‖²

which is a least squares problem for all rows at once, as in `lsq.py`, with weighted tokens. How much of Δ is taken,
between none and all, is what does best on windows held out: their error is a parabola in it.

Shape suffixes: T tokens, O outputs (rows), I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.methods.lsq import conjugate_gradients, ridge
from prunus.model.linears import Linear
from prunus.products import coarse_product

__all__ = ["adds_to_output", "corrected"]

_STEPS = 20
# Of the size of a block's output: large against rounding, small against anything that bends.
_NUDGE, _MOST_OFF = 0.5, 0.02


class _Moments:
    """Weighted Σ x̂x̂ᵀ and Σ r x̂ᵀ over tokens."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.gram_II = torch.zeros(columns, columns, device=device)
        self.cross_OI = torch.zeros(rows, columns, device=device)
        self.tokens = 0

    def add(self, X_TI: Tensor, output_TO: Tensor, target_TO: Tensor) -> None:
        target_TO = target_TO.float()
        size_T = target_TO.square().sum(dim=1)
        weight_T1 = torch.where(size_T > 0, size_T.rsqrt(), 0)[:, None]
        X_TI = X_TI.float() * weight_T1
        self.gram_II += coarse_product(X_TI.T, X_TI)
        wrong_TO = (target_TO - output_TO.float()) * weight_T1
        self.cross_OI += coarse_product(wrong_TO.T, X_TI)
        self.tokens += int((size_T > 0).sum())


def adds_to_output(linear: Linear, run: Callable[[], Tensor]) -> bool:
    """Whether what `linear` gives is added to what the block gives, and changes nothing else of it."""
    nudge: list[Tensor] = []

    def push(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(output.shape, generator=generator).to(output)
        nudge.append(noise * (_NUDGE * output.float().norm() / noise.float().norm()).to(output.dtype))
        return output + nudge[-1]

    plain = run().float()
    handle = linear.module.register_forward_hook(push)
    try:
        pushed = run().float()
    finally:
        handle.remove()
    if len(nudge) != 1 or nudge[0].numel() != plain.numel():
        return False
    added = nudge[0].float().view(plain.shape)  # some models flatten windows and tokens before their MLP
    return float((pushed - plain - added).norm()) <= _MOST_OFF * float(added.norm())


def corrected(
    linear: Linear,
    keep_OI: Tensor,
    forward: Callable[[int], Tensor],
    target: Callable[[int], Tensor],
    train: Sequence[int],
    held_out: Sequence[int],
) -> tuple[Tensor, float]:
    """The weight (O, I), float32, with as much of the correction as does best on the batches held out.

    Args:
        linear: with its pruned weight in place.
        keep_OI: bool, where weights may be other than 0.
        forward, target, train, held_out: as of `match_block`.

    Returns:
        The weight; the share of the correction in it, 0 to 1.
    """
    rows, columns = linear.shape
    device = linear.weight_OI.device
    seen: list[Tensor] = []
    handle = linear.module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    moments = [_Moments(rows, columns, device), _Moments(rows, columns, device)]
    try:
        for which, batches in zip(moments, (train, held_out), strict=True):
            for batch in batches:
                output, wanted = forward(batch), target(batch)
                X_TI = seen.pop().reshape(-1, columns)
                which.add(X_TI, output.reshape(-1, rows), wanted.reshape(-1, rows))
    finally:
        handle.remove()
    learnt, judged = moments
    change_OI = _fitted(learnt, keep_OI)
    gain = float((judged.cross_OI * change_OI).sum(dtype=torch.float64))
    size = float(((change_OI @ judged.gram_II) * change_OI).sum(dtype=torch.float64))
    weight_OI = linear.weight_OI.float() * keep_OI
    # Whatever is not finite ends here: training will say so.
    share = min(1.0, max(0.0, gain / size)) if math.isfinite(gain) and 0 < size < math.inf else 0.0
    return (weight_OI.add_(change_OI, alpha=share) if share else weight_OI), share


def _fitted(moments: _Moments, keep_OI: Tensor) -> Tensor:
    """Δ: weighted least squares on the support."""
    scale_I = moments.gram_II.diagonal().sqrt()
    scale_I = scale_I.masked_fill(scale_I == 0, 1)
    gram_II = (moments.gram_II / scale_I[:, None]).div_(scale_I)
    gram_II.diagonal().fill_(1 + ridge(len(scale_I), moments.tokens))
    lower_II, failed = torch.linalg.cholesky_ex(gram_II)
    if int(failed):
        return torch.zeros_like(moments.cross_OI)
    wanted_OI = torch.cholesky_solve((moments.cross_OI / scale_I).T, lower_II).T.contiguous()
    change_OI, _ = conjugate_gradients(torch.zeros_like(wanted_OI), wanted_OI, keep_OI, gram_II, _STEPS)
    return change_OI.div_(scale_I)
