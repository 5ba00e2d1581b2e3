"""The types of GGUF that prunus writes: their values, their bytes, and their numbers.

A new type is one entry of `_ALL`, from which `TYPES` follows. The layouts are those of ggml
(github.com/ggml-org/ggml, ggml-common.h), and the tests decode them with the package `gguf` as
well.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from prunus.formats.block_bytes import FP4, FP4_ORDER, ONE, BlockType, Field, integers
from prunus.formats.gguf.iq_codebooks import CodebookBlock
from prunus.rounding.group_quantizer import GroupQuantizer
from prunus.rounding.llama_cpp import check_type

# The 16 values of IQ4_NL and IQ4_XS (kvalues_iq4nl of ggml).
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class GgufType(GroupQuantizer):
    """A type of GGUF.

    >>> quantizer = TYPES["Q3_K"]
    >>> quantizer.span, quantizer.nbytes, quantizer.bits
    (256, 110, 3.4375)

    Attributes:
        number: Its number in ggml (`ggml_type`).
        file_type: The number that a file says of itself where most of its weights have this type
            (`llama_ftype`).
        fallback: What llama.cpp takes where the span does not divide a width; empty for types that
            have spans of 32.
        is_reserve: Whether the choice by loss takes it only where a file would be too large
            without such types.
        is_chosen: Whether the choice by loss takes it at all, and not only a recipe that names it.
    """

    number: int
    file_type: int
    fallback: str = ""
    is_reserve: bool = False
    is_chosen: bool = True


@dataclass(frozen=True)
class ScalarType(GgufType, BlockType):
    """A type whose weights have values of their own."""


@dataclass(frozen=True)
class CodebookType(GgufType, CodebookBlock):
    """A type whose weights have the values of several columns together."""


# Fields of levels and fields of codes: bits, width and shift are their arguments.
_levels, _codes = functools.partial(Field, "levels"), functools.partial(Field, "codes")
# The floats of a span.
_D, _DMIN = Field("d"), Field("dmin")
# The highest of five bits of all levels of a span of 32, in four bytes.
_FIFTH_BIT = _levels(1, 1, 4)
# Four bits of all levels of 32 columns: the first sixteen in the low halves of the bytes.
_NIBBLES = _levels(4, 16)
# Eight codes and eight minima of six bits; see `block_bytes._field`.
_SIX_BITS = _codes(6, 12)
# The values of the types with codebooks of two bits, in units of the smallest magnitude.
_IQ2 = (-5.375, -3.125, -1, 1, 3.125, 5.375)
# Arguments: name, span, group, values, codes, layout, number, file type, fallback.
_ALL: tuple[GgufType, ...] = (
    ScalarType("Q4_0", 32, 32, integers(4), ONE, (_D, _NIBBLES), 2, 2),
    ScalarType("Q4_1", 32, 32, tuple(range(16)), ONE, (_D, Field("-dmin"), _NIBBLES), 3, 3),
    ScalarType("Q5_0", 32, 32, integers(5), ONE, (_D, _FIFTH_BIT, _NIBBLES), 6, 8),
    ScalarType(
        "Q5_1", 32, 32, tuple(range(32)), ONE, (_D, Field("-dmin"), _FIFTH_BIT, _NIBBLES), 7, 9
    ),
    ScalarType("Q8_0", 32, 32, tuple(range(-127, 128)), ONE, (_D, _levels(8, 32)), 8, 7),
    ScalarType(
        "Q2_K", 256, 16, (0, 1, 2, 3), (0, 15), (_codes(4, 16), _levels(2, 32), _D, _DMIN), 10, 10,
        "Q4_0",
    ),
    ScalarType(
        "Q3_K", 256, 16, integers(3), (-32, 31),
        (_levels(1, 32, 2), _levels(2, 32), _codes(4, 8), _codes(2, 4, 4), _D), 11, 11, "Q4_0",
    ),
    ScalarType(
        "Q4_K", 256, 32, tuple(range(16)), (0, 63), (_D, _DMIN, _SIX_BITS, _levels(4, 32)), 12, 14,
        "Q5_0",
    ),
    ScalarType(
        "Q5_K", 256, 32, tuple(range(32)), (0, 63),
        (_D, _DMIN, _SIX_BITS, _levels(1, 32, 4), _levels(4, 32)), 13, 16, "Q5_1",
    ),
    ScalarType(
        "Q6_K", 256, 16, integers(6), (-128, 127),
        (_levels(4, 64), _levels(2, 32, 4), _codes(8, 16), _D), 14, 18, "Q8_0",
    ),
    ScalarType("IQ4_NL", 32, 32, _IQ4, ONE, (_D, _NIBBLES), 20, 25),
    ScalarType(
        "IQ4_XS", 256, 32, _IQ4, (-32, 31),
        (_D, _codes(2, 1, 4), _codes(4, 1), _NIBBLES), 23, 30, "IQ4_NL",
    ),
    # Its scale is a power of two. ggml has twice the values and half the scale, which is the same.
    # The choice by loss has IQ4_XS and IQ4_NL, which lose less at these bits.
    ScalarType(
        "MXFP4", 32, 32, FP4, ONE, (Field("d", 8), _NIBBLES), 39, 38, is_chosen=False,
        dtype=torch.float8_e8m0fnu, order=FP4_ORDER,
    ),
    # Its scale may be negative: then the values are −2 to 1.
    ScalarType(
        "Q2_0", 64, 64, (-1, 0, 1, 2), ONE, (_D, _levels(2, 1)), 42, 41, "Q4_0", is_reserve=True
    ),
    # Arguments after the codes: even signs, layout, number, file type, fallback.
    CodebookType(
        "IQ2_XXS", 256, 32, _IQ2, (1, 31), True, (
            ("rows", 4, 8, 0, 64, 8),
            ("signs", 4, 7, 32, 64, 7), ("codes", 1, 4, 60, 64, 0),
        ), 16, 19, "IQ4_NL",
    ),
    CodebookType(
        "IQ2_XS", 256, 16, _IQ2, (1, 31), True, (
            ("rows", 4, 9, 0, 64, 16),
            ("signs", 4, 7, 9, 64, 16), ("codes", 2, 4, 512, 8, 4),
        ), 17, 20, "IQ4_NL",
    ),
    CodebookType(
        "IQ2_S", 256, 16, _IQ2, (1, 31), False, (
            ("rows", 4, 8, 0, 32, 8),
            ("rows", 4, 2, 512, 8, 2),
            ("signs", 4, 8, 256, 32, 8), ("codes", 2, 4, 576, 8, 4),
        ), 22, 28, "IQ4_NL",
    ),
    CodebookType(
        "IQ3_XXS", 256, 32, (-15.5, *range(-13, 14, 2), 15.5), (1, 31), True, (
            ("rows", 8, 8, 0, 64, 8),
            ("signs", 4, 7, 512, 32, 7), ("codes", 1, 4, 540, 32, 0),
        ), 18, 23, "IQ4_NL",
    ),
    CodebookType(
        "IQ3_S", 256, 32, tuple(range(-15, 16, 2)), (1, 31), False, (
            ("rows", 8, 8, 0, 64, 8),
            ("rows", 8, 1, 512, 8, 1),
            ("signs", 4, 8, 576, 32, 8), ("codes", 1, 4, 832, 4, 0),
        ), 21, 26, "IQ4_NL",
    ),
)  # fmt: skip

#: dtype of a tensor that is stored as it is -> its name, its number, and its number as a file type.
PLAIN = {
    torch.float32: ("F32", 0, 0),
    torch.float16: ("F16", 1, 1),
    torch.bfloat16: ("BF16", 30, 32),
}
#: Name of such a type -> its dtype.
PLAIN_DTYPES = {name: dtype for dtype, (name, _, _) in PLAIN.items()}
#: Types of weights that are those of the model, or nearly so.
FULL_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0"})
#: Name of a type -> the type.
TYPES: dict[str, GgufType] = {entry.name: entry for entry in _ALL}
#: Name of a type -> the number that a file says of itself where most of its weights have it.
FILE_TYPES = {
    **{entry.name: entry.file_type for entry in _ALL},
    **{name: file_type for name, _, file_type in PLAIN.values()},
}


def type_named(name: str) -> GgufType:
    """The type of this name.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    check_type(name)
    return TYPES[name]


def type_for(name: str, columns: int) -> GgufType:
    """A type by its name, or what llama.cpp takes for it where its span does not divide a width.

    Args:
        name: A name of `TYPES`.
        columns: The width of the weight.

    Raises:
        ValueError: There is no such type, or 32 does not divide the width, so that no type suits
            it.

    >>> type_for("Q3_K", 1536).name, type_for("Q3_K", 576).name
    ('Q3_K', 'Q4_0')
    """
    chosen = type_named(name)
    if columns % chosen.span:
        chosen = TYPES[chosen.fallback or name]
    if columns % chosen.span:
        raise ValueError(
            f"{columns} columns cannot be stored as {name}: give a width that 32 divides"
        )
    return chosen


def types_for(columns: int, with_reserve: bool = False) -> list[GgufType]:
    """The types that the choice by loss has for this width: those with long spans where they fit.

    Q8_0 is always one of them, because no type with long spans is as exact, and so is IQ4_NL, which
    processors decode as fast as Q4_K. IQ4_XS has the same levels in fewer bits, and is slower.

    Args:
        columns: The width of the weight.
        with_reserve: Whether types count that are taken only where files are too large without.

    Raises:
        ValueError: 32 does not divide the width, so that no type suits it.

    >>> [x.name for x in types_for(576)]
    ['Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'IQ4_NL']
    >>> [x.name for x in types_for(576, with_reserve=True)][-1]
    'Q2_0'
    """
    longest = type_for("Q4_K", columns).span
    # The spans of Q2_0, which is for widths of spans of 32 alone, are twice as long.
    spans = (longest, 2 * longest)
    return [
        x
        for x in TYPES.values()
        if columns % x.span == 0 and x.is_chosen and x.is_reserve <= with_reserve
        if x.span in spans or x.name in ("Q8_0", "IQ4_NL")
    ]
