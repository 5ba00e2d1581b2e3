"""The OBS sweep: prune column by column, and let the columns to the right correct the error.

SparseGPT and the ablations share this sweep (Frantar and Alistarh 2023, arXiv 2301.00774,
algorithm 1). They differ only in which weights they remove.

The optimal brain surgeon sets a weight w_j to 0 and changes all other weights of its row so that
the output error grows least. That needs the inverse of the Gram matrix of all weights that may
still change. Here columns are pruned from left to right, and only columns to the right may change.
With U the upper Cholesky factor of (G + λI)⁻¹, so (G + λI)⁻¹ = UᵀU, removing w_j then costs

    (w_j / U_jj)²   of squared output error, when   w_k -= U_jk · w_j / U_jj   for all k > j.

Why a Cholesky factor: the inverse of every smaller problem, in which the columns to the left are
fixed, is contained in U. So one factorisation replaces an inverse per column. A common factor of U
cancels out everywhere, so U may belong to a scaled Gram matrix.

Why columns in blocks: a correction touches all columns to the right, which is slow one column at a
time. Within a small tile columns are corrected one by one. All corrections that leave the tile or
the block are applied at once, as one matrix product.

The order of this file: pruning one linear and its sweep, the sweep alone (`sweep_columns`), the
sweep of the original code, masks by blocks, and the factor U.

Shape suffixes: O outputs (rows), I inputs (columns), B columns of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from prunus.hardware.numerics import all_finite, row_spans
from prunus.methods.patterns import Pattern, keep_above_threshold, keep_mask
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import EVERY_ROW, Pruned, RowShard, Work

#: λ as published, a fraction of the mean diagonal of the Gram matrix.
DAMPING = 0.01
#: Columns that are corrected one at a time. Later columns wait for one matrix product.
TILE = 16
# A Cholesky pivot smaller than its own diagonal entry times this many rounding errors is noise.
_NOISE = 10
# Products with the Gram matrix that find its largest eigenvectors.
_SUBSPACE_STEPS = 4
# Beyond this damping the matrix is a multiple of the identity, and only NaN can make it fail.
_MAX_DAMPING = 1e4
# A triangle of at most this width is inverted directly.
_SMALL_TRIANGLE = 256

#: From the current weights (O, B) of some columns, the index of the first column, the diagonal of U
#: there (B,), and the shard, to the mask (O, B): True where a weight stays.
ChooseMask = Callable[[Tensor, int, Tensor, RowShard], Tensor]


def prune_by_obs(
    weight_OI: Tensor, statistics: InputStatistics, work: Work, choose: ChooseMask
) -> Pruned:
    """Prune from left to right, and spread each removed weight's error over the columns after it.

    Weights of inputs that are always 0 become 0 before the sweep. The mask does not depend on that.

    Args:
        weight_OI: float32, the trained weights.
        statistics: With a Gram matrix.
        work: Its `damping` is λ, a share of the mean diagonal; None means `DAMPING`.
        choose: Chooses the mask of the next columns, once all columns to their left are pruned: M
            columns for N:M, else the `block_size` of the pattern. For weights that stay zero it
            sees zeros, whatever the columns to their left have made of them.

    Returns:
        Mask and weights. The notes have what `inverse_factor` says of the damping.

    Raises:
        ValueError: The Gram matrix cannot be inverted, see `inverse_factor`.
    """
    gram_II = statistics.gram_II
    assert gram_II is not None, "the update needs a Gram matrix"
    widths = _span_and_block(work.pattern)

    def choose_others(weight_OB: Tensor, start: int, diagonal_B: Tensor, shard: RowShard) -> Tensor:
        seen_OB = work.without_zeros(weight_OB, shard.rows, start)
        keep_OB = choose(seen_OB, start, diagonal_B, shard)
        return work.without_zeros(keep_OB, shard.rows, start)

    if work.reference_order:
        damping = _damping(work)
        pruned = _sweep_in_reference_order(weight_OI, gram_II, damping, widths, choose_others)
        if pruned is not None:
            return pruned
    factor_II, notes = shared_factor(statistics, work)
    dead_I = gram_II.diagonal() == 0

    def solve(shard: RowShard) -> Pruned:
        shard_OI = weight_OI[shard.rows]
        updated_OI, keep_OI = _sweep(shard_OI, factor_II, dead_I, widths, choose_others, shard)
        return Pruned(updated_OI, keep_OI, dict(notes))

    return work.rows.solve(len(weight_OI), 1, solve)


def _sweep(
    weight_OI: Tensor,
    factor_II: Tensor,
    dead_I: Tensor,
    widths: tuple[int, int],
    choose: ChooseMask,
    shard: RowShard,
) -> tuple[Tensor, Tensor]:
    """The sweep over the columns of some rows.

    Args:
        weight_OI: float32, the weights of these rows.
        factor_II: U.
        dead_I: bool, True for inputs that are always 0.
        widths: The columns that get a mask at once, and those of a block; see `_span_and_block`.
        choose: Chooses a mask.
        shard: Which rows of the linear these are.

    Returns:
        Weights and mask, both (O, I).
    """
    diagonal_I = factor_II.diagonal()
    span, block = widths
    # `choose` needs columns that are fully corrected. Inside a tile every column is; otherwise only
    # the first one. So a tile is a multiple of the span, or the span starts at a tile.
    tile = TILE if span % TILE == 0 else max(1, TILE // span) * span

    # In the transposed weight a column is contiguous, so all updates work on contiguous memory.
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    weight_IO[dead_I] = 0
    keep_IO = torch.empty(weight_IO.shape, dtype=torch.bool, device=weight_IO.device)
    drop_BO = torch.empty_like(weight_IO[:block])

    def prune_column(j: int, error_O: Tensor) -> None:
        """Prune column j and write its error divided by U_jj; see `sweep_columns`."""
        offset = j % block
        if j % span == 0:
            # No mask reaches over the end of a block.
            width = min(span, block - offset)
            chosen = slice(j, min(j + width, len(weight_IO)))
            keep_IO[chosen] = choose(weight_IO[chosen].T, j, diagonal_I[chosen], shard).T
            torch.logical_not(keep_IO[chosen], out=drop_BO[offset : offset + chosen.stop - j])
        # Subtracting w from w gives exactly 0, in a fiftieth of the time of masked_fill.
        torch.mul(weight_IO[j], drop_BO[offset], out=error_O)
        weight_IO[j] -= error_O
        error_O.div_(diagonal_I[j])

    sweep_columns(weight_IO, factor_II, block, tile, prune_column)
    return weight_IO.T.contiguous(), keep_IO.T.contiguous()


def sweep_columns(
    weight_IO: Tensor,
    factor_II: Tensor,
    block: int,
    tile: int,
    finish: Callable[[int, Tensor], None],
) -> None:
    """Finish one column after the other, and let all later columns correct the error of each.

    Args:
        weight_IO: float32, the weight with a column in each row; it is corrected in place.
        factor_II: U, with the columns in the order of `weight_IO`.
        block: The columns whose corrections of everything after them are one matrix product.
        tile: The columns that are corrected one at a time; a block is cut into tiles.
        finish: Is called with j once column j is corrected for all columns before it. It writes
            (w_j − ŵ_j) / U_jj, where ŵ_j is what column j becomes, to its second argument, (O,).
    """
    inputs = len(weight_IO)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        error_BO = torch.empty_like(weight_IO[start:stop])
        for first in range(start, stop, tile):
            last = min(first + tile, stop)
            for j in range(first, last):
                error_O = error_BO[j - start]
                finish(j, error_O)
                # The later columns change by U_jk · (w_j − ŵ_j) / U_jj.
                weight_IO[j + 1 : last].addr_(factor_II[j, j + 1 : last], error_O, alpha=-1)
            # Correct the rest of the block for the errors of this tile ...
            done_BO = error_BO[first - start : last - start]
            weight_IO[last:stop].addmm_(factor_II[first:last, last:stop].T, done_BO, alpha=-1)
        # ... and everything after the block for the errors of the block.
        weight_IO[stop:].addmm_(factor_II[start:stop, stop:].T, error_BO, alpha=-1)


def _sweep_in_reference_order(
    weight_OI: Tensor, gram_II: Tensor, damping: float, widths: tuple[int, int], choose: ChooseMask
) -> Pruned | None:
    """The sweep in the order of operations of the original code, which reproduces its masks.

    Where a mask depends on weights that are already updated, every rounding error feeds back into
    it. The original code run with one and with two threads agrees with itself on only 94 % of such
    a mask. To get its masks one must therefore repeat its operations in its order: the factor is
    that of the inverse itself, in float32, and every column's correction is applied at once to the
    rest of its block. `_sweep` computes the same in a third of the time, and more exactly.

    The Gram matrix is summed in the reference order as well. The result is None where it cannot be
    factorised this way; the original code would have stopped.
    """
    damped_II = gram_II.clone()
    dead_I = damped_II.diagonal() == 0
    damped_II.diagonal().masked_fill_(dead_I, 1)
    # torch.diag makes a copy, whose mean is summed in another order than that of the view.
    damped_II.diagonal().add_(damping * torch.mean(torch.diag(damped_II)))
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed):
        return None
    # The original forms the inverse and factorises it again. Rounding may make it indefinite.
    factor_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
    if int(failed) or not all_finite(factor_II):
        return None
    diagonal_I = factor_II.diagonal()
    span, block = widths

    weight_OI = weight_OI.masked_fill(dead_I, 0)
    keep_OI = torch.empty_like(weight_OI, dtype=torch.bool)
    inputs = weight_OI.shape[1]
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        weight_OB = weight_OI[:, start:stop].clone()
        error_OB = torch.zeros_like(weight_OB)
        # Every column corrects all later columns of the block at once, not those of a tile only.
        for j in range(stop - start):
            if j % span == 0:
                end = min(j + span, stop - start)
                chosen = slice(start + j, start + end)
                keep_OI[:, chosen] = choose(
                    weight_OB[:, j:end], start + j, diagonal_I[chosen], EVERY_ROW
                )
            pruned_O = weight_OB[:, j] * keep_OI[:, start + j]
            error_O = (weight_OB[:, j] - pruned_O) / diagonal_I[start + j]
            weight_OB[:, j:] -= error_O[:, None] @ factor_II[None, start + j, start + j : stop]
            error_OB[:, j] = error_O
            weight_OI[:, start + j] = pruned_O
        weight_OI[:, stop:] -= error_OB @ factor_II[start:stop, stop:]
    return Pruned(weight_OI, keep_OI, {"damping": damping, "arithmetic": "original"})


def block_mask(score_OB: Tensor, work: Work, shard: RowShard) -> Tensor:
    """The mask (O, B) of a block of columns.

    With group "block" all rows of the block share one threshold. Otherwise rows, or the groups of
    N:M, compete for themselves.

    Args:
        score_OB: The scores of these columns for the rows of the shard.
        work: Its pattern and its sparsity decide.
        shard: Which rows of the linear these are; it brings all rows together.
    """
    if work.pattern.is_unstructured and work.pattern.group == "block":
        choose = functools.partial(keep_above_threshold, sparsity=work.sparsity)
        return shard.joint_mask(score_OB, choose)
    return keep_mask(score_OB, work.pattern, work.sparsity)


def shared_factor(statistics: InputStatistics, work: Work) -> tuple[Tensor, dict[str, Any]]:
    """`inverse_factor` of the Gram matrix, computed for the first of the linears with one input.

    Args:
        statistics: With a Gram matrix.
        work: Its `damping` is λ, a share of the mean diagonal; None means `DAMPING`.

    Raises:
        ValueError: The Gram matrix cannot be inverted, see `inverse_factor`.
    """
    gram_II, damping = statistics.gram_II, _damping(work)
    assert gram_II is not None, "the factor needs a Gram matrix"
    return statistics.derived(("inverse_factor", damping), lambda: inverse_factor(gram_II, damping))


def _damping(work: Work) -> float:
    """λ as the user chose it, or as published."""
    return DAMPING if work.options.damping is None else work.options.damping


def inverse_factor(
    gram_II: Tensor, damping: float, diagonal: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """U, the upper Cholesky factor of (G/d̄ + damping·I)⁻¹, where d̄ is the mean diagonal of G.

    Inputs that are always 0 count as uncorrelated with the others.

    Why the damping may grow: calibration inputs are often almost linearly dependent, and rounding
    then makes the matrix indefinite. Where the factorisation fails in float32, or loses all
    precision, it is tried in float64, then with ten times the damping, and so on. A larger damping
    only makes the correction more cautious, while a failed factor would end the run.

    Args:
        gram_II: float32, G; it is not changed.
        damping: A share of the mean diagonal, at least 0.
        diagonal: Return the diagonal of U alone, to the bit the same. It is 1 / L_jj, so that no
            triangle is inverted, which is more than half of the time.

    Returns:
        U, float32 (I, I), or its diagonal (I,), and notes for the record: `damping`, the damping
        used, and `factored_in`, if float64 was needed.

    Raises:
        ValueError: G is not finite, or it is far from positive semi-definite.

    >>> factor_II, notes = inverse_factor(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), 0.5625)
    >>> factor_II
    tensor([[0.8000, 0.0000],
            [0.0000, 0.8000]])
    >>> notes
    {'damping': 0.5625}
    """
    while damping <= _MAX_DAMPING:
        for dtype in (torch.float32, torch.float64):
            factor_II = _inverse_factor_in(gram_II, damping, dtype, diagonal)
            if factor_II is not None:
                doubled = {"factored_in": "float64"} if dtype == torch.float64 else {}
                return factor_II, {"damping": damping, **doubled}
        damping = damping * 10 if damping > 0 else 0.01
    raise ValueError(
        "the Gram matrix of the inputs cannot be inverted however it is damped: is it finite?"
    )


def ordered_factor(
    statistics: InputStatistics,
    damping: float,
    order: tuple[Hashable, Callable[[Tensor], Tensor]],
    correlations: float = 1.0,
    leading: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The factor U of columns in an order.

    Args:
        statistics: With a Gram matrix.
        damping: A share of the mean diagonal, as for `inverse_factor`.
        order: A name of the order, by which linears with the same input share the factor; and what
            makes the order, int64 (I,), from the squared norms of the inputs (I,).
        correlations: Entries of the Gram matrix beside its diagonal are multiplied by this share.
        leading: What they have along this many of its largest eigenvectors stays whole.

    Returns:
        The columns in the order, int64 (I,); U in this order, float32 (I, I); and the notes of
        `inverse_factor`.

    Raises:
        ValueError: The Gram matrix cannot be inverted, see `inverse_factor`.
    """
    gram_II = statistics.gram_II
    assert gram_II is not None, "rounding with feedback needs a Gram matrix"

    def compute() -> tuple[Tensor, Tensor, dict[str, Any]]:
        order_I = order[1](gram_II.diagonal())
        ordered_II = gram_II[order_I][:, order_I].mul_(correlations)
        if correlations < 1 and leading:
            # Types of other groups have other orders, and the same eigenvectors.
            vectors_IK, values_K = statistics.derived(
                ("leading eigenvectors", leading), lambda: _leading_eigenvectors(gram_II, leading)
            )
            vectors_IK = vectors_IK[order_I]
            ordered_II.addmm_(vectors_IK * values_K, vectors_IK.T, alpha=1 - correlations)
        ordered_II.diagonal().copy_(gram_II.diagonal()[order_I])
        return order_I, *inverse_factor(ordered_II, damping)

    # Linears with the same input share one factor: it is computed for the first of them.
    return statistics.derived((order[0], damping, correlations, leading), compute)


def _leading_eigenvectors(gram_II: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvectors of a Gram matrix, float32 (I, K), and their values (K,).

    By subspace iteration (Halko, Martinsson and Tropp 2011), from the same random start each time.
    It finds twice as many, so that the ones that count are exact.
    """
    generator, width = torch.Generator().manual_seed(0), min(2 * count, len(gram_II))
    basis_IK = torch.randn(len(gram_II), width, generator=generator).to(gram_II.device)
    for _ in range(_SUBSPACE_STEPS):
        basis_IK = torch.linalg.qr(gram_II @ basis_IK)[0]
    values_K, turns_KK = torch.linalg.eigh(basis_IK.T @ gram_II @ basis_IK)
    return (basis_IK @ turns_KK)[:, -count:], values_K[-count:].clamp_min(0)


def _inverse_factor_in(
    gram_II: Tensor, damping: float, dtype: torch.dtype, diagonal: bool
) -> Tensor | None:
    """U or its diagonal, computed in `dtype`; None where the factorisation fails or is noise."""
    # Let P reverse the order of the inputs. PAP = LLᵀ gives A⁻¹ = UᵀU with U = PL⁻¹P, which is
    # upper triangular. That takes one factorisation and one triangular inverse. A⁻¹ itself, which
    # rounding may make indefinite, is never formed.
    scaled_II = gram_II.flip(0, 1).to(dtype)
    diagonal_I = scaled_II.diagonal()
    dead_I = diagonal_I == 0
    if not bool(dead_I.all()):
        scaled_II.div_(diagonal_I.mean())
    diagonal_I.masked_fill_(dead_I, 1).add_(damping)
    lower_II, info = torch.linalg.cholesky_ex(scaled_II)
    # A pivot is what is left of a diagonal entry once the inputs before it explain their part. If
    # only rounding is left, the factor would amplify it.
    pivot_I = lower_II.diagonal().square()
    if int(info) or not bool((pivot_I > _NOISE * torch.finfo(dtype).eps * diagonal_I).all()):
        return None
    if diagonal:
        return lower_II.diagonal().reciprocal().flip(0).float()
    # Both have their columns one after the other in memory, as the factorisation returns them. The
    # memory of each is used again: the system takes a second to hand out a gigabyte of new pages.
    inverse_II = scaled_II.T.zero_()
    _invert_triangle(lower_II, inverse_II)
    for columns in row_spans(inverse_II.T):
        lower_II[:, -columns.stop : -columns.start or None] = inverse_II[:, columns].flip(0, 1)
    factor_II = lower_II.float()
    return factor_II if all_finite(factor_II) else None


def _invert_triangle(lower_II: Tensor, inverse_II: Tensor) -> None:
    """Fill `inverse_II`, which holds zeros, with the inverse of a lower triangle.

    The triangle is split in halves, recursively. Nearly all of the work is then matrix products. It
    takes less than half of the time of a triangular solve against the identity, most of whose
    entries are zeros. What is below the diagonal of `lower_II` is overwritten.
    """
    width = len(lower_II)
    if width <= _SMALL_TRIANGLE:
        identity_II = inverse_II.fill_diagonal_(1)
        inverse_II.copy_(torch.linalg.solve_triangular(lower_II, identity_II, upper=False))
        return
    first, last = slice(width // 2), slice(width // 2, width)
    _invert_triangle(lower_II[first, first], inverse_II[first, first])
    _invert_triangle(lower_II[last, last], inverse_II[last, last])
    # The inverse of [[A, 0], [B, C]] is [[A⁻¹, 0], [−C⁻¹BA⁻¹, C⁻¹]]. The sums of its products leave
    # out zeros: those of A⁻¹ come first in a sum, those of C⁻¹ last. MKL adds 192 terms at a time,
    # and fewer than 384 in two halves, so sums cut at multiples of 384 keep every bit.
    step = 384 if lower_II.is_cpu else width
    spans = [
        slice(start, start + step if start + 2 * step <= width // 2 else None)
        for start in range(0, max(1, width // 2 - step + 1), step)
    ]
    a_II, b_II, c_II = inverse_II[first, first], lower_II[last, first], inverse_II[last, last]
    for span in spans:
        b_II[:, span] = b_II[:, span.start :] @ a_II[span.start :, span]
    for span in spans:
        inverse_II[last, first][span] = (c_II[span, : span.stop] @ b_II[: span.stop]).neg_()


def _span_and_block(pattern: Pattern) -> tuple[int, int]:
    """The columns that get a mask at once, and those of a block: a multiple, which splits no M.

    The corrections that a block makes to all later columns are one matrix product.
    """
    size = pattern.block_size
    if pattern.m is None:
        return size, size
    return pattern.m, max(1, size // pattern.m) * pattern.m
