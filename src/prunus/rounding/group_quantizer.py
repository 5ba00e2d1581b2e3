"""Weights whose columns are rounded in groups: the values that a weight can have.

Every row is cut into spans of columns, and a span into groups. A weight of a group is

    d · code · value − dmin · minimum

with d and dmin (floats) of the span, `code` and `minimum` (small integers) of the group, and
`value`, one of the few values of the quantiser, of the weight. Quantisers without minima have
dmin = 0. Those whose spans are single groups have one code for all, and their d can have eight
bits: a power of two, or a float of four exact bits. The formats of files that store these numbers
(`prunus.formats`) derive from `GroupQuantizer` and turn them into bytes.

Shape suffixes: N spans (of all rows), G groups of a span, C columns of a group, B columns of a
span, O outputs (rows), I inputs (columns), K bytes.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from prunus.hardware.numerics import LARGEST
from prunus.rounding.output_gain import output_gains


@dataclass(frozen=True)
class GroupQuantizer(ABC):
    """The values that the weights of a linear can have, and what its columns share.

    Attributes:
        name: The name that users and records know, such as "Q4_K".
        span: The number of columns that share d and dmin.
        group: The number of columns that share a code and a minimum.
        values: The values of a weight in units of its step, ascending. `nearest` needs multiples of
            a half.
        codes: The lowest and the highest code of a group. A minimum is from 0 to the highest. If
            both are the same, spans are single groups.
        dtype: The dtype of d and dmin: one of two bytes. Of spans of one group without minima also
            torch.float8_e8m0fnu, for a d that is a power of two, or torch.float8_e4m3fn.
        columns: The order in which the columns of a weight are stored, and cut into spans; empty
            where they stay in order.
    """

    name: str
    span: int
    group: int
    values: tuple[float, ...]
    codes: tuple[float, float]
    dtype: torch.dtype = field(default=torch.float16, kw_only=True)
    columns: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def has_minimum(self) -> bool:
        """Whether a group has a minimum, which lets its values be asymmetric about 0."""
        return False

    @property
    def has_coarse_scale(self) -> bool:
        """Whether d has eight bits: so few values that the best is searched for, and then stays."""
        return self.dtype.itemsize == 1

    @property
    def unit(self) -> int:
        """The number of columns whose values are chosen together."""
        return 1

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The bytes of a span."""

    @abstractmethod
    def pack(self, spans: Spans) -> Tensor:
        """The bytes of spans, uint8 (N, K), where K is `nbytes`."""

    @abstractmethod
    def unpack(self, data_NK: Tensor) -> Spans:
        """The parts of spans of bytes, uint8 (N, K): the inverse of `pack`."""

    def nbytes_of(self, weights: int) -> int:
        """The bytes of whole spans with this number of weights."""
        return weights // self.span * self.nbytes

    @property
    def bits(self) -> float:
        """Bits per weight, with all scales."""
        return 8 * self.nbytes / self.span

    @functools.cached_property
    def largest(self) -> float:
        """A weight up to which scales are finite, and sums of squares do not leave float32."""
        extreme = max(map(abs, self.codes)) * max(map(abs, self.values))
        return min(LARGEST, torch.finfo(self.dtype).max * extreme / 2)

    @functools.cached_property
    def is_even(self) -> bool:
        """Whether the values are consecutive integers."""
        return self.values[-1] - self.values[0] + 1 == len(self.values)

    def as_scale(self, scale: Tensor) -> Tensor:
        """Numbers as d and dmin can hold them, float32."""
        return scale.to(self.dtype).float()

    def nearest(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The values nearest to some numbers, and their levels.

        A level is an index of `values`. Of two values at the same distance, even values take the
        one with the even number, and other values the upper one.

        Args:
            places: float32, the numbers in units of the step; they are overwritten.

        Returns:
            (values, levels), of the shape of `places`. Levels are integers of any dtype.
        """
        if self.is_even:
            values = self.nearest_values(places)
            return values, values - self.values[0]
        level_at, value_at = _tables(self.values, places.device)
        index = self._quarters(places)
        return _at(value_at, index), _at(level_at, index)

    def nearest_values(self, places: Tensor) -> Tensor:
        """The values of `nearest` alone, in less time; `places` are overwritten."""
        if self.is_even:
            return places.round_().clamp_(self.values[0], self.values[-1])
        return _at(_tables(self.values, places.device)[1], self._quarters(places))

    def _quarters(self, places: Tensor) -> Tensor:
        """The entries of `_tables` for some numbers, int32; `places` are overwritten."""
        # The quarter below a number is the entry that has its nearest value.
        lowest, highest = 4 * self.values[0], 4 * self.values[-1]
        return places.mul_(4).floor_().sub_(lowest).clamp_(0, highest - lowest).int()


def _at(table_X: Tensor, index: Tensor) -> Tensor:
    """The entries of a table; `table_X[index]` takes more than twice as long."""
    return table_X.index_select(0, index.flatten()).view(index.shape)


@functools.cache
def _tables(values: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The level of the value nearest to each quarter, from the lowest on, and the value itself."""
    table = torch.tensor(values, dtype=torch.float32, device=device)
    quarters = torch.arange(4 * values[0], 4 * values[-1] + 1, device=device) / 4
    # Limits between values are multiples of a quarter.
    limits = (table[1:] + table[:-1]) / 2
    level_at = torch.bucketize(quarters, limits, right=True).int()
    return level_at, table[level_at]


class Spans(NamedTuple):
    """Spans of rounded weights in parts.

    Attributes:
        d_N: float32, the scale of the codes, exact in the quantiser's dtype.
        dmin_N: float32, the scale of the minima, exact in the quantiser's dtype; zeros where the
            quantiser has no minima.
        codes_NG: float32, integers: the code of each group.
        minima_NG: float32, integers: the minimum of each group; zeros where there are none.
        levels_NB: uint8, indices of `GroupQuantizer.values`, one for each column.
    """

    d_N: Tensor
    dmin_N: Tensor
    codes_NG: Tensor
    minima_NG: Tensor
    levels_NB: Tensor

    def dense(self, quantizer: GroupQuantizer) -> Tensor:
        """The weights, float32 (N, B), in the order of operations of ggml."""
        if quantizer.is_even:
            weight_NB = self.levels_NB.float().add_(quantizer.values[0])
        else:
            values = torch.tensor(
                quantizer.values, dtype=torch.float32, device=self.levels_NB.device
            )
            weight_NB = _at(values, self.levels_NB.int())
        weight_NGC = weight_NB.unflatten(1, (-1, quantizer.group))
        weight_NGC *= (self.d_N[:, None] * self.codes_NG)[:, :, None]
        if quantizer.has_minimum:
            weight_NGC -= (self.dmin_N[:, None] * self.minima_NG)[:, :, None]
        return weight_NB


class GroupedWeight(NamedTuple):
    """A weight that was rounded in groups, as the bytes that a file stores.

    Attributes:
        quantizer: How bytes become weights.
        data_OB: uint8 (O, bytes of a row): the bytes of the row's spans, in the order of the
            quantiser's columns.
    """

    quantizer: GroupQuantizer
    data_OB: Tensor

    @property
    def bits(self) -> float:
        """Bits per weight, with all scales."""
        return self.quantizer.bits

    def dense(self) -> Tensor:
        """The weight, float32 (O, I), with the columns in order."""
        rows, order = len(self.data_OB), list(self.quantizer.columns)
        spans = self.quantizer.unpack(self.data_OB.reshape(-1, self.quantizer.nbytes))
        weight_OI = spans.dense(self.quantizer).view(rows, -1)
        return weight_OI[:, torch.tensor(order).argsort()] if order else weight_OI


class Scales(NamedTuple):
    """The scales of one span of all rows; see `Spans` for dtypes and values.

    Attributes:
        d_O: The scale of the codes.
        dmin_O: The scale of the minima.
        codes_GO: The code of each group.
        minima_GO: The minimum of each group.
    """

    d_O: Tensor
    dmin_O: Tensor
    codes_GO: Tensor
    minima_GO: Tensor

    def steps(self) -> tuple[Tensor, Tensor]:
        """(step, offset) of each group, float32 (G, O): a weight is step · value − offset."""
        return self.d_O * self.codes_GO, self.dmin_O * self.minima_GO


def join_spans(
    scales: list[Scales],
    levels_IO: Tensor,
    quantizer: GroupQuantizer,
    weight_OI: Tensor,
    weighted_OI: Tensor,
) -> GroupedWeight:
    """The weight of spans with their scales, times the gains of its rows; see `spans_with_gains`.

    Args:
        scales: The scales of the spans, from the left of a row to the right.
        levels_IO, quantizer, weight_OI, weighted_OI: As for `spans_with_gains`.
    """
    stacked = Scales(*(torch.stack(parts) for parts in zip(*scales, strict=True)))
    spans = spans_with_gains(stacked, levels_IO, quantizer, weight_OI, weighted_OI)
    return GroupedWeight(quantizer, quantizer.pack(spans).view(len(weight_OI), -1))


def spans_with_gains(
    scales: Scales,
    levels_IO: Tensor,
    quantizer: GroupQuantizer,
    weight_OI: Tensor,
    weighted_OI: Tensor,
) -> Spans:
    """The spans of all rows, row by row, times the gains of the rows; see `output_gain`.

    Scales of eight bits stay as they are.

    Args:
        scales: The scales of all spans of a row; the first dimension of each tensor is that of the
            spans, from the left of a row to the right.
        levels_IO: Indices of `GroupQuantizer.values`, uint8 (I, O), in the order of columns.
        quantizer: The quantiser of scales and levels.
        weight_OI: float32, the weight before it was rounded, with its columns as they are stored.
        weighted_OI: As for `output_gains`, with its columns as they are stored.
    """
    d_NO, dmin_NO, codes_NGO, minima_NGO = scales
    spans = Spans(
        d_NO.T.flatten(),
        dmin_NO.T.flatten(),
        codes_NGO.permute(2, 0, 1).flatten(0, 1),
        minima_NGO.permute(2, 0, 1).flatten(0, 1),
        levels_IO.T.reshape(-1, quantizer.span),
    )
    if quantizer.has_coarse_scale:
        return spans
    rounded_OI = spans.dense(quantizer).view(weight_OI.shape)
    gain_N = output_gains(weight_OI, rounded_OI, weighted_OI).repeat_interleave(len(d_NO))
    d_N, dmin_N = (quantizer.as_scale(scale_N * gain_N) for scale_N in spans[:2])
    return spans._replace(d_N=d_N, dmin_N=dmin_N)


def for_rows(importance_B: Tensor, weight_BO: Tensor) -> Tensor:
    """The importances of columns, as they are multiplied with weights: (B, 1) or (B, O).

    Args:
        importance_B: One importance of each column (B,), or (B, S) for S runs of as many rows each.
        weight_BO: The weights.

    >>> from torch import ones, tensor
    >>> for_rows(tensor([[1.0, 2.0]]), ones(1, 4))
    tensor([[1., 1., 2., 2.]])
    """
    importance_BS = importance_B.view(len(weight_BO), -1)
    runs, rows = importance_BS.shape[1], weight_BO.shape[1]
    return importance_BS if runs == 1 else importance_BS.repeat_interleave(rows // runs, dim=1)


def check_range(weight: Tensor, quantizer: GroupQuantizer) -> None:
    """Check that a quantiser reaches all numbers of a weight.

    Raises:
        ValueError: It does not.
    """
    if bool((weight.abs() > quantizer.largest).any()):
        raise ValueError(
            f"its weights are too large for {quantizer.name}, which reaches "
            f"{quantizer.largest:.1e}. Is the checkpoint whole? `ignore` keeps a linear as it is, "
            "and `head_bits` none the head"
        )


def over(upper: Tensor | float, lower: Tensor) -> Tensor:
    """The quotient, and 0 where it is not finite."""
    return (upper / lower).nan_to_num_(0, 0, 0)
