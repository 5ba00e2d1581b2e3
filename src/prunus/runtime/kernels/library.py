"""The Python binding of the compiled kernels for packed weights, on CPU tensors.

`kernels.h` is the C interface, and `prunus.hardware.kernels` opens the library. Where there is
none, the callers expand the weights in torch instead.

Shape suffixes: I input features, O output features.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from prunus.hardware import kernels
from prunus.hardware.kernels import BAD_ARGUMENT, ISAS, Library, check_fault, why_not
from prunus.hardware.numerics import native_bfloat16
from prunus.runtime.kernels.interface import (
    DAMAGE,
    KINDS,
    OFFSETS,
    Block,
    Tokens,
    declare,
    describe,
)
from prunus.runtime.weight import Packed, QuantizedWeight

__all__ = ["ISAS", "Kernels", "load", "why_not"]

#: Up to this many tokens every instruction set multiplies straight from the packed weight.
MAX_TOKENS = 16
#: Up to this many tokens, instruction sets with matrix products expand a few rows into the cache
#: and multiply them there. Beyond it, expanding the whole weight pays, because torch blocks its
#: product better.
MAX_TOKENS_AS_MATRIX = 1024
#: Up to this many tokens the product of a quantised weight is faster than expanding it and
#: multiplying in bfloat16 without tile registers (1536 x 1536 at 2.8 bits, one core of an AMD EPYC,
#: Zen 4).
MAX_PLANE_TOKENS = 256
#: The same with tile registers (all linears of a 1.5B model, two cores of an Intel Xeon with AMX).
MAX_PLANE_TOKENS_IN_TILES = 512
#: Without instructions for bfloat16 the product is always faster; the limit is that of its memory.
MAX_PLANE_TOKENS_WITHOUT = 4096


@dataclass(frozen=True, slots=True)
class Kernels(Library):
    """The kernels for packed weights.

    All methods take contiguous CPU tensors. The caller guarantees shapes and dtypes, because these
    calls are made hundreds of times per generated token.
    """

    def row_offsets(self, mask: torch.Tensor, in_features: int) -> torch.Tensor:
        """Where the values of each row of a bitmap begin; see `bitmap.row_offsets`.

        Raises:
            ValueError: A bit beyond the last column is set.
        """
        offsets = torch.empty(mask.shape[0] + 1, dtype=torch.int64)
        count = self.library.prunus_row_offsets(
            mask.shape[0], in_features, mask.data_ptr(), offsets.data_ptr()
        )
        if count < 0:
            raise ValueError(f"the mask has bits set beyond its {in_features} columns")
        return offsets

    def linear(
        self,
        x: torch.Tensor,
        weight: Packed,
        prepared: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `x · Wᵀ + bias` (..., O) in the dtype of `x`, straight from the packed weight.

        For a quantised weight, `x` times the steps is rounded to int8, and every 16 columns share a
        scale: those that one lane of a vector adds up in four groups of a class.

        Args:
            x: bfloat16, float16 or float32 (..., I), not empty.
            weight: A weight that `forms.check` accepted.
            prepared: What `forms.check` returned.
            bias: (O,) in the dtype of `x`, or None.
        """
        shape, described = x.shape, describe(weight, prepared)
        name = "prunus_plane_linear" if isinstance(weight, QuantizedWeight) else "prunus_linear"
        # torch parses separate numbers in half the time of a shape.
        out = torch.empty(*shape[:-1], weight.shape[0], dtype=x.dtype)
        tokens = x.numel() // shape[-1]
        kind = KINDS[x.dtype]
        self.call(name, ctypes.byref(described), tokens, kind, x, bias, out)
        return out

    def max_tokens(self, weight: Packed, x_dtype: torch.dtype) -> int:
        """Return the number of tokens up to which `linear` is the fastest way."""
        if isinstance(weight, QuantizedWeight):
            in_tiles = ISAS[self.isa] == "amx" and x_dtype is torch.bfloat16
            if not native_bfloat16():
                return MAX_PLANE_TOKENS_WITHOUT
            return MAX_PLANE_TOKENS_IN_TILES if in_tiles else MAX_PLANE_TOKENS
        if self.has_bfloat16 and x_dtype is torch.bfloat16 and weight.dtype is not torch.float16:
            return MAX_TOKENS_AS_MATRIX
        return MAX_TOKENS

    def expand(self, weight: Packed, prepared: torch.Tensor | None, out: torch.Tensor) -> None:
        """Write the dense weight to `out` (O, I), rounded once to its dtype.

        For a bitmap this is the dtype of its entries, or bfloat16 or float16 for int8 values; for a
        quantised weight it is bfloat16, float16 or float32.
        """
        name = "prunus_plane_expand" if isinstance(weight, QuantizedWeight) else "prunus_expand"
        described = describe(weight, prepared)
        self.call(name, ctypes.byref(described), KINDS[out.dtype], out)

    def expand_rows(
        self, weight: Packed, prepared: torch.Tensor | None, rows: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write row `rows[i]` (int64) of the dense weight to row i of `out`, as `expand` does.

        For each row of a quantised weight, all eight rows of its tile are unpacked.

        Raises:
            IndexError: A row number is out of range.
        """
        is_quantized = isinstance(weight, QuantizedWeight)
        name = "prunus_plane_expand_rows" if is_quantized else "prunus_expand_rows"
        fault = getattr(self.library, name)(
            self.isa,
            ctypes.byref(describe(weight, prepared)),
            rows.data_ptr(),
            rows.numel(),
            KINDS[out.dtype],
            out.data_ptr(),
        )
        if fault == BAD_ARGUMENT:
            raise IndexError(f"there are {weight.shape[0]} rows, not all of {rows.tolist()}")
        check_fault(fault)

    def lines(self, weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
        """Check bit planes that may hold anything, and make the form that `linear` and others read.

        All other parts of the weight must have passed `plane_codes.check_parts`.

        Returns:
            The lines of `lines.h`, uint8 (bytes,), and int64 (chunks, classes, 9): where each layer
            and then the escape bytes begin in the planes; -1 where there is nothing.

        Raises:
            ValueError: The planes are damaged.
        """
        chunks = -(-weight.shape[0] // weight.rows_per_chunk)
        offsets = torch.empty(chunks, len(weight.codes), OFFSETS, dtype=torch.int64)
        described = describe(weight, None)
        at = ctypes.byref(described)
        _check_planes(self.library.prunus_plane_offsets(at, offsets.data_ptr()))
        described.offsets = offsets.data_ptr()
        size = ctypes.c_int64()
        widths = ctypes.create_string_buffer(4)
        _check_planes(self.library.prunus_plane_widths(self.isa, at, widths, ctypes.byref(size)))
        lines = torch.empty(size.value, dtype=torch.uint8)
        check_fault(self.library.prunus_plane_lines(self.isa, at, widths, lines.data_ptr()))
        return lines, offsets

    def block(self, block: Block, tokens: Tokens, x: torch.Tensor) -> torch.Tensor:
        """Return what a block of a transformer computes of `x` (tokens, 1, hidden).

        The last positions of keys and values are written; see `prunus_block` of `kernels.h`.
        """
        out = torch.empty_like(x)
        at = ctypes.byref(block), ctypes.byref(tokens)
        self.call("prunus_block", KINDS[x.dtype], *at, x, out)
        return out


def _check_planes(fault: int) -> None:
    """Raise what the result of a function says of bit planes, if it is not 0."""
    if fault in DAMAGE:
        raise ValueError(f"the planes of a quantised weight are damaged: {DAMAGE[fault]}")
    check_fault(fault)


def load(isa: str | None = None) -> Kernels | None:
    """Open the kernels for packed weights; None where there are none, and `why_not` says why.

    Args:
        isa: One of `ISAS`; None is as for `prunus.hardware.kernels.load`.

    Raises:
        ValueError: There is no such instruction set, or this machine does not have it.
    """
    opened = kernels.load(isa)
    return None if opened is None else _bind(opened)


@functools.cache
def _bind(opened: Library) -> Kernels:
    declare(opened.library)
    return Kernels(opened.library, opened.path, opened.isa, opened.runtime)
