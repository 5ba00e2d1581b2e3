"""The bytes of rounded columns: every part of a span is stored in one or two fields.

A field holds some bits of every integer of a part: in runs of `width` bytes, byte l has the
integers l, width + l, 2·width + l, … of its run, from its low to its high bits. A field of width 0
is a stream of bits: the integers follow each other from low to high bits, across bytes. The types
of GGUF, the integers of compressed-tensors and those of MLX are described by such fields.

The order of this file: what describes a layout (`Field`, `BlockType`, which packs and unpacks
spans), then the bits of one field.

Shape suffixes: N spans (of all rows), G groups of a span, B columns of a span or its integers, K
bytes, W words of eight integers. In whole rows, O outputs (rows), S spans of a row, B bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from prunus.model.checkpoint.quantized import FP4_BY_CODE, from_stream
from prunus.rounding.group_quantizer import GroupQuantizer, Spans


class Field(NamedTuple):
    """Some bits of all integers of a part of a span, or one of its floats.

    Attributes:
        part: "levels"; "codes", which have the minima after them; or a float, which is "d", "dmin",
            or "-dmin" where the file has it with the other sign.
        bits: The number of bits of each integer that are here; those of its dtype for a float.
        width: The bytes of a run, or 0; see the top of this file. A float ignores it.
        shift: The number of the lowest of these bits in the integer, from 0. A float ignores it.
    """

    part: str
    bits: int = 16
    width: int = 1
    shift: int = 0


@dataclass(frozen=True)
class BlockType(GroupQuantizer):
    """A quantiser whose spans are stored as fields of bits.

    Attributes:
        layout: The fields of a span, in their order in the file.
        order: The integer that stands for each level; empty where integers rise with the values.
    """

    layout: tuple[Field, ...]
    order: tuple[int, ...] = field(default=(), kw_only=True)

    @functools.cached_property
    def has_minimum(self) -> bool:
        """Whether a group has a minimum: whether the layout has a dmin."""
        return any(field.part in ("dmin", "-dmin") for field in self.layout)

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Part -> the number of its integers in a span; "codes" include the minima."""
        per_group = 2 if self.has_minimum else 1
        return {"levels": self.span, "codes": self.span // self.group * per_group}

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The bytes of each field of a span."""
        return [self.counts.get(field.part, 1) * field.bits // 8 for field in self.layout]

    @functools.cached_property
    def nbytes(self) -> int:
        """The bytes of a span: those of its fields."""
        return sum(self.sizes)

    def separate(self, data_OB: Tensor) -> list[Tensor]:
        """The fields of rows, each with all spans: floats (O, S), and integers as uint8 (O, K).

        Args:
            data_OB: uint8, rows of S whole spans.
        """
        fields = data_OB.unflatten(1, (-1, self.nbytes)).split(self.sizes, dim=2)
        return [
            # A copy begins at a multiple of four bytes, which views as wider integers ask for.
            x.flatten(1)
            .clone(memory_format=torch.contiguous_format)
            .view(torch.uint8 if field.part in self.counts else self.dtype)
            for field, x in zip(self.layout, fields, strict=True)
        ]

    def pack(self, spans: Spans) -> Tensor:
        """The bytes of spans, uint8 (N, K): their fields, one after the other.

        Args:
            spans: Spans whose numbers the fields can hold. d and dmin are rounded to the dtype.
        """
        codes_NG = (spans.codes_NG - self.codes[0]).to(torch.uint8)
        if self.has_minimum:
            codes_NG = torch.cat([codes_NG, spans.minima_NG.to(torch.uint8)], dim=1)
        levels_NB = spans.levels_NB + self.zero_point(self.values)
        if self.order:
            levels_NB = levels_NB.new_tensor(self.order)[levels_NB.int()]
        integers = {
            "levels": levels_NB,
            "codes": codes_NG + self.zero_point(self.codes),
        }
        floats = {"d": spans.d_N, "dmin": spans.dmin_N, "-dmin": -spans.dmin_N}
        return torch.cat(
            [
                _field(integers[part] >> shift, bits, width)
                if part in integers
                else floats[part].to(self.dtype)[:, None].view(torch.uint8)
                for part, bits, width, shift in self.layout
            ],
            dim=1,
        )

    def unpack(self, data_NK: Tensor) -> Spans:
        """The parts of spans of bytes, uint8 (N, K): the inverse of `pack`."""
        integers = {
            part: data_NK.new_zeros(len(data_NK), size) for part, size in self.counts.items()
        }
        floats = {"dmin": torch.zeros(len(data_NK), device=data_NK.device)}
        for (part, bits, width, shift), field_NK in zip(
            self.layout, self.separate(data_NK), strict=True
        ):
            if part in integers:
                integers[part] |= _from_field(field_NK, bits, width) << shift
            else:
                number_N = field_NK[:, 0].float()
                floats[part.removeprefix("-")] = -number_N if part.startswith("-") else number_N
        codes_NG, minima_NG = integers["codes"].tensor_split((self.span // self.group,), dim=1)
        codes_NG = (codes_NG - self.zero_point(self.codes)).float() + self.codes[0]
        if self.has_minimum:
            # A span of one group stores neither code nor minimum: both are 1.
            minima_NG = minima_NG.float() + (1 if self.codes == ONE else 0)
        else:
            minima_NG = torch.zeros_like(codes_NG)
        levels_NB = integers["levels"] - self.zero_point(self.values)
        if self.order:
            levels_NB = levels_NB.new_tensor(self.order).argsort()[levels_NB.int()].byte()
        return Spans(floats["d"], floats["dmin"], codes_NG, minima_NG, levels_NB)

    def zero_point(self, numbers: tuple[float, ...]) -> int:
        """What turns an integer counted from the lowest on into the stored one, modulo 256.

        Integers of eight bits are stored in two's complement, all others as they are.

        Args:
            numbers: `values` or `codes`: from the lowest to the highest integer.
        """
        return int(numbers[0]) % 256 if numbers[-1] == 127 else 0


#: The codes of a quantiser whose spans are single groups.
ONE = (1, 1)
#: The integer of each value of FP4, rising: the sign is its highest bit.
FP4_ORDER = (*range(15, 7, -1), *range(8))
#: The values of FP4 (e2m1: a sign, two bits of an exponent, one of a mantissa). Both zeros have a
#: level, and the sum makes both positive, so that no dense weight is a negative zero.
FP4 = tuple(FP4_BY_CODE[code] + 0 for code in FP4_ORDER)


def integers(bits: int) -> tuple[int, ...]:
    """All integers of this number of bits in two's complement, rising.

    >>> integers(2)
    (-2, -1, 0, 1)
    """
    return tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def scaled(
    data_OB: Tensor, bits: int, scale_OS: Tensor, bias_OS: Tensor, values: Sequence[float] = ()
) -> Tensor:
    """Weights scale · integer + bias of a stream of bits, float32 (O, I).

    Args:
        data_OB: uint8, the integers of each row, from 0 on; see the top of this file.
        bits: The bits of an integer, at most 8.
        scale_OS: The scales of the groups of each row, in any float dtype.
        bias_OS: Their biases.
        values: The number that each integer stands for; empty if it stands for itself.
    """
    numbers_OI = from_stream(data_OB, bits)
    if values:
        numbers_OI = scale_OS.new_tensor(values, dtype=torch.float32)[numbers_OI.int()]
    integers_OSC = numbers_OI.float().unflatten(1, (scale_OS.shape[1], -1))
    return integers_OSC.mul_(scale_OS[..., None]).add_(bias_OS[..., None]).flatten(1)


def _field(integers_NB: Tensor, bits: int, width: int) -> Tensor:
    """The low `bits` bits of integers, uint8 (N, K); see the top of this file."""
    if width == 0:
        # Eight integers fill as many whole bytes as each has bits, the low ones of a word.
        eights = enumerate(integers_NB.unflatten(1, (-1, 8)).unbind(2))
        words_NW = functools.reduce(torch.bitwise_or, (x.long() << bits * i for i, x in eights))
        return words_NW[..., None].view(torch.uint8)[..., :bits].flatten(1)
    if bits == 6:
        # Q4_K and Q5_K store 8 codes and 8 minima in 12 bytes. The first four of each are the low
        # bits of 8 bytes. Of the others the two high bits are above them, the low bits in 4 bytes.
        first_NB, last_NB = _halves(integers_NB)
        return torch.cat([first_NB | last_NB >> 4 << 6, _field(last_NB, 4, 4)], dim=1)
    runs = (integers_NB & (2**bits - 1)).unflatten(1, (-1, 8 // bits, width))
    packed = runs[:, :, 0].clone()
    for index in range(1, 8 // bits):
        packed |= runs[:, :, index] << bits * index
    return packed.flatten(1)


def _from_field(field_NK: Tensor, bits: int, width: int) -> Tensor:
    """The integers of a field, uint8 (N, B): the inverse of `_field`."""
    if width == 0:
        return from_stream(field_NK, bits)
    if bits == 6:
        first_NK, low_NK = field_NK.tensor_split((8,), dim=1)
        last_NB = _from_field(low_NK, 4, 4) | first_NK >> 6 << 4
        return torch.cat(_halves(torch.cat([first_NK & 63, last_NB], dim=1)), dim=1)
    runs = field_NK.unflatten(1, (-1, width))
    parts = [runs >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=2).flatten(1)


def _halves(codes_NB: Tensor) -> tuple[Tensor, Tensor]:
    """From (a, b, c, d) to (a, c) and (b, d), each four wide; also its own inverse."""
    quarters = codes_NB.split(4, dim=1)
    return torch.cat(quarters[::2], dim=1), torch.cat(quarters[1::2], dim=1)
