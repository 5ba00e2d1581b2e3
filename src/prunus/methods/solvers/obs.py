"""The optimal brain surgeon, column by column: prune a weight, and let those to its right make up for it.

What SparseGPT and the ablations share: the factor of the inverse Gram matrix and the sweep over the columns
(Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1). Which weights go is the caller's choice.

With U the upper Cholesky factor of (G + λI)⁻¹, to set w_j to 0 costs (w_j / U_jj)² of squared output error when
all later columns k answer with w_k -= U_jk · w_j / U_jj. A common factor of U cancels out everywhere.

Shape suffixes: O outputs (rows), I inputs (columns), B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunus.hardware.numerics import all_finite
from prunus.methods.base import EVERY_ROW, MethodOptions, Pruned, RowShard
from prunus.methods.patterns import Pattern, keep_above_threshold, keep_mask
from prunus.methods.solvers.obs_reference_order import sweep_in_reference_order
from prunus.methods.statistics import InputStatistics

#: λ as published, a fraction of the Gram's mean diagonal.
DAMPING = 0.01
# Columns that answer each other one at a time; those beyond wait for one matrix product.
_TILE = 16
# A pivot this small against its own diagonal entry, in units of the rounding error, is noise.
_NOISE = 10
_MOST_DAMPING = 1e4
_SMALL_TRIANGLE = 256

# From the weights of columns start…start+B as they stand (O, B), start, the diagonal of U there (B,), and which rows
# these are, to the mask (O, B), True for what stays.
Choose = Callable[[Tensor, int, Tensor, RowShard], Tensor]


def prune_by_obs(
    weight_OI: Tensor,
    statistics: InputStatistics,
    pattern: Pattern,
    options: MethodOptions,
    choose: Choose,
) -> Pruned:
    """Prune from left to right, each pruned weight's error spread over the columns to its right.

    Weights of inputs that were always 0 are set to 0 first; the mask is as `choose` says all the same.

    Args:
        choose: called for every M columns (N:M) or every `options.column_block`, once all to the left are pruned.

    Raises:
        ValueError: the Gram matrix cannot be inverted, see `inverse_factor`.
    """
    gram_II = statistics.gram_II
    assert gram_II is not None, "the update needs a Gram matrix"
    damping = DAMPING if options.damping is None else options.damping
    spans = _spans(pattern, options.column_block)
    if options.reference_order:
        swept = sweep_in_reference_order(
            weight_OI,
            gram_II,
            damping,
            spans,
            lambda w_OB, start, d_B: choose(w_OB, start, d_B, EVERY_ROW),
        )
        if swept is not None:
            return swept
    factor_II, notes = statistics.derived(
        ("inverse_factor", damping), lambda: inverse_factor(gram_II, damping)
    )
    dead_I = gram_II.diagonal() == 0

    def sweep(shard: RowShard) -> Pruned:
        swept_OI, keep_OI = _sweep(
            weight_OI[shard.rows],
            factor_II,
            dead_I,
            spans,
            lambda w_OB, start, d_B: choose(w_OB, start, d_B, shard),
        )
        return Pruned(swept_OI, keep_OI, dict(notes))

    return options.rows.solve(len(weight_OI), 1, sweep)


def _sweep(
    weight_OI: Tensor,
    factor_II: Tensor,
    dead_I: Tensor,
    spans: tuple[int, int],
    choose: Callable[[Tensor, int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The sweep itself, from weights (O, I) to weights and mask."""
    diagonal_I = factor_II.diagonal()
    span, block = spans
    # A choice needs its columns up to date: within a tile they always are, beyond it where a tile begins.
    tile = _TILE if span % _TILE == 0 else max(1, _TILE // span) * span

    # Transposed, a column is contiguous, and the updates are plain matrix products on contiguous memory.
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    weight_IO[dead_I] = 0
    keep_IO = torch.empty(weight_IO.shape, dtype=torch.bool, device=weight_IO.device)
    inputs = len(weight_IO)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        error_BO = torch.empty_like(weight_IO[start:stop])
        drop_BO = torch.empty_like(error_BO)
        for first in range(start, stop, tile):
            last = min(first + tile, stop)
            for j in range(first, last):
                if j % span == 0:
                    chosen = slice(j, min(j + span, stop))
                    keep_IO[chosen] = choose(weight_IO[chosen].T, j, diagonal_I[chosen]).T
                    torch.logical_not(keep_IO[chosen], out=drop_BO[j - start : chosen.stop - start])
                # w - w is 0 to the bit, and takes a fiftieth of the time of filling by a mask.
                removed_O = torch.mul(weight_IO[j], drop_BO[j - start], out=error_BO[j - start])
                weight_IO[j] -= removed_O
                error_O = removed_O.div_(diagonal_I[j])
                weight_IO[j + 1 : last].addr_(factor_II[j, j + 1 : last], error_O, alpha=-1)
            done_BO = error_BO[first - start : last - start]
            weight_IO[last:stop].addmm_(factor_II[first:last, last:stop].T, done_BO, alpha=-1)
        weight_IO[stop:].addmm_(factor_II[start:stop, stop:].T, error_BO, alpha=-1)
    return weight_IO.T.contiguous(), keep_IO.T.contiguous()


def block_keep(score_OB: Tensor, pattern: Pattern, sparsity: float, shard: RowShard) -> Tensor:
    """The mask within a block of columns, (O, B): one threshold for all its rows, unless rows or N:M compete."""
    if pattern.is_unstructured and pattern.group == "layer":
        return shard.keep_among_all_rows(
            score_OB, lambda all_OB: keep_above_threshold(all_OB, sparsity)
        )
    return keep_mask(score_OB, pattern, sparsity)


def inverse_factor(gram_II: Tensor, damping: float) -> tuple[Tensor, dict[str, Any]]:
    """U, float32 (I, I), the upper Cholesky factor of (G/d̄ + damping·I)⁻¹ with d̄ the mean of G's diagonal.

    Inputs that were always 0 count as uncorrelated with the others. Where the factorisation fails in float32 or
    loses all precision, float64 is tried, then ten times the damping, and so on.

    Returns:
        U, and notes: the damping used, and if it applies how often it was raised and that float64 was needed.

    Raises:
        ValueError: the Gram matrix is no Gram matrix (not finite, or far from positive semi-definite).
    """
    raised = 0
    while damping <= _MOST_DAMPING:
        for dtype in (torch.float32, torch.float64):
            factor_II = _inverse_factor_at(gram_II, damping, dtype)
            if factor_II is None:
                continue
            notes: dict[str, Any] = {"damping": damping}
            if raised:
                notes["damping_raised"] = raised
            if dtype == torch.float64:
                notes["factored_in"] = "float64"
            return factor_II, notes
        damping = damping * 10 if damping > 0 else 0.01
        raised += 1
    raise ValueError(
        "the Gram matrix of the inputs cannot be inverted however it is damped: is it finite?"
    )


def _inverse_factor_at(gram_II: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    # With P the reversal of the order, PAP = LLᵀ gives A⁻¹ = UᵀU with U = PL⁻¹P, upper triangular: one
    # factorisation and one triangular inverse; A⁻¹ itself, which may come out indefinite, is never formed.
    scaled_II = gram_II.flip(0, 1).to(dtype)
    diagonal_I = scaled_II.diagonal()
    dead_I = diagonal_I == 0
    if not bool(dead_I.all()):
        scaled_II.div_(diagonal_I.mean())
    diagonal_I.masked_fill_(dead_I, 1).add_(damping)
    lower_II, info = torch.linalg.cholesky_ex(scaled_II)
    pivot_I = lower_II.diagonal().square()
    if int(info) or not bool((pivot_I > _NOISE * torch.finfo(dtype).eps * diagonal_I).all()):
        return None
    del scaled_II, diagonal_I
    inverse_II = torch.zeros_like(lower_II)
    _invert_triangle(lower_II, inverse_II)
    factor_II = inverse_II.flip(0, 1).float()
    return factor_II if all_finite(factor_II) else None


def _invert_triangle(lower_II: Tensor, inverse_II: Tensor) -> None:
    """Fill `inverse_II`, zeros, with the inverse of a lower triangle.

    By halves: nearly all of it is matrix products, and less than half as long as a triangular solve for every column of
    the identity, most of which are zeros.
    """
    width = len(lower_II)
    if width <= _SMALL_TRIANGLE:
        eye_II = torch.eye(width, dtype=lower_II.dtype, device=lower_II.device)
        inverse_II.copy_(torch.linalg.solve_triangular(lower_II, eye_II, upper=False))
        return
    first, last = slice(width // 2), slice(width // 2, width)
    _invert_triangle(lower_II[first, first], inverse_II[first, first])
    _invert_triangle(lower_II[last, last], inverse_II[last, last])
    between_II = lower_II[last, first] @ inverse_II[first, first]
    inverse_II[last, first] = (inverse_II[last, last] @ between_II).neg_()


def _spans(pattern: Pattern, column_block: int) -> tuple[int, int]:
    """Columns chosen at once, and columns swept at once; no group of M straddles two blocks."""
    if pattern.m is None:
        return column_block, column_block
    return pattern.m, max(1, column_block // pattern.m) * pattern.m
