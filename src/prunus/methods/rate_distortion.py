"""Quantise by rate and distortion: integers whose entropy code is short and whose error is small.

The goal is to choose integers q and steps so that the output error tr (W − Ŵ)G(W − Ŵ)ᵀ is small for
the bits that a code of q takes. Ŵ_ij = scale_i · step_j · q_ij. Zero is the cheapest symbol of the
code, so pruning is a part of it: weights that do not repay their bits become 0.

Columns are quantised one after the other, from the input with the largest norm to the smallest,
and the columns that are left correct the error (the OBS sweep of `solvers/obs.py`). With U the
upper Cholesky factor of (G/d̄ + λI)⁻¹, the columns in that order and d̄ the mean diagonal of G, the
output error is

    Σ_ij (w_ij − ŵ_ij)² / U_jj²     with w_ij as corrected at its turn.

At a high rate a uniform step s costs s²/12 and −log₂ s bits. All columns then have the same slope
of error over bits where

    step_j = Δ · U_jj                        (WaterSIC, arXiv 2603.04956).

Rows differ too. Let s_i be how fast the loss of the model grows with the squared error of output i
(`engine/loss_sensitivity.py`). The loss grows by Σ_i s_i · error_i, so all rows have the same
slope where scale_i ∝ s_i^-½. If Δ is the same for all linears of a model, the bits are spent where
they lower the loss most.

Rounding weighs error against bits as well. A value v between the integers k and k + 1, in units of
its step, is rounded up where

    (k + 1 − v)² + μ·bits(k + 1)  <  (v − k)² + μ·bits(k),    μ = 2 ln 2 / 12.

This μ is the slope of the error over the bits at a high rate, −dD/dR with D = 4^-R/12.

At last scale_i is multiplied by the factor that keeps the length of the outputs; see `output_gain`.

The order of this file: quantising one linear (`quantize` and its sweep), then the bits that a code
is expected to take (`expected_bits`).

Shape suffixes: O outputs (rows), S some of them, I inputs (columns), T columns of a tile, K classes
of columns, V values from −128 to 127, N entries of a table.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunus.hardware.numerics import low_precision_product
from prunus.kernels import library as kernels
from prunus.methods.output_gain import output_gains
from prunus.methods.solvers.obs import TILE, ordered_factor, sweep_columns
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import LinearQuantization, Pruned, Quantized, RowShard, Work

#: λ, a fraction of the mean diagonal of the Gram matrix.
DAMPING = 0.1
# The largest weight of a column is at most this many steps before the sweep. The rest of the range
# is for what the sweep adds.
_MAX_FIRST_LEVEL = 100
# Larger integers would rule out codes with low bits that are stored as they are.
_MAX_SWEPT_LEVEL = 123
# −dD/dR of a uniform quantiser at a high rate, with the error in units of squared steps.
_SLOPE = 2 * math.log(2) / 12
# Rounding before the first code is known: a dead zone that is a tenth of a step wider.
_DEAD_ZONE = 0.1
# A step of the sweep never rounds a value that is closer to an integer than this to another one.
_MIN_SHARE = 0.02
# Rows that choose the code: about this many, spread evenly over the linear.
_SAMPLE_ROWS = 256
# How often these rows are rounded and choose the code anew.
_SAMPLE_ROUNDS = 2
# Columns of a block of the sweep.
_BLOCK = 128


def quantize(
    weight_OI: Tensor, statistics: InputStatistics, work: Work, keep_OI: Tensor | None = None
) -> Pruned:
    """Quantise a weight with the steps step · U_jj.

    Args:
        weight_OI: float32, the trained weights (or a dense target).
        statistics: With a Gram matrix.
        work: Its quantisation is a `LinearQuantization`. Its `damping` is λ; None means `DAMPING`.
        keep_OI: bool, False where the weight must become 0; None allows all levels everywhere.

    Returns:
        The dense weight, the mask of its non-zero integers, and the quantised weight.

    Raises:
        ValueError: The Gram matrix cannot be inverted, see `obs.inverse_factor`.

    >>> from prunus.methods.work import CodeLengths, LinearQuantization
    >>> statistics = InputStatistics(2, "gram")
    >>> statistics.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> flat = CodeLengths(torch.zeros(1, 255), torch.zeros(2, dtype=torch.int64))
    >>> how = LinearQuantization(0.5, torch.ones(1), lambda levels_SI: flat)
    >>> weight_OI = torch.tensor([[1.0, 0.1]])
    >>> quantize(weight_OI, statistics, Work(quantization=how)).quantized.levels_OI
    tensor([[2, 0]], dtype=torch.int8)
    """
    how = work.quantization
    assert isinstance(how, LinearQuantization)
    order_I, upper_II, factor_notes = _factor(statistics, work.options.damping)
    diagonal_I = relative_steps(statistics, work.options.damping)
    dead_I = statistics.sum_squares_I == 0
    scales_O = how.scales_O.to(weight_OI.device).bfloat16().float()
    # A column with an outlier gets a step that keeps its levels in range.
    floor_I = (weight_OI / scales_O[:, None]).abs().amax(dim=0).div_(_MAX_FIRST_LEVEL)
    steps_I = torch.maximum(how.step * diagonal_I, floor_I).bfloat16().float()
    # A column of zeros, or of subnormal numbers, may not have the step 0.
    steps_I = steps_I.masked_fill(steps_I == 0, 1.0)

    def sweep(rows: Tensor | slice, shares_KV: Tensor, classes_I: Tensor) -> Tensor:
        """The integers of some rows, int8 (S, I), in the order of the columns of the weight."""
        # Rows are divided by their scale, so that a column has a single step. In the transposed
        # weight a column is contiguous.
        scaled_IO = (weight_OI[rows] / scales_O[rows, None]).T[order_I]
        scaled_IO[dead_I[order_I]] = 0
        keep_IO = None if keep_OI is None else keep_OI[rows].T[order_I]
        levels_IO = torch.empty(scaled_IO.shape, dtype=torch.int8, device=scaled_IO.device)
        levels_IO[order_I] = _sweep(
            scaled_IO, upper_II, steps_I[order_I], shares_KV, classes_I[order_I], keep_IO
        )
        return levels_IO.T.contiguous()

    # A few rows choose the code. Rounding depends on the code and the code on the rounding, so they
    # do it twice.
    some_S = torch.arange(
        0, len(weight_OI), max(1, len(weight_OI) // _SAMPLE_ROWS), device=weight_OI.device
    )
    shares_KV = torch.full((1, 256), 0.5 - _DEAD_ZONE, device=weight_OI.device)
    shares_KV[:, 128:] = 0.5 + _DEAD_ZONE
    classes_I = torch.zeros_like(dead_I, dtype=torch.int64)
    for _ in range(_SAMPLE_ROUNDS):
        code = how.code_of(sweep(some_S, shares_KV, classes_I))
        classes_I = code.classes_I.to(weight_OI.device)
        shares_KV = _rounding_shares(code.lengths_KV.to(weight_OI.device))

    def solve(shard: RowShard) -> Pruned:
        levels_OI = sweep(shard.rows, shares_KV, classes_I)
        dense_OI = Quantized(levels_OI, steps_I, scales_O[shard.rows]).dense()
        return Pruned(dense_OI, levels_OI != 0, dict(factor_notes))

    pruned = work.rows.solve(len(weight_OI), 1, solve)
    # Processes exchange dense weights only, which are whole multiples of their units.
    unit_OI = steps_I * scales_O[:, None]
    levels_OI = (pruned.weight_OI / unit_OI).round_().to(torch.int8)
    assert statistics.gram_II is not None
    weighted_OI = low_precision_product(weight_OI, statistics.gram_II)
    gain_O = output_gains(weight_OI, pruned.weight_OI, weighted_OI)
    quantized = Quantized(levels_OI, steps_I, (scales_O * gain_O).bfloat16().float())
    return replace(pruned, weight_OI=quantized.dense(), quantized=quantized)


def relative_steps(statistics: InputStatistics, damping: float | None) -> Tensor:
    """U_jj, float32 (I,): the steps of a linear's columns up to a common factor.

    The factor matters between linears. An error in units of these steps changes the outputs by
    d̄ / T times its square, where d̄ is the mean diagonal of the Gram matrix of T tokens.

    Args:
        statistics: With a Gram matrix.
        damping: λ; None means `DAMPING`.

    Raises:
        ValueError: The Gram matrix cannot be inverted, see `obs.inverse_factor`.
    """
    order_I, upper_II, _ = _factor(statistics, damping)
    return torch.empty_like(upper_II[0]).index_copy_(0, order_I, upper_II.diagonal())


def _factor(
    statistics: InputStatistics, damping: float | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The columns with the largest norms first, U in this order, and notes for the record."""
    order = ("by norm", lambda norms_I: norms_I.argsort(descending=True, stable=True))
    return ordered_factor(statistics, DAMPING if damping is None else damping, order)


def _rounding_shares(lengths_KV: Tensor) -> Tensor:
    """Between v = k and v = k + 1, the share of the way above which v is rounded up: (K, 256).

    Entry k + 128 belongs to the integer k, from -128 to 127.
    """
    # The integers -128 and 128 do not exist.
    missing = torch.full_like(lengths_KV[:, :1], math.inf)
    longer_KV = torch.cat([lengths_KV, missing], 1) - torch.cat([missing, lengths_KV], 1)
    return (0.5 + 0.5 * _SLOPE * longer_KV).clamp_(_MIN_SHARE, 1 - _MIN_SHARE)


def _sweep(
    weight_IO: Tensor,
    factor_II: Tensor,
    steps_I: Tensor,
    shares_KV: Tensor,
    classes_I: Tensor,
    keep_IO: Tensor | None,
) -> Tensor:
    """The sweep over the columns, which are in its order; returns the integers, int8 (I, O).

    Args:
        weight_IO: float32, a column in each row; it is overwritten.
        factor_II: U.
        steps_I: The step of each column.
        shares_KV: When a value is rounded up, see `_rounding_shares`.
        classes_I: The class of each column, an index of `shares_KV`.
        keep_IO: bool, False where the integer must be 0; None where none must.
    """
    steps, classes = steps_I.tolist(), classes_I.tolist()
    inverse_I = factor_II.diagonal().reciprocal().tolist()
    levels_IO = torch.empty(weight_IO.shape, dtype=torch.int8, device=weight_IO.device)

    def round_column(j: int, error_O: Tensor) -> None:
        """Round column j and write its error divided by U_jj; see `sweep_columns`."""
        value_O = (weight_IO[j] / steps[j]).clamp_(-_MAX_SWEPT_LEVEL, _MAX_SWEPT_LEVEL)
        level_O = value_O.floor()
        share_O = shares_KV[classes[j]][(level_O + 128).int()]
        level_O += value_O.sub_(level_O) > share_O
        if keep_IO is not None:
            level_O *= keep_IO[j]
        levels_IO[j] = level_O
        torch.sub(weight_IO[j], level_O.mul_(steps[j]), out=error_O)
        error_O.mul_(inverse_I[j])

    def round_tile(tile: slice, error_TO: Tensor) -> None:
        """Round and correct all columns of a tile with the compiled kernel."""
        assert compiled is not None
        arrays = (steps_I[tile], shares_KV[classes_I[tile]], levels_IO[tile], error_TO)
        keep_TO = None if keep_IO is None else keep_IO[tile]
        sizes = (*error_TO.shape, float(_MAX_SWEPT_LEVEL))
        factor_TT = factor_II[tile, tile].contiguous()
        compiled.call("prunus_round_columns", *sizes, weight_IO[tile], factor_TT, *arrays, keep_TO)

    compiled = kernels.load() if weight_IO.is_cpu else None
    weight_IO = weight_IO.contiguous()
    keep_IO = None if keep_IO is None else keep_IO.contiguous()
    finish_tile = None if compiled is None else round_tile
    sweep_columns(weight_IO, factor_II, _BLOCK, TILE, round_column, finish_tile)
    return levels_IO


def expected_bits(deviations: Tensor) -> Tensor:
    """The entropy in bits of rounded normal values, by their standard deviations in steps.

    Args:
        deviations: float32 of any shape, not negative; 0 has an entropy of about 0.

    Returns:
        float32 of the same shape: bits per value, interpolated in a table.

    >>> [round(bits, 2) for bits in expected_bits(torch.tensor([0.0, 1.0, 4.0])).tolist()]
    [0.0, 2.1, 4.05]
    """
    table_N = _entropies()
    # The table is regular in the logarithm. Above it, a doubled deviation costs one more bit.
    position = (deviations.clamp_min(1e-9).log2() - _LOWEST) * _PER_OCTAVE
    above = (position - (len(table_N) - 1)).clamp_min(0)
    position = position.clamp(0, len(table_N) - 1)
    left = position.floor().clamp_max(len(table_N) - 2)
    left_bits, right_bits = table_N[left.long()], table_N[left.long() + 1]
    return left_bits.lerp(right_bits, position - left) + above / _PER_OCTAVE


# The table of `expected_bits` starts at a deviation of 2 to this power ...
_LOWEST = -4
# ... ends at 2 to this power ...
_HIGHEST = 4
# ... and has this many entries for every doubling of the deviation.
_PER_OCTAVE = 8


@functools.cache
def _entropies() -> Tensor:
    """The table of `expected_bits`: −Σ p log₂ p over the integers, float32 (N,)."""
    count = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 1
    deviation_N = 2.0 ** (_LOWEST + torch.arange(count, dtype=torch.float64) / _PER_OCTAVE)
    edges_V = torch.arange(-200, 201, dtype=torch.float64) + 0.5
    below_NV = torch.special.ndtr(edges_V / deviation_N[:, None])
    share_NV = below_NV.diff(dim=1)
    return -torch.xlogy(share_NV, share_NV).sum(dim=1).div(math.log(2)).float()
