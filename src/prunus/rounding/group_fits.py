"""Fit the steps and minima of a span of rounded columns to weights.

The goal is a small weighted error Σ w·(x − d·code·value + dmin·minimum)² in every row. First every
group gets its best real step and minimum, found among a few tens of candidates: each candidate
rounds the weights, and least squares gives the step (and the minimum) that suit the rounded values
best. Then d and dmin are chosen so that the codes cover all groups. At last the codes near the real
steps are tried, and d and dmin are fitted again by least squares. A step whose d has eight bits is
the best of a few that follow each other.

Least squares for one group have two unknowns, the step s and the offset o (the minimum times dmin):
with v the rounded values, s and o minimise Σ w·(x − s·v + o)² where both are positive.

Everything is computed for all rows at once. Shape suffixes: B columns of a span, G its groups, C
columns of a group, O outputs (rows), I inputs (columns of a weight); 1 a dimension that is
broadcast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunus.rounding.codebooks import CodebookQuantizer, CodewordFit
from prunus.rounding.group_quantizer import (
    GroupedWeight,
    GroupQuantizer,
    Scales,
    check_range,
    for_rows,
    join_spans,
    over,
    spans_with_gains,
)

# Candidates for the step of a group: the extreme weight gets the extreme value of the quantiser,
# moved by these shares of the distance between values.
_MOVES = tuple(quarters / 4 for quarters in range(-4, 5))
# The extreme number of a row gets one of these shares of the extreme code. A smaller share gives a
# larger d, which may suit the other groups of the row better.
_SHARES = tuple(1 - parts / 32 for parts in range(16))
# How often codes and d are fitted in turn.
_ROUNDS = 2
# Candidates for a d of eight bits, as multiples of one with which the largest weight is near the
# extreme value. With smaller steps it is cut off, and small weights are more exact. With larger
# ones it can be near another value.
_FACTORS = {
    torch.float8_e8m0fnu: (2.0, 1.0, 0.5, 0.25, 0.125),
    torch.float8_e4m3fn: tuple(parts / 16 for parts in range(9, 26)),
}
# Weights that are rounded at once: few enough for the cache of a processor.
_ELEMENTS = 2**19


def fit_scales(weight_BO: Tensor, importance_B: Tensor, quantizer: GroupQuantizer) -> Scales:
    """The scales of one span that fit its weights best.

    Args:
        weight_BO: float32, the weights of one span, transposed: every column is a row here.
        importance_B: float32, not negative. It weighs the squared error of each column.
        quantizer: The values, codes and dtype of scales to choose from.

    Raises:
        ValueError: Weights are beyond the values of the quantiser.
    """
    check_range(weight_BO, quantizer)
    return span_fit(weight_BO, importance_B, quantizer).scales()


def span_fit(
    weight_BO: Tensor, importance_B: Tensor, quantizer: GroupQuantizer
) -> SpanFit | CodewordFit:
    """The fit of the weights of a span, a group or a unit; see `SpanFit` for the arguments."""
    if isinstance(quantizer, CodebookQuantizer):
        return CodewordFit(weight_BO, importance_B, quantizer)
    return SpanFit(weight_BO, importance_B, quantizer)


def round_to_nearest(
    weight_OI: Tensor, quantizer: GroupQuantizer, importance_I: Tensor | None = None
) -> GroupedWeight:
    """Round a weight to the nearest values, with the scales of the smallest weighted squared error.

    The scales are then multiplied by a factor of each row, see `output_gain`.

    Args:
        weight_OI: A weight of any float dtype, whose rows consist of whole spans.
        quantizer: The values and scales to choose from.
        importance_I: float32, weighs the squared error of each column, such as the mean square of
            an input (llama.cpp's importance matrix); None, or all zeros, for equal weights.
    """
    weight_OI, importance_I = _in_stored_order(weight_OI, quantizer, importance_I)
    parts = []
    for rows_OI in weight_OI.split(max(1, _ELEMENTS // weight_OI.shape[1])):
        weight_IO = rows_OI.float().T.contiguous()
        spans = zip(
            weight_IO.split(quantizer.span), importance_I.split(quantizer.span), strict=True
        )
        scales, levels = zip(*(_fit_span(*span, quantizer) for span in spans), strict=True)
        rows_OI = weight_IO.T
        weighted_OI = rows_OI * importance_I
        rounded = join_spans(list(scales), torch.cat(levels), quantizer, rows_OI, weighted_OI)
        parts.append(rounded.data_OB)
    return GroupedWeight(quantizer, torch.cat(parts))


def rounded_rows(
    weight_OI: Tensor, quantizer: GroupQuantizer, importance_I: Tensor | None = None
) -> Tensor:
    """What `round_to_nearest` makes of a few rows, float32 (O, I), up to the last bits.

    All spans are fitted at once, as if each were a run of rows, and no bytes are packed. For a few
    rows this takes a fraction of the time, most of which would be that of calling torch.
    """
    weight_OI, importance_I = _in_stored_order(weight_OI.float(), quantizer, importance_I)
    importance_BS = importance_I.view(-1, quantizer.span).T
    weight_BSO = weight_OI.T.unflatten(0, (-1, quantizer.span)).transpose(0, 1)
    scales, levels = _fit_span(weight_BSO.flatten(1), importance_BS.contiguous(), quantizer)
    runs = (-1, (importance_BS.shape[1], -1))
    stacked = Scales(*(part.unflatten(*runs).movedim(-2, 0) for part in scales))
    levels_IO = levels.unflatten(*runs).movedim(-2, 0).flatten(0, 1)
    spans = spans_with_gains(stacked, levels_IO, quantizer, weight_OI, weight_OI * importance_I)
    rounded_OI = spans.dense(quantizer).view(weight_OI.shape)
    order = list(quantizer.columns)
    return rounded_OI[:, torch.tensor(order).argsort()] if order else rounded_OI


def _in_stored_order(
    weight_OI: Tensor, quantizer: GroupQuantizer, importance_I: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A weight with its columns in the order in which they are stored, and their importances."""
    if order := list(quantizer.columns):
        weight_OI = weight_OI[:, order]
        importance_I = None if importance_I is None else importance_I[order]
    if importance_I is None or not bool(importance_I.any()):
        importance_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    # A group of inputs that are always 0 keeps its weights: other texts may use them.
    return weight_OI, importance_I.to(weight_OI.device, torch.float32).clamp_min(
        1e-6 * float(importance_I.mean())
    )


def _fit_span(
    weight_BO: Tensor, importance_B: Tensor, quantizer: GroupQuantizer
) -> tuple[Scales, Tensor]:
    """The scales of one span, and the levels of the values nearest to its weights, uint8 (B, O)."""
    check_range(weight_BO, quantizer)
    fit = span_fit(weight_BO, importance_B, quantizer)
    scales = fit.scales()
    return scales, fit.nearest(scales)[1].to(torch.uint8)


def _common_factor(real_GO: Tensor, lowest: float, highest: float) -> Tensor:
    """d (O,), exact in float16, for which d · code in the range is close to all numbers of a row.

    Args:
        real_GO: float32, the real steps (or offsets) of the groups.
        lowest: The lowest code; 0 means that `highest` is the extreme code.
        highest: The highest code.
    """
    extreme_O = _extreme(real_GO)
    extreme_code = lowest or highest
    # The smallest squared error so far, and its d.
    best_O, d_O = torch.full_like(extreme_O, torch.inf), torch.zeros_like(extreme_O)
    for share in _SHARES:
        new_O = (extreme_O / round(share * extreme_code)).half().float()
        code_GO = over(real_GO, new_O).round_().clamp_(lowest, highest)
        error_O = (code_GO * new_O).sub_(real_GO).square_().sum(0)
        _take(error_O < best_O, (error_O, best_O), (new_O, d_O))
    return d_O


class SpanFit:
    """The weights of one span by groups, or those of a single group, and the fits of each group.

    Candidates are compared by the weighted squared error of every group (G, O).

    Args:
        weight_BO: float32, the weights, transposed as in `fit_scales`.
        importance_B: float32, weighs the squared error of each column; see `for_rows`.
        quantizer: Its values, and the range of its codes.

    Attributes:
        quantizer: The values and codes to choose from.
        weight_GCO: The weights x.
        importance_GC1: The importances w of the columns, (G, C, O) where runs of rows differ.
        weighted_GCO: W·x.
        importance_G1: Σ w of each group; zeros where the quantiser has no minima.
        sum_GO: Σ w·x of each group; zeros where the quantiser has no minima.
    """

    def __init__(self, weight_BO: Tensor, importance_B: Tensor, quantizer: GroupQuantizer) -> None:
        self.quantizer = quantizer
        self.weight_GCO = weight_BO.unflatten(0, (-1, quantizer.group))
        importance_B1 = for_rows(importance_B, weight_BO)
        self.importance_GC1 = importance_B1.unflatten(0, (-1, quantizer.group))
        self.weighted_GCO = self.weight_GCO * self.importance_GC1
        self.importance_G1 = self.importance_GC1.sum(1)
        self.sum_GO = self.weighted_GCO.sum(1)
        if not quantizer.has_minimum:
            # With these sums all offsets become 0.
            self.importance_G1.zero_()
            self.sum_GO.zero_()

    def scales(self) -> Scales:
        """The scales of a span that fit its weights best."""
        quantizer = self.quantizer
        step_GO, offset_GO = self.fit()
        lowest, highest = quantizer.codes
        if lowest == highest:
            # The span is a single group: d and dmin are its step and its offset.
            d_O, dmin_O = quantizer.as_scale(step_GO[0] / lowest), offset_GO[0]
            # A power of two is never 0, as the offset is without minima.
            if quantizer.has_minimum:
                dmin_O = quantizer.as_scale(dmin_O)
            codes_GO = torch.full_like(step_GO, lowest)
            return Scales(d_O, dmin_O, codes_GO, torch.ones_like(offset_GO))
        d_O = _common_factor(step_GO, lowest, highest)
        dmin_O = _common_factor(offset_GO, 0, highest)
        for _ in range(_ROUNDS):
            code_GO = over(step_GO, d_O).round_().clamp_(lowest, highest)
            minimum_GO = over(offset_GO, dmin_O).round_().clamp_(0, highest)
            scales = self.refit(self.best_codes(Scales(d_O, dmin_O, code_GO, minimum_GO)))
            d_O, dmin_O = scales.d_O, scales.dmin_O
        return scales

    def nearest(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """The values nearest to the weights, in steps, and their levels; both (B, O)."""
        value_GCO, level_GCO = self.quantizer.nearest(_in_steps(self.weight_GCO, scales))
        return value_GCO.flatten(0, 1), level_GCO.flatten(0, 1)

    def fit(self) -> tuple[Tensor, Tensor]:
        """The best real step and offset of every group; an offset is not negative."""
        step_GO, offset_GO = torch.zeros_like(self.sum_GO), torch.zeros_like(self.sum_GO)
        if self.quantizer.has_coarse_scale:
            return self._best_coarse(), offset_GO
        # By how much the best candidate so far lowers the error of rounding all weights to 0.
        best_GO = torch.zeros_like(self.sum_GO)
        for lowest_GO, inverse_GO in self._candidates():
            in_steps_GCO = (self.weight_GCO - lowest_GO[:, None]).mul_(inverse_GO[:, None])
            value_GCO = self.quantizer.nearest_values(in_steps_GCO)
            product_GO = (self.weighted_GCO * value_GCO).sum(1)
            new_GO, new_offset_GO = _two_least_squares(
                *self._value_sums(value_GCO), self.importance_G1, product_GO, self.sum_GO
            )
            gain_GO = new_GO * product_GO - new_offset_GO * self.sum_GO
            _take(
                gain_GO > best_GO, (gain_GO, best_GO), (new_GO, step_GO), (new_offset_GO, offset_GO)
            )
        return step_GO, offset_GO

    def _best_coarse(self) -> Tensor:
        """The step of each group (G, O) whose d has eight bits with the least error of weights."""
        quantizer, code = self.quantizer, self.quantizer.codes[0]
        middle_GO = quantizer.as_scale(
            self.weight_GCO.abs().amax(1) / (quantizer.values[-1] * code)
        )
        best_GO, step_GO = torch.full_like(middle_GO, torch.inf), middle_GO * code
        one_O, zero_GO = torch.ones_like(middle_GO[0]), torch.zeros_like(middle_GO)
        for factor in _FACTORS[quantizer.dtype]:
            new_GO = quantizer.as_scale(middle_GO * factor) * code
            error_GO = self._error(Scales(one_O, one_O, new_GO, zero_GO))
            _take(error_GO < best_GO, (error_GO, best_GO), (new_GO, step_GO))
        return step_GO

    def _candidates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Candidates for each group (G, O): the weight that becomes value 0, and 1 / step.

        The weights to round are (x − lowest) / step. Where the quantiser has no minima, `lowest` is
        0, and the sign of the step says which end of the values the extreme weight takes.
        """
        values = self.quantizer.values
        # The mean distance between neighbouring values.
        spacing = (values[-1] - values[0]) / (len(values) - 1)
        if self.quantizer.has_minimum:
            lowest_GO = self.weight_GCO.amin(1).clamp_max_(0)
            inverse_GO = over(1.0, self.weight_GCO.amax(1) - lowest_GO)
            extremes = [(values[-1], _MOVES)]
        else:
            lowest_GO = torch.zeros_like(self.sum_GO)
            inverse_GO = over(1.0, _extreme(self.weight_GCO.transpose(0, 1)))
            extremes = [(values[0], _MOVES), (values[-1], _MOVES[len(_MOVES) // 2 :])]
        for value, moves in extremes:
            for move in moves:
                # The product leaves float32 where weights are denormal.
                yield lowest_GO, (inverse_GO * (value + move * spacing)).nan_to_num_(0, 0, 0)

    def best_codes(self, scales: Scales) -> Scales:
        """The codes with the smallest errors, at most 1 from those of `scales`; d and dmin stay."""
        d_O, dmin_O, code_GO, minimum_GO = scales
        lowest, highest = self.quantizer.codes
        best_GO = torch.full_like(code_GO, torch.inf)
        best_code_GO, best_minimum_GO = code_GO.clone(), minimum_GO.clone()
        for minimum_change in (-1, 0, 1) if self.quantizer.has_minimum else (0,):
            new_minimum_GO = (minimum_GO + minimum_change).clamp_(0, highest)
            for code_change in (0, -1, 1):
                new_code_GO = (code_GO + code_change).clamp_(lowest, highest)
                error_GO = self._error(Scales(d_O, dmin_O, new_code_GO, new_minimum_GO))
                _take(
                    error_GO < best_GO,
                    (error_GO, best_GO),
                    (new_code_GO, best_code_GO),
                    (new_minimum_GO, best_minimum_GO),
                )
        return Scales(d_O, dmin_O, best_code_GO, best_minimum_GO)

    def refit(self, scales: Scales) -> Scales:
        """d and dmin by least squares, where the weights round to the values that they have now."""
        value_GCO = self.quantizer.nearest_values(_in_steps(self.weight_GCO, scales))
        code_GO, minimum_GO = scales.codes_GO, scales.minima_GO
        product_GO = (self.weighted_GCO * value_GCO).sum(1)
        square_GO, value_sum_GO = self._value_sums(value_GCO)
        d_O, dmin_O = _two_least_squares(
            (square_GO * code_GO.square()).sum(0),
            (value_sum_GO * code_GO * minimum_GO).sum(0),
            (self.importance_G1 * minimum_GO.square()).sum(0),
            (product_GO * code_GO).sum(0),
            (self.sum_GO * minimum_GO).sum(0),
        )
        stored = self.quantizer.as_scale
        return Scales(stored(d_O), stored(dmin_O), code_GO, minimum_GO)

    def _value_sums(self, value_GCO: Tensor) -> tuple[Tensor, Tensor]:
        """Σ w·v², and Σ w·v where there are minima, else 0; writes over `value_GCO`."""
        weighted_GCO = value_GCO * self.importance_GC1
        value_sum_GO = weighted_GCO.sum(1) if self.quantizer.has_minimum else self.sum_GO
        return value_GCO.mul_(weighted_GCO).sum(1), value_sum_GO

    def _error(self, scales: Scales) -> Tensor:
        """The weighted squared error of each group (G, O) when its weights are rounded."""
        step_GO, offset_GO = scales.steps()
        value_GCO = self.quantizer.nearest_values(_in_steps(self.weight_GCO, scales))
        error_GCO = value_GCO.mul_(step_GO[:, None]).sub_(offset_GO[:, None]).sub_(self.weight_GCO)
        return error_GCO.square_().mul_(self.importance_GC1).sum(1)


def _in_steps(weight_GCO: Tensor, scales: Scales) -> Tensor:
    """(x + offset) / step of every weight: the numbers that `GroupQuantizer.nearest` rounds."""
    step_GO, offset_GO = scales.steps()
    return (weight_GCO + offset_GO[:, None]).mul_(over(1.0, step_GO)[:, None])


def _extreme(weight_CX: Tensor) -> Tensor:
    """The entry of the largest magnitude along the first dimension, with its sign."""
    largest, smallest = weight_CX.amax(0), weight_CX.amin(0)
    return torch.where(largest > -smallest, largest, smallest)


def _take(better: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """Where the first is better, copy the new value of each pair to its old one."""
    for new, old in pairs:
        torch.where(better, new, old, out=old)


def _two_least_squares(
    square: Tensor, value_sum: Tensor, weight: Tensor, product: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """The step s and the offset o ≥ 0 that minimise Σ w·(x − s·v + o·m)², of one shape.

    Where the best o is negative, or the s that belongs to it is not positive, o is 0 and s is the
    best step alone.

    Args:
        square: Σ w·v².
        value_sum: Σ w·v·m.
        weight: Σ w·m².
        product: Σ w·x·v.
        total: Σ w·x·m.
    """
    determinant = square * weight - value_sum.square()
    step = over(weight * product - value_sum * total, determinant)
    offset = over(value_sum * product - square * total, determinant)
    without = (offset <= 0) | (step <= 0)
    step = torch.where(without, over(product, square), step)
    return step, offset.masked_fill_(without, 0)
