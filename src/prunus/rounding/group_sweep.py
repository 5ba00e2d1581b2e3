"""Round columns in groups, such as a type of GGUF has, with feedback or without.

Without feedback each weight is rounded by itself (`group_fits.round_to_nearest`). The feedback is
the OBS sweep of `solvers/obs.py`.

The scales of a span are fitted when the sweep reaches it, to the weights as corrected so far, and
the code of a group once more when the sweep reaches the group. Then the columns are rounded one
after the other, and all later columns correct the error of each. The error that a column adds is
e² / U_jj², so 1 / U_jj² is its importance in the fit.

Columns of a codebook are chosen several at a time: they are a unit of the sweep. If T is the
triangle of U that belongs to a unit, its errors e add |e T⁻¹|². The diagonal of this form weighs
the columns of the unit, also in the fit of scales.

At last every row gets the factor that keeps the length of its outputs; see `output_gain`.

U belongs to a Gram matrix whose entries next to the diagonal are halved. The correlations of a few
thousand tokens are noisy, most of all in wide linears. With half of them the sweep corrects less,
and the error on other tokens is smaller there. Along its largest eigenvectors the noise is small
against what there is, so they stay whole.

Shape suffixes: O outputs (rows), I inputs (columns), S spans of a row, B columns of a span,
G groups of a span, C columns of a group. In `_order`, S counts runs of columns of any width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from prunus.hardware.numerics import low_precision_product
from prunus.methods.solvers.obs import TILE, inverse_factor, ordered_factor, sweep_columns
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import Pruned, RoundedRows, RowShard, Work
from prunus.rounding.group_fits import fit_scales, round_to_nearest, span_fit
from prunus.rounding.group_quantizer import GroupedWeight, GroupQuantizer, Scales, join_spans

#: λ, a share of the mean diagonal of the Gram matrix, if an option does not choose it.
DAMPING = 0.1
# The share of the correlations between inputs that the sweep uses, and the number of eigenvectors
# along which it uses all.
_CORRELATIONS, _LEADING = 0.5, 64
# Columns whose corrections of everything after them are one matrix product.
_BLOCK = 256
# Rows of one sweep for each thread of a processor: a span of as many stays in its caches.
_ROWS = 4096


class GroupRounding(NamedTuple):
    """How one linear is rounded in groups: what `Work.rounding` holds in a run of compress.

    Attributes:
        quantizer: The values and scales to choose from.
        importance_I: float32, weighs the squared error of each column in the fit of the scales, and
            each weight is rounded by itself. None rounds with feedback.
    """

    quantizer: GroupQuantizer
    importance_I: Tensor | None = None


def round_weight(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """Round a weight in the groups of the quantiser of `work.rounding`.

    Args:
        weight_OI: float32; its rows consist of whole spans.
        statistics: With a Gram matrix. Without feedback it may be empty.
        work: Its rounding is a `GroupRounding`. Its `damping` is a share of the mean diagonal of
            the Gram matrix; None means `DAMPING`.

    Returns:
        The dense weight, the mask of its non-zero weights, and the rounded weight.

    Raises:
        ValueError: The Gram matrix is not finite.
    """
    notes = dict[str, float]()
    assert isinstance(work.rounding, GroupRounding)
    quantizer, importance_I = work.rounding
    if importance_I is not None:
        round_rows = partial(round_to_nearest, quantizer=quantizer, importance_I=importance_I)
    else:
        gram_II = statistics.gram_II
        assert gram_II is not None
        stored_I = torch.tensor(
            quantizer.columns or range(weight_OI.shape[1]), device=weight_OI.device
        )
        damping = DAMPING if work.options.damping is None else work.options.damping
        order = (
            (quantizer.span, quantizer.group, quantizer.unit, quantizer.columns),
            lambda squares_I: stored_I[_order(squares_I[stored_I], quantizer)],
        )
        order_I, upper_II, notes = ordered_factor(
            statistics, damping, order, _CORRELATIONS, _LEADING
        )
        round_rows = partial(
            _round_with_feedback,
            quantizer=quantizer,
            gram_II=gram_II,
            stored_I=stored_I,
            order_I=stored_I.argsort()[order_I],
            upper_II=upper_II,
        )

    def solve(shard: RowShard) -> RoundedRows:
        rows_OI = weight_OI[shard.rows]
        runs = round(len(rows_OI) / (_ROWS * torch.get_num_threads())) if rows_OI.is_cpu else 1
        # Whole vectors of every instruction set, so that a row has the same bits in any run.
        size = -(-len(rows_OI) // (64 * max(1, runs))) * 64
        data_OB = torch.cat([round_rows(run_OI).data_OB for run_OI in rows_OI.split(size)])
        # Processes exchange the bytes, which are all that there is to know.
        return RoundedRows(data_OB, dict(notes))

    solved = work.rows.solve(len(weight_OI), 1, solve)
    rounded = GroupedWeight(quantizer, solved.data_OB)
    dense_OI = rounded.dense()
    return Pruned(dense_OI, dense_OI != 0, solved.notes, rounded)


def relative_steps(statistics: InputStatistics, damping: float | None) -> Tensor:
    """U_jj, float32 (I,), with the largest input norms first in the sweep.

    An error e in column j of the sweep adds e² / U_jj² to the output error, up to a factor that is
    the same for all columns of a linear.

    Args:
        statistics: With a Gram matrix.
        damping: λ; None means `DAMPING`.

    Raises:
        ValueError: The Gram matrix cannot be inverted, see `obs.inverse_factor`.
    """
    gram_II, damping = statistics.gram_II, DAMPING if damping is None else damping
    assert gram_II is not None, "steps need a Gram matrix"
    order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    steps_I, _ = inverse_factor(gram_II[order_I][:, order_I], damping, diagonal=True)
    return torch.empty_like(steps_I).index_copy_(0, order_I, steps_I)


def _order(squares_I: Tensor, quantizer: GroupQuantizer) -> Tensor:
    """Inputs with large norms first: spans, groups within a span, and columns within a group."""
    order_I = torch.arange(len(squares_I), device=squares_I.device)
    for width in (quantizer.unit, quantizer.group, quantizer.span):
        # The rank of each run of this width, 0 for the largest norm. A stable sort by the rank
        # leaves the order within a run as the narrower widths have made it.
        rank_S = squares_I.view(-1, width).sum(1).argsort(descending=True, stable=True).argsort()
        order_I = order_I[rank_S.repeat_interleave(width)[order_I].argsort(stable=True)]
    return order_I


def _round_with_feedback(
    weight_OI: Tensor,
    quantizer: GroupQuantizer,
    gram_II: Tensor,
    stored_I: Tensor,
    order_I: Tensor,
    upper_II: Tensor,
) -> GroupedWeight:
    """Sweep over the columns of some rows, and make their outputs unbiased; see `output_gain`.

    Args:
        weight_OI: float32, the weights of these rows.
        quantizer: The values and scales to choose from.
        gram_II: The Gram matrix of the inputs.
        stored_I: int64, the columns in the order in which they are stored.
        order_I: int64, places in `stored_I`, in the order of the sweep.
        upper_II: U, in the order of the sweep.
    """
    weighted_OI = low_precision_product(weight_OI, gram_II)[:, stored_I]
    weight_OI = weight_OI[:, stored_I]
    scales, levels_IO = _Sweep(weight_OI, order_I, upper_II, quantizer).run()
    return join_spans(scales, levels_IO, quantizer, weight_OI, weighted_OI)


class _Sweep:
    """The sweep over the columns of some rows.

    Args:
        weight_OI: float32, the weights of these rows.
        order_I: int64, the columns in the order of the sweep; spans and groups stay together.
        upper_II: U, in the order of the sweep.
        quantizer: The values and scales to choose from.

    Attributes:
        order: `order_I` as a list.
        weight_IO: The weight in the order of the sweep, as corrected so far. In the transposed
            weight a column is contiguous.
        importance_I: What a squared error costs, see `_importances`.
        inverses: 1 / U_jj.
        scales: Number of a span in the row -> its scales.
        levels_IO: The levels in the order in which they are stored.
        group: The scales of the group that the sweep is in.
        step_O: Its step.
        inverse_O: 1 / step.
        offset_O: Its offset.
        value_UO: The values of the unit that the sweep is in, in steps.
    """

    def __init__(
        self, weight_OI: Tensor, order_I: Tensor, upper_II: Tensor, quantizer: GroupQuantizer
    ) -> None:
        self.quantizer, self.order_I, self.upper_II = quantizer, order_I, upper_II
        self.order: list[int] = order_I.tolist()
        self.weight_IO = weight_OI.T[order_I]
        self.importance_I = _importances(upper_II, quantizer.unit)
        self.inverses: list[float] = upper_II.diagonal().reciprocal().tolist()
        self.scales: dict[int, Scales] = {}
        self.levels_IO = torch.empty(
            self.weight_IO.shape, dtype=torch.uint8, device=weight_OI.device
        )

    def run(self) -> tuple[list[Scales], Tensor]:
        """Round all columns. Returns the scales of each span, and the levels (I, O)."""
        # All weights of a span must be corrected when its scales are fitted, so it is a block, or a
        # tile of a block. A group of a larger span consists of whole tiles.
        tile = self.quantizer.span if self.quantizer.span < _BLOCK else TILE
        sweep_columns(self.weight_IO, self.upper_II, _BLOCK, tile, self._round_column)
        return [self.scales[span] for span in range(len(self.scales))], self.levels_IO

    def _round_column(self, j: int, error_O: Tensor) -> None:
        """Round column j and write its error divided by U_jj; see `sweep_columns`."""
        if j % self.quantizer.span == 0:
            self._fit_span(j)
        if j % self.quantizer.group == 0:
            self._begin_group(j)
        if j % self.quantizer.unit == 0:
            self._round_unit(j)
        value_O = self.value_UO[j % self.quantizer.unit] * self.step_O
        torch.sub(self.weight_IO[j], value_O.sub_(self.offset_O), out=error_O)
        error_O.mul_(self.inverses[j])

    def _fit_span(self, j: int) -> None:
        """Choose the scales of the span that begins at column j of the sweep."""
        columns = slice(j, j + self.quantizer.span)
        # The fit expects the columns of the span from the left to the right.
        natural_B = self.order_I[columns].argsort()
        self.scales[self.order[j] // self.quantizer.span] = fit_scales(
            self.weight_IO[columns][natural_B],
            self.importance_I[columns][natural_B],
            self.quantizer,
        )

    def _begin_group(self, j: int) -> None:
        """Decide the scales of the group that begins at column j of the sweep."""
        span, column = divmod(self.order[j], self.quantizer.span)
        group = column // self.quantizer.group
        d_O, dmin_O, codes_GO, minima_GO = self.scales[span]
        self.group = Scales(d_O, dmin_O, codes_GO[group, None], minima_GO[group, None])
        if self.quantizer.span != self.quantizer.group:
            # The columns of the span so far have corrected this group since.
            columns = slice(j, j + self.quantizer.group)
            self.group = span_fit(
                self.weight_IO[columns], self.importance_I[columns], self.quantizer
            ).best_codes(self.group)
            codes_GO[group], minima_GO[group] = self.group.codes_GO[0], self.group.minima_GO[0]
        (self.step_O,), (self.offset_O,) = self.group.steps()
        self.inverse_O = self.step_O.reciprocal().nan_to_num_(0, 0, 0)

    def _round_unit(self, j: int) -> None:
        """Choose the values of the columns from j on that are rounded together."""
        columns = slice(j, j + self.quantizer.unit)
        if self.quantizer.unit == 1:
            steps_UO = (self.weight_IO[columns] + self.offset_O).mul_(self.inverse_O)
            self.value_UO, level_UO = self.quantizer.nearest(steps_UO)
        else:
            self.value_UO, level_UO = span_fit(
                self.weight_IO[columns], self.importance_I[columns], self.quantizer
            ).nearest(self.group)
        self.levels_IO[self.order[j] : self.order[j] + self.quantizer.unit] = level_UO


def _importances(upper_II: Tensor, unit: int) -> Tensor:
    """What a squared error in each column costs, float32 (I,), when later units have corrected it.

    The error e of a unit with the triangle T of U costs |e T⁻¹|². This is the diagonal.
    """
    blocks_NUU = upper_II.unfold(0, unit, unit).unfold(1, unit, unit).diagonal().permute(2, 0, 1)
    identity_UU = torch.eye(unit, device=upper_II.device).expand_as(blocks_NUU)
    return (
        torch.linalg.solve_triangular(blocks_NUU, identity_UU, upper=True).square().sum(2).view(-1)
    )
