"""Pack one weight, check a packed weight, and expand it again: tensors only.

`docs/reference/packed-format.md` is the reference of the layout.

Shape suffixes: O output features (rows), I input features (columns), K stored values.
"""

from __future__ import annotations

import numpy as np
import torch

from prunus.runtime.coding import check_coding, coded_bytes, decode, encode, high_byte_counts
from prunus.runtime.kernels.library import load
from prunus.runtime.weight import PackedWeight, require

#: int8 values lie in [-127, 127]; the scale of a row is its largest magnitude / 127.
INT8_LEVELS = 127
# Rows converted to float32 at a time: a whole output head would take gigabytes.
_ROWS = 1024
# Dtype -> the dtype of integers with as many bits.
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# How many bits of a byte are 1.
_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)
# The value of each bit of a byte.
_BIT_VALUES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def kept(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return which entries are not exactly +0.0, as bool (O, I).

    A -0.0 counts as kept: it compares equal to 0, but its bits differ, and packing is lossless.

    Raises:
        ValueError: The weight is not bfloat16, float16 or float32.

    >>> kept(torch.tensor([[0.0, -0.0, 2.0]], dtype=torch.bfloat16)).tolist()
    [[False, True, True]]
    """
    if weight_OI.dtype not in _BITS:
        kinds = "bfloat16, float16 or float32"
        raise ValueError(f"weights must be {kinds} to be packed, got {weight_OI.dtype}")
    return weight_OI.view(_BITS[weight_OI.dtype]) != 0


def pack_weight(weight_OI: torch.Tensor, values: torch.dtype) -> PackedWeight:
    """Pack a weight in the form that takes the fewest bytes.

    With a mask, entries that are exactly +0.0 are left out; without one, all entries are stored.
    bfloat16 values are coded (see `coding.py`) where their exponents allow it.

    Args:
        weight_OI: A weight on the CPU with at least one entry, any strides.
        values: The dtype of `weight_OI` (lossless: bfloat16 or float16) or int8. int8 rounds to the
            nearest of 255 symmetric levels with one scale per row. The mask does not depend on the
            choice, but int8 may round a kept entry to 0.

    Raises:
        ValueError: The dtype cannot be packed this way, or int8 is asked for and a weight is not
            finite.

    >>> weight = torch.tensor([[0.0, 1.5], [0.0, -2.0]], dtype=torch.float16)
    >>> packed = pack_weight(weight, torch.float16)
    >>> packed.values.tolist(), packed.mask.tolist()
    ([1.5, -2.0], [[2], [2]])
    >>> torch.equal(expand(packed), weight)
    True
    """
    weight_OI = weight_OI.contiguous()
    keep_OI = kept(weight_OI)
    scales = None
    stored = weight_OI
    if values == torch.int8:
        scales = _scales(weight_OI)
        stored = _levels(weight_OI, scales)
    elif values != weight_OI.dtype or values == torch.float32:
        raise ValueError(
            f"weights of {weight_OI.dtype} cannot be packed as {values} without loss; convert "
            "float32 weights to bfloat16 or float16 first, or pack them as int8"
        )
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    whole, sparse = _bytes_of_forms(stored, keep_OI)
    if sparse < whole:
        mask = torch.from_numpy(np.packbits(keep_OI.numpy(), axis=1, bitorder="little"))
        return _with_values(shape, stored[keep_OI], mask, scales)
    return _with_values(shape, stored.flatten(), None, scales)


def _bytes_of_forms(stored_OI: torch.Tensor, keep_OI: torch.Tensor) -> tuple[int, int]:
    """The bytes of all entries without a mask, and of the kept ones with a mask; without scales."""
    rows, columns = stored_OI.shape
    mask = rows * -(-columns // 8)
    count = int(torch.count_nonzero(keep_OI))
    if stored_OI.dtype != torch.bfloat16:
        return stored_OI.nbytes, mask + count * stored_OI.itemsize
    occurrences = high_byte_counts(stored_OI.flatten())
    whole = coded_bytes(occurrences)
    occurrences[0] -= stored_OI.numel() - count  # the high byte of +0.0 is 0
    return whole, mask + coded_bytes(occurrences)


def _with_values(
    shape: tuple[int, int],
    values_K: torch.Tensor,
    mask: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> PackedWeight:
    """A bitmap of these values, coded where they are bfloat16 and that pays."""
    coded = encode(values_K) if values_K.dtype == torch.bfloat16 else None
    if coded is None:
        return PackedWeight(shape, values_K, mask, scales)
    return PackedWeight(shape, coded[0], mask, scales, coded[1])


def _scales(weight_OI: torch.Tensor) -> torch.Tensor:
    """The scale of each row for int8 values, float32 (O,), never 0."""
    largest_O = torch.cat([rows.float().abs().amax(dim=1) for rows in weight_OI.split(_ROWS)])
    if not torch.isfinite(largest_O).all():
        raise ValueError("weights that are infinite or not a number cannot be packed as int8")
    scales_O = largest_O / INT8_LEVELS
    # A row of zeros has scale 0, and so may a row of subnormal numbers after the division.
    return torch.where(scales_O > 0, scales_O, torch.ones_like(scales_O))


def _levels(weight_OI: torch.Tensor, scales_O: torch.Tensor) -> torch.Tensor:
    """The weight in units of its scales, rounded to int8 (O, I)."""
    levels_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
    for levels, rows, scales in zip(
        *(x.split(_ROWS) for x in (levels_OI, weight_OI, scales_O)), strict=True
    ):
        levels.copy_((rows.float() / scales[:, None]).round_().clamp_(-INT8_LEVELS, INT8_LEVELS))
    return levels_OI


def row_offsets(mask: torch.Tensor, in_features: int) -> torch.Tensor:
    """Return where the values of each row begin: int64 (O + 1); the last entry is their number.

    Args:
        mask: uint8 (O, ceil(I / 8)) on the CPU, contiguous.
        in_features: I.

    Raises:
        ValueError: A bit beyond the last column is set.

    >>> row_offsets(torch.tensor([[0b101], [0b010]], dtype=torch.uint8), in_features=3).tolist()
    [0, 2, 3]
    """
    kernels = load()
    if kernels is not None:
        return kernels.row_offsets(mask, in_features)
    if in_features % 8 and bool((mask[:, -1] >> (in_features % 8)).any()):
        raise ValueError(f"the mask has bits set beyond its {in_features} columns")
    offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(_POPCOUNT[mask.int()].sum(dim=1), dim=0, out=offsets[1:])
    return offsets


def check(packed: PackedWeight, stored: int | None = None) -> torch.Tensor | None:
    """Check that mask, values, scales and coding fit each other; see `forms.check`.

    Coded values do not tell the number of stored entries, because their last group of 64 is padded.

    Returns:
        What `row_offsets` returns; None without a mask, where row i begins at value i · I.

    Raises:
        ValueError: They do not fit; the message says what is wrong.
    """
    rows, columns = packed.shape
    mask = packed.mask
    if rows < 1 or columns < 1:
        raise ValueError(
            f"a packed weight needs at least one row and one column, got {rows} x {columns}"
        )
    _check_values(packed)
    if packed.scales is not None:
        require("scales", packed.scales, torch.float32, rows)
        if not bool(torch.isfinite(packed.scales).all()):
            raise ValueError("a scale is infinite or not a number")
    offsets = None
    count = rows * columns
    if mask is not None:
        name = f"mask of a weight of {rows} x {columns}"
        require(name, mask, torch.uint8, rows, -(-columns // 8))
        offsets = row_offsets(mask.cpu().contiguous(), columns).to(mask.device)
        count = int(offsets[-1])
    if stored is not None and stored != count:
        raise ValueError(f"the mask keeps {count:,} weights, but {stored:,} should be stored")
    if packed.coding is not None:
        check_coding(packed.values, count, packed.coding)
    elif count != packed.values.shape[0]:
        raise ValueError(
            f"{count:,} weights are stored, but there are {packed.values.shape[0]:,} values"
        )
    return offsets


def _check_values(packed: PackedWeight) -> None:
    """Check the dtype of the values, and that int8 values alone have scales."""
    values = packed.values
    coded = packed.coding is not None
    allowed = (torch.uint8,) if coded else (torch.bfloat16, torch.float16, torch.int8)
    if values.dim() != 1 or values.dtype not in allowed:
        expected = "uint8 where they are coded" if coded else "bfloat16, float16 or int8"
        raise ValueError(
            f"packed values must be one row of {expected}, got {values.dtype} {tuple(values.shape)}"
        )
    if (values.dtype == torch.int8) != (packed.scales is not None):
        raise ValueError("int8 values need scales, and no others have them")


def expand(
    packed: PackedWeight,
    dtype: torch.dtype | None = None,
    offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense weight (O, I), floats bit for bit in their own dtype; see `forms.expand`.

    int8 times its scale, in float32, is rounded once to `dtype` (default bfloat16). `offsets` are
    what `check` returned.
    """
    scales, device = packed.scales, packed.values.device
    # A kernel writes floats in their own dtype, and int8 values as bfloat16 or float16.
    written = torch.bfloat16 if scales is not None else packed.dtype
    target = dtype or written
    if scales is not None and target == torch.float16:
        written = target
    kernels = load() if device.type == "cpu" else None
    if kernels is not None and (scales is None or target == written):
        if offsets is None and packed.mask is not None:
            offsets = row_offsets(packed.mask, packed.shape[1])
        if out is None or target != written:
            out = torch.empty(packed.shape, dtype=written)
        kernels.expand(packed, offsets, out)
        return out.to(target)
    values = packed.values if packed.coding is None else decode(packed.values, packed.coding)
    if scales is not None:
        values = values.float()
    weight = _scattered(values, packed)
    return (weight if scales is None else weight * scales[:, None]).to(target)


def expand_rows(
    packed: PackedWeight, rows: torch.Tensor, offsets: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return some rows of the dense weight on the CPU: (..., I); see `forms.expand_rows`.

    `offsets` are what `check` returned.
    """
    kernels = load()
    if kernels is None:
        return expand(packed, dtype, offsets)[rows]
    if not rows.numel():
        return torch.empty(*rows.shape, packed.shape[1], dtype=dtype)
    scales = packed.scales
    numbers = rows.to(torch.int64).contiguous()
    written = packed.dtype
    if scales is not None:
        written = dtype if dtype == torch.float16 else torch.bfloat16
    out = torch.empty(*rows.shape, packed.shape[1], dtype=written)
    if scales is None or dtype == written:
        kernels.expand_rows(packed, offsets, numbers, out)
        return out.to(dtype)
    # Integers up to 128 are exact in bfloat16, so the scale is applied in float32 afterwards.
    kernels.expand_rows(packed._replace(scales=torch.ones_like(scales)), offsets, numbers, out)
    return out.float() * scales[numbers][..., None]


def _scattered(values_K: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """Put values (K,), possibly padded, where the mask has ones, and zeros elsewhere: (O, I)."""
    rows, columns = packed.shape
    if packed.mask is None:
        return values_K[: rows * columns].view(rows, columns)
    keep_OI = ((packed.mask[:, :, None] & _BIT_VALUES.to(packed.mask.device)) != 0).view(rows, -1)[
        :, :columns
    ]
    weight_OI = values_K.new_zeros(rows, columns)
    weight_OI[keep_OI] = values_K[: int(keep_OI.sum())]
    return weight_OI
