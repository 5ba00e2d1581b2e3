"""The C interface of the kernels in ctypes: structures, signatures, and how weights are described.

`kernels.h` is the reference. `library.py` is the only user of this file.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from prunus.hardware.kernels import BAD_ARGUMENT
from prunus.runtime.weight import Packed, PackedWeight, PlaneCode, QuantizedWeight

#: How `kernels.h` numbers dtypes.
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}
#: What the results of functions mean for bit planes that may hold anything.
DAMAGE = {
    BAD_ARGUMENT: "a class has no code, or a code or a size is out of range",
    4: "they end before their last layer",
    5: "bytes follow their last layer",
    6: "the padding of a layer is not zero",
    7: "an escaped value is out of range",
    8: "they hold a level below -127",
}
#: Offsets of a chunk and class: one for each of up to eight layers, and one for escaped bytes.
OFFSETS = 9
# Bytes per code in `PrunusPlanes`: raw bits, number of layers, bits of up to eight layers.
_CODE_BYTES = 10


class _Weight(ctypes.Structure):
    """`PrunusWeight` of `kernels.h`, field by field."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("high_bytes", ctypes.c_void_p),
        ("rare_at", ctypes.c_void_p),
        ("rare_values", ctypes.c_void_p),
        ("rare", ctypes.c_int64),
        ("kind", ctypes.c_int),
    )


class _Planes(ctypes.Structure):
    """`PrunusPlanes` of `kernels.h`, field by field."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("rows_per_chunk", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("classes", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("class_count", ctypes.c_int64),
        ("steps", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("lines", ctypes.c_void_p),
    )


class Matrix(ctypes.Structure):
    """`PrunusMatrix` of `kernels.h`: where a description is, in one of its forms, and a bias."""

    _fields_ = (("weight", ctypes.c_void_p), ("planes", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class Block(ctypes.Structure):
    """`PrunusBlock` of `kernels.h`, field by field: a block of a transformer."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "key_heads", "dim", "inner")),
        *((name, Matrix) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("norm_attention", ctypes.c_void_p),
        ("norm_feed", ctypes.c_void_p),
        ("norm_query", ctypes.c_void_p),
        ("norm_key", ctypes.c_void_p),
        ("norm_attended", ctypes.c_void_p),
        ("norm_fed", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("norm_form", ctypes.c_int),
        ("activation", ctypes.c_int),
    )


class Tokens(ctypes.Structure):
    """`PrunusTokens` of `kernels.h`, field by field: one new token of each sequence."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("angle_stride", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
    )


# Every weight is described for every call, so the few different codes are kept.
@functools.cache
def _codes(codes: tuple[PlaneCode, ...]) -> ctypes.Array[ctypes.c_uint8]:
    """Codes as `PrunusPlanes` has them: `_CODE_BYTES` bytes each."""
    written = bytearray()
    for raw, layers in codes:
        written += bytes((raw, len(layers), *layers)).ljust(_CODE_BYTES, b"\0")
    return (ctypes.c_uint8 * len(written)).from_buffer(written)


def describe(weight: Packed, prepared: torch.Tensor | None) -> ctypes.Structure:
    """Describe where a weight and the result of `forms.check` are in memory.

    The result holds addresses only, so both must outlive it. `prepared` may be None for functions
    that do not read it.
    """
    at = None if prepared is None else prepared.data_ptr()
    if isinstance(weight, QuantizedWeight):
        (rows, in_features), data, classes, steps, scales, codes, rows_per_chunk = weight
        return _Planes(
            rows,
            in_features,
            rows_per_chunk,
            data.data_ptr(),
            data.shape[0],
            classes.data_ptr(),
            ctypes.addressof(_codes(codes)),
            len(codes),
            steps.data_ptr(),
            scales.data_ptr(),
            None,
            at if prepared is not None and prepared.dtype is torch.uint8 else None,
        )
    return _describe_bitmap(weight, at)


def _describe_bitmap(weight: PackedWeight, offsets: int | None) -> _Weight:
    """Describe a bitmap. `offsets` is the address of its row offsets, None where it has no mask."""
    (rows, in_features), values, mask, scales, coding = weight
    described = _Weight(
        rows,
        in_features,
        values.shape[0],
        None if mask is None else mask.data_ptr(),
        offsets,
        values.data_ptr(),
        None if scales is None else scales.data_ptr(),
    )
    if coding is None:
        described.kind = KINDS[values.dtype]
        return described
    codes, high_bytes, rare_at, rare = coding
    described.codes, described.high_bytes = codes.data_ptr(), high_bytes.data_ptr()
    described.rare_at, described.rare_values = rare_at.data_ptr(), rare.data_ptr()
    described.rare = rare.shape[0]
    return described


def declare(library: ctypes.CDLL) -> None:
    """Give every function of the library its argument and result types."""
    pointer, length, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.prunus_row_offsets.argtypes = [length, length, pointer, pointer]
    library.prunus_row_offsets.restype = length
    for prefix, structure in (("prunus_", _Weight), ("prunus_plane_", _Planes)):
        weight = ctypes.POINTER(structure)
        linear, expand, expand_rows = (
            getattr(library, prefix + name) for name in ("linear", "expand", "expand_rows")
        )
        linear.argtypes = [number, number, weight, length, number, *[pointer] * 3]
        expand.argtypes = [number, number, weight, number, pointer]
        expand_rows.argtypes = [number, weight, pointer, length, number, pointer]
    library.prunus_plane_offsets.argtypes = [ctypes.POINTER(_Planes), pointer]
    library.prunus_plane_widths.argtypes = [number, ctypes.POINTER(_Planes), *[pointer] * 2]
    library.prunus_plane_lines.argtypes = library.prunus_plane_widths.argtypes
    block, tokens = ctypes.POINTER(Block), ctypes.POINTER(Tokens)
    library.prunus_block.argtypes = [*[number] * 3, block, tokens, *[pointer] * 2]
    library.prunus_read.argtypes = [number, pointer, length]
    library.prunus_read.restype = ctypes.c_uint64
