"""The bytes of GGUF's types with codebooks, IQ2 and IQ3.

A span has 256 columns: d, and for each run of 32 columns the rows of the grid of its codewords, the
signs of its weights, and the codes of its groups. A set bit of the signs means a negative weight.
Types with an even number of negative weights store seven signs of eight. A code c is stored as
(c − 1) / 2. Bits of different parts share bytes, in a way of its own in each type. On the CPU the
compiled kernel packs and unpacks, where there is one.

Shape suffixes: N spans, G groups of a span, B columns of a span, W codewords of a span, S signs of
eight columns, K rows of a grid or bytes, C columns of a codeword, P bits of a span behind its d.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.formats.gguf.package import grid
from prunus.kernels import library as kernels
from prunus.rounding.codebooks import CodebookQuantizer
from prunus.rounding.group_quantizer import Spans

#: The parts of a layout, as `kernels.h` numbers them.
_PARTS = ("rows", "signs", "codes")


@dataclass(frozen=True)
class CodebookBlock(CodebookQuantizer):
    """A quantiser with a codebook of llama.cpp, and its bytes.

    Attributes:
        layout: Where the bits of all integers lie, as entries of (part, integers, bits, start, run,
            distance). The part is "rows", "signs" or "codes", and `integers` is how many of it are
            in each of the eight runs. Bit b of integer i of run r is at start + r · run + i ·
            distance + b for b below `bits`, counted from the end of d, and in a byte from the low
            bit. Of a part with two entries, the first has the low bits.
    """

    layout: tuple[tuple[str, int, int, int, int, int], ...]

    @property
    def grid_KC(self) -> Tensor:
        """The magnitudes of all codewords, float32, from the package `gguf`."""
        return grid(self.name)

    def _key(self, digits_XC: Tensor) -> Tensor:
        """The digits of codewords (…, C) as one number each (…,)."""
        places_C = torch.arange(digits_XC.shape[-1], device=digits_XC.device)
        return (digits_XC * (len(self.values) // 2) ** places_C).sum(-1)

    @functools.cached_property
    def _row_of_key(self) -> Tensor:
        """The number of a codeword -> its row of the grid."""
        keys_K = self._key(self.digits_KC)
        rows_X = torch.zeros(int(keys_K.max()) + 1, dtype=torch.int64)
        return rows_X.scatter_(0, keys_K, torch.arange(len(keys_K)))

    @functools.cached_property
    def nbytes(self) -> int:
        """The bytes of a span: two of d, and eight runs."""
        return 2 + sum(integers * bits for _, integers, bits, *_ in self.layout)

    def _places(self, part: str) -> Tensor:
        """Where each bit of the integers of a part lies behind d, int64 (integers, bits)."""
        places = [
            torch.arange(8)[:, None, None] * run
            + torch.arange(integers)[:, None] * distance
            + torch.arange(start, start + bits)
            for name, integers, bits, start, run, distance in self.layout
            if name == part
        ]
        return torch.cat(places, dim=2).flatten(0, 1)

    def pack(self, spans: Spans) -> Tensor:
        """The bytes of spans, uint8 (N, K), whose magnitudes are codewords."""
        codes_NG = (spans.codes_NG.long() - 1) // 2
        compiled = kernels.load_kernels() if codes_NG.is_cpu else None
        if compiled is None:
            packed_NK = self._pack_in_torch(spans.levels_NB, codes_NG)
        else:
            packed_NK = spans.levels_NB.new_empty(len(codes_NG), self.nbytes - 2)
            parts = spans.levels_NB.contiguous(), codes_NG.byte().contiguous(), packed_NK
            self._call(compiled, "prunus_pack_codewords", self._row_of_key, *parts)
        return torch.cat([spans.d_N[:, None].to(self.dtype).view(torch.uint8), packed_NK], dim=1)

    def _call(self, compiled: kernels.Library, name: str, table: Tensor, *parts: Tensor) -> None:
        """Call one of the two functions of the kernel, with a table and the tensors of spans."""
        columns, digits = self.grid_KC.shape[1], len(self.values) // 2
        layout = torch.tensor(
            [(_PARTS.index(part), *numbers) for part, *numbers in self.layout], dtype=torch.int32
        )
        sizes = (len(parts[0]), self.nbytes - 2, columns, digits, len(layout), len(table))
        compiled.call(name, *sizes, layout, table, *parts)

    def _pack_in_torch(self, levels_NB: Tensor, codes_NG: Tensor) -> Tensor:
        """The bytes behind d."""
        # Levels below the half are negative values, from the largest magnitude on: ~digit.
        signed_NB = levels_NB.long() - len(self.values) // 2
        negative_NB = (signed_NB < 0).long()
        digits_NWC = (signed_NB ^ -negative_NB).unflatten(1, (-1, self.digits_KC.shape[1]))
        integers = {
            "rows": self._row_of_key.to(signed_NB.device)[self._key(digits_NWC)],
            "signs": _joined(negative_NB.unflatten(1, (-1, 8))),
            "codes": codes_NG,
        }
        bits_NP = signed_NB.new_zeros(len(signed_NB), 8 * (self.nbytes - 2))
        for part, integers_NX in integers.items():
            places = self._places(part)
            bits_NP[:, places] = _bits(integers_NX, places.shape[1])
        return _joined(bits_NP.unflatten(1, (-1, 8))).to(torch.uint8)

    def unpack(self, data_NK: Tensor) -> Spans:
        """The parts of spans of bytes, uint8 (N, K): the inverse of `pack`."""
        packed_NK = data_NK[:, 2:].contiguous()
        compiled = kernels.load_kernels() if data_NK.is_cpu else None
        if compiled is None:
            levels_NB, codes_NG = self._unpack_in_torch(packed_NK)
        else:
            levels_NB = packed_NK.new_empty(len(packed_NK), self.span)
            codes_NG = packed_NK.new_empty(len(packed_NK), self.span // self.group)
            parts = packed_NK, levels_NB, codes_NG
            self._call(compiled, "prunus_unpack_codewords", self.digits_KC, *parts)
        zeros_NG = torch.zeros_like(codes_NG, dtype=torch.float32)
        d_N = data_NK[:, :2].clone().view(self.dtype)[:, 0].float()
        return Spans(d_N, zeros_NG[:, 0], 2.0 * codes_NG + 1, zeros_NG, levels_NB)

    def _unpack_in_torch(self, packed_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Levels, uint8 (N, B), and codes as they are stored (N, G), of the bytes behind d."""
        bits_NP = _bits(packed_NK.long(), 8).flatten(1)
        rows_NW, signs_NX, codes_NG = (_joined(bits_NP[:, self._places(part)]) for part in _PARTS)
        negative_NXS = _bits(signs_NX, 8)
        if self.has_even_signs:
            negative_NXS[..., 7] = negative_NXS.sum(2) % 2
        digits_NB = self.digits_KC.to(packed_NK.device)[rows_NW].flatten(1)
        levels_NB = (digits_NB ^ -negative_NXS.flatten(1)) + len(self.values) // 2
        return levels_NB.to(torch.uint8), codes_NG


def _bits(integers: Tensor, count: int) -> Tensor:
    """The low bits of integers (…), int64 (…, count)."""
    return integers[..., None] >> torch.arange(count, device=integers.device) & 1


def _joined(bits: Tensor) -> Tensor:
    """Integers (…) of bits (…, count), int64: the inverse of `_bits`."""
    return (bits << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)
