"""The grids that prunus can write: the values that a weight may have, and the bytes of a span.

The types of GGUF cut every row into spans of 32 or 256 columns, and a span into groups of 16 or 32.
A weight of a group is

    d · code · value − dmin · minimum

with d and dmin (float16) of the span, `code` and `minimum` (small integers) of the group, and
`value`, one of the few values of the grid, of the weight. Types without minima have dmin = 0. Those
of spans of 32 have a single group of code 1.

Each part of a span is stored in one or two fields. A field holds some bits of every integer: in
runs of `width` bytes, byte l has the integers l, width + l, 2·width + l, … of its run, from its
low to its high bits. The layouts are those of ggml (github.com/ggml-org/ggml, ggml-common.h).

Shape suffixes: N spans (of all rows), G groups of a span, C columns of a group, B columns of a span
or its integers, K bytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Field(NamedTuple):
    """Bits of all integers of a part, which is "levels", "codes" (with the minima after them), or a
    float16: "d", "dmin", or "-dmin". An integer has `bits` of its bits here, from `shift` on.
    """

    part: str
    bits: int = 16
    width: int = 1
    shift: int = 0


@dataclass(frozen=True)
class Grid:
    """A type of GGUF, or another grid of the same kind.

    >>> grid = GRIDS["Q3_K"]
    >>> grid.span, grid.nbytes, grid.bits
    (256, 110, 3.4375)
    """

    name: str
    type_id: int  #: its number in ggml; -1 for a grid that GGUF does not have
    span: int  #: the columns that share d
    group: int  #: the columns that share a code
    values: tuple[int, ...]  #: of a weight in units of its step, ascending
    codes: tuple[int, int]  #: the lowest and highest of a group; a minimum is from 0 to the highest
    layout: tuple[Field, ...]  #: the fields of a span, in their order in the file
    dtype: torch.dtype = torch.float16  #: of d and dmin, two bytes each

    @functools.cached_property
    def has_minimum(self) -> bool:
        """Whether a group has a minimum."""
        return any(field.part in ("dmin", "-dmin") for field in self.layout)

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """The integers of each part of a span."""
        return {"levels": self.span, "codes": self.span // self.group * (1 + self.has_minimum)}

    @functools.cached_property
    def nbytes(self) -> int:
        """The bytes of a span."""
        return sum(self.counts.get(field.part, 1) * field.bits // 8 for field in self.layout)

    def nbytes_of(self, weights: int) -> int:
        """The bytes of whole spans."""
        return weights // self.span * self.nbytes

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.span

    @functools.cached_property
    def largest(self) -> float:
        """A weight up to which scales are finite, and sums of squares do not leave float32."""
        extreme = max(map(abs, self.codes)) * max(map(abs, self.values))
        return min(1e15, torch.finfo(self.dtype).max * extreme / 2)

    @functools.cached_property
    def is_even(self) -> bool:
        """Whether the values are consecutive integers."""
        return self.values[-1] - self.values[0] + 1 == len(self.values)

    def stored(self, scale: Tensor) -> Tensor:
        """Numbers as d and dmin can hold them, float32."""
        return scale.to(self.dtype).float()

    def nearest(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The values nearest to `places`, float32, and their levels; writes over `places`."""
        lowest, highest = self.values[0], self.values[-1]
        if self.is_even:
            places.round_().clamp_(lowest, highest)
            return places, places - lowest
        values, level_at = _tables(self.values, places.device)
        index = places.mul_(2).floor_().sub_(2 * lowest).clamp_(0, len(level_at) - 1).int()
        levels = level_at[index]
        return values[levels], levels


@functools.cache
def _tables(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The values, float32, and the level of the value nearest to each half, from the lowest on."""
    table = torch.tensor(values, dtype=torch.float32, device=device)
    halves = torch.arange(2 * values[0], 2 * values[-1] + 1, device=device) / 2
    # Limits between values are multiples of a half.
    limits = (table[1:] + table[:-1]) / 2
    return table, torch.bucketize(halves, limits, right=True).int()


def _integers(bits: int) -> tuple[int, ...]:
    return tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


_levels, _codes = functools.partial(Field, "levels"), functools.partial(Field, "codes")
_D, _DMIN, _ONE = Field("d"), Field("dmin"), (1, 1)
_FIFTH_BIT, _NIBBLES, _SIX_BITS = _levels(1, 1, 4), _levels(4, 16), _codes(6, 12)
_Q3_K = (_levels(1, 32, 2), _levels(2, 32), _codes(4, 8), _codes(2, 4, 4), _D)
_Q5_K = (_D, _DMIN, _SIX_BITS, _levels(1, 32, 4), _levels(4, 32))
_Q6_K = (_levels(4, 64), _levels(2, 32, 4), _codes(8, 16), _D)
_IQ4_XS = (_D, _codes(2, 1, 4), _codes(4, 1), _NIBBLES)
_GRIDS = (
    Grid("Q4_0", 2, 32, 32, _integers(4), _ONE, (_D, _NIBBLES)),
    Grid("Q4_1", 3, 32, 32, tuple(range(16)), _ONE, (_D, Field("-dmin"), _NIBBLES)),
    Grid("Q5_0", 6, 32, 32, _integers(5), _ONE, (_D, _FIFTH_BIT, _NIBBLES)),
    Grid("Q5_1", 7, 32, 32, tuple(range(32)), _ONE, (_D, Field("-dmin"), _FIFTH_BIT, _NIBBLES)),
    Grid("Q8_0", 8, 32, 32, tuple(range(-127, 128)), _ONE, (_D, _levels(8, 32))),
    Grid("Q2_K", 10, 256, 16, (0, 1, 2, 3), (0, 15), (_codes(4, 16), _levels(2, 32), _D, _DMIN)),
    Grid("Q3_K", 11, 256, 16, _integers(3), (-32, 31), _Q3_K),
    Grid("Q4_K", 12, 256, 32, tuple(range(16)), (0, 63), (_D, _DMIN, _SIX_BITS, _levels(4, 32))),
    Grid("Q5_K", 13, 256, 32, tuple(range(32)), (0, 63), _Q5_K),
    Grid("Q6_K", 14, 256, 16, _integers(6), (-128, 127), _Q6_K),
    Grid("IQ4_NL", 20, 32, 32, _IQ4, _ONE, (_D, _NIBBLES)),
    Grid("IQ4_XS", 23, 256, 32, _IQ4, (-32, 31), _IQ4_XS),
)

#: Name of a type -> its grid.
GRIDS: dict[str, Grid] = {grid.name: grid for grid in _GRIDS}


def integer_grid(bits: int, span: int, dtype: torch.dtype) -> Grid:
    """The integers of 4 or 8 bits with a scale for each span, and nothing else.

    >>> integer_grid(4, 128, torch.bfloat16).bits
    4.125
    """
    layout = (_D, _levels(bits, 1))
    return Grid(f"W{bits}A16", -1, span, span, _integers(bits), _ONE, layout, dtype)


class Spans(NamedTuple):
    """Spans of a grid in parts.

    Attributes:
        d_N, dmin_N: float32, exact in the grid's dtype; zeros for a grid without minima.
        codes_NG, minima_NG: float32, integers; zeros for a grid without minima.
        levels_NB: uint8, indices of `Grid.values`.
    """

    d_N: Tensor
    dmin_N: Tensor
    codes_NG: Tensor
    minima_NG: Tensor
    levels_NB: Tensor

    def dense(self, grid: Grid) -> Tensor:
        """The weights, float32 (N, B), in the order of operations of ggml."""
        if grid.is_even:
            weight_NB = self.levels_NB.float().add_(grid.values[0])
        else:
            weight_NB = _tables(grid.values, self.levels_NB.device)[0][self.levels_NB.int()]
        weight_NGC = weight_NB.unflatten(1, (-1, grid.group))
        weight_NGC *= (self.d_N[:, None] * self.codes_NG)[:, :, None]
        if grid.has_minimum:
            weight_NGC -= (self.dmin_N[:, None] * self.minima_NG)[:, :, None]
        return weight_NB


def pack(spans: Spans, grid: Grid) -> Tensor:
    """The bytes of spans, uint8 (N, K)."""
    codes_NG = (spans.codes_NG - grid.codes[0]).to(torch.uint8)
    if grid.has_minimum:
        codes_NG = torch.cat([codes_NG, spans.minima_NG.to(torch.uint8)], dim=1)
    integers = {
        "levels": spans.levels_NB + _zero_point(grid.values),
        "codes": codes_NG + _zero_point(grid.codes),
    }
    floats = {"d": spans.d_N, "dmin": spans.dmin_N, "-dmin": -spans.dmin_N}
    return torch.cat(
        [
            _field(integers[part] >> shift, bits, width)
            if part in integers
            else floats[part].to(grid.dtype)[:, None].view(torch.uint8)
            for part, bits, width, shift in grid.layout
        ],
        dim=1,
    )


def unpack(data_NK: Tensor, grid: Grid) -> Spans:
    """The parts of spans of bytes: the inverse of `pack`."""
    integers = {part: data_NK.new_zeros(len(data_NK), size) for part, size in grid.counts.items()}
    floats = {"dmin": torch.zeros(len(data_NK), device=data_NK.device)}
    start = 0
    for part, bits, width, shift in grid.layout:
        stop = start + grid.counts.get(part, 1) * bits // 8
        field_NK = data_NK[:, start:stop].contiguous()
        start = stop
        if part in integers:
            integers[part] |= _from_field(field_NK, bits, width) << shift
        else:
            number_N = field_NK.view(grid.dtype)[:, 0].float()
            floats[part.removeprefix("-")] = -number_N if part.startswith("-") else number_N
    codes_NG, minima_NG = integers["codes"].tensor_split((grid.span // grid.group,), dim=1)
    codes_NG = (codes_NG - _zero_point(grid.codes)).float() + grid.codes[0]
    if grid.has_minimum:
        minima_NG = minima_NG.float() + (grid.codes == _ONE)
    else:
        minima_NG = torch.zeros_like(codes_NG)
    levels_NB = integers["levels"] - _zero_point(grid.values)
    return Spans(floats["d"], floats["dmin"], codes_NG, minima_NG, levels_NB)


def _zero_point(numbers: tuple[int, ...]) -> int:
    """What turns an integer counted from the lowest on into the stored one, modulo 256.

    Integers of eight bits are stored in two's complement, all others as they are.
    """
    return numbers[0] % 256 if numbers[-1] == 127 else 0


def _field(integers_NB: Tensor, bits: int, width: int) -> Tensor:
    """The low `bits` bits of integers, uint8 (N, K); see the top of this file."""
    if bits == 6:
        # Q4_K and Q5_K store 8 codes and 8 minima in 12 bytes. The first four of each are the low
        # bits of 8 bytes. Of the others the two high bits are above them, the low bits in 4 bytes.
        first_NB, last_NB = _halves(integers_NB)
        return torch.cat([first_NB | last_NB >> 4 << 6, _field(last_NB, 4, 4)], dim=1)
    runs = (integers_NB & (2**bits - 1)).unflatten(1, (-1, 8 // bits, width))
    packed = runs[:, :, 0].clone()
    for place in range(1, 8 // bits):
        packed |= runs[:, :, place] << bits * place
    return packed.flatten(1)


def _from_field(field_NK: Tensor, bits: int, width: int) -> Tensor:
    """The integers of a field, uint8 (N, B): the inverse of `_field`."""
    if bits == 6:
        first_NK, low_NK = field_NK.tensor_split((8,), dim=1)
        last_NB = _from_field(low_NK, 4, 4) | first_NK >> 6 << 4
        return torch.cat(_halves(torch.cat([first_NK & 63, last_NB], dim=1)), dim=1)
    runs = field_NK.unflatten(1, (-1, width))
    parts = [runs >> place & (2**bits - 1) for place in range(0, 8, bits)]
    return torch.stack(parts, dim=2).flatten(1)


def _halves(codes_NB: Tensor) -> tuple[Tensor, Tensor]:
    """From (a, b, c, d) to (a, c) and (b, d), each four wide; also its own inverse."""
    quarters = codes_NB.split(4, dim=1)
    return torch.cat(quarters[::2], dim=1), torch.cat(quarters[1::2], dim=1)
