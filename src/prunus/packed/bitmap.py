"""Packing one weight: which entries are stored, and how; checked and expanded again.

`docs/bitmap-format.md` is the reference.

Knows tensors; nothing of files, modules or models.

Shape suffixes: O output features (rows), I input features (columns).
"""

from __future__ import annotations

import torch

from prunus.packed.coding import check_coding, decode, encode
from prunus.packed.kernels.library import load
from prunus.packed.weight import PackedWeight

__all__ = [
    "INT8_LEVELS",
    "check",
    "expand",
    "expand_rows",
    "kept",
    "pack_weight",
    "relative_error",
    "row_offsets",
]

#: int8 values go from -INT8_LEVELS to INT8_LEVELS, so that the scale is the row's largest magnitude / 127.
INT8_LEVELS = 127
# Above this share of kept entries, a weight without a mask is tried first.
_MOST_KEPT = 0.9
# Rows that are in memory as float32 at a time: all of an output head would be gigabytes.
_ROWS = 1024
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)
_PLACES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def kept(weight_OI: torch.Tensor) -> torch.Tensor:
    """bool (O, I): entries that are not exactly +0.0. A -0.0 counts as kept, so that packing loses no bit."""
    if weight_OI.dtype not in _BITS:
        raise ValueError(
            f"weights must be bfloat16, float16 or float32 to be packed, got {weight_OI.dtype}"
        )
    return weight_OI.view(_BITS[weight_OI.dtype]) != 0


def pack_weight(weight_OI: torch.Tensor, values: torch.dtype) -> PackedWeight:
    """Pack a weight in the form that takes the fewest bytes.

    With a mask, entries that are exactly +0.0 are left out; without one, all are stored. bfloat16 values are coded
    (see `coding`) where their exponents allow it.

    Args:
        weight_OI: on the CPU, at least one entry; any strides.
        values: the dtype of `weight_OI` (lossless, bfloat16 or float16), or int8: symmetric, one scale per
            row, nearest; which entries are 0 does not depend on it, but kept entries may be rounded to 0.

    Raises:
        ValueError: a dtype that cannot be packed this way, or, for int8, a weight that is not finite.
    """
    weight_OI = weight_OI.contiguous()
    keep_OI = kept(weight_OI)
    if values == torch.int8:
        scales = _scales(weight_OI)
        stored = _levels(weight_OI, scales)
    elif values != weight_OI.dtype or values == torch.float32:
        raise ValueError(
            f"weights of {weight_OI.dtype} cannot be packed as {values} without loss; float32 weights must be "
            "converted to bfloat16 or float16 first, or packed as int8"
        )
    else:
        scales, stored = None, weight_OI
    shape, count = (weight_OI.shape[0], weight_OI.shape[1]), int(torch.count_nonzero(keep_OI))
    whole = None
    if count > _MOST_KEPT * keep_OI.numel():
        # An output head, as a rule: what a mask takes at the least settles it, without a copy of gigabytes.
        whole = _with_values(shape, stored.flatten(), None, scales)
        least = 1.0 if values == torch.int8 else 1.5 if values == torch.bfloat16 else 2.0
        if count * least + keep_OI.numel() / 8 >= whole.nbytes:
            return whole
    sparse = _with_values(shape, stored[keep_OI], _mask(keep_OI), scales)
    if (
        whole is None and sparse.nbytes >= weight_OI.numel()
    ):  # without a mask it is a byte per weight at the least
        whole = _with_values(shape, stored.flatten(), None, scales)
    return sparse if whole is None or sparse.nbytes < whole.nbytes else whole


def _with_values(
    shape: tuple[int, int],
    values_K: torch.Tensor,
    mask: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> PackedWeight:
    coded = encode(values_K) if values_K.dtype == torch.bfloat16 else None
    if coded is None:
        return PackedWeight(shape, values_K, mask, scales)
    return PackedWeight(shape, coded[0], mask, scales, coded[1])


def _mask(keep_OI: torch.Tensor) -> torch.Tensor:
    rows, columns = keep_OI.shape
    bits = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8)
    bits[:, :columns] = keep_OI
    return (bits.view(rows, -1, 8) * _PLACES).sum(dim=2, dtype=torch.uint8)


def _scales(weight_OI: torch.Tensor) -> torch.Tensor:
    largest_O = torch.cat([rows.float().abs().amax(dim=1) for rows in weight_OI.split(_ROWS)])
    if not torch.isfinite(largest_O).all():
        raise ValueError("weights that are infinite or not a number cannot be packed as int8")
    scales_O = largest_O / INT8_LEVELS
    # A row of zeros has none, and a row of subnormals can have a scale of 0 once divided.
    return torch.where(scales_O > 0, scales_O, torch.ones_like(scales_O))


def _levels(weight_OI: torch.Tensor, scales_O: torch.Tensor) -> torch.Tensor:
    levels_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
    for levels, rows, scales in zip(
        *(x.split(_ROWS) for x in (levels_OI, weight_OI, scales_O)), strict=True
    ):
        levels.copy_((rows.float() / scales[:, None]).round_().clamp_(-INT8_LEVELS, INT8_LEVELS))
    return levels_OI


def row_offsets(mask: torch.Tensor, in_features: int) -> torch.Tensor:
    """Where each row's values begin: int64 (O + 1); the last entry is the number of survivors. `mask` is on the CPU.

    Raises:
        ValueError: a bit beyond the last column is set.
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
    """See that mask, values, scales and coding belong together, before anything is computed with them.

    Args:
        packed: what was read.
        stored: how many entries are said to be stored, where that is said; coded values do not tell it, since their
            last group is filled up.

    Returns:
        The row offsets (see `row_offsets`), or None where there is no mask: row i begins at i · I.

    Raises:
        ValueError: saying what does not fit.
    """
    (rows, columns), mask = packed.shape, packed.mask
    if rows < 1 or columns < 1:
        raise ValueError(
            f"a packed weight needs at least one row and one column, got {rows} x {columns}"
        )
    _check_values(packed)
    if packed.scales is not None:
        _check_scales(packed.scales, rows)
    offsets, count = None, rows * columns
    if mask is not None:
        if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, -(-columns // 8)):
            raise ValueError(
                f"the mask of a weight of {rows} x {columns} must be uint8 ({rows}, {-(-columns // 8)}), "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
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
    values, coded = packed.values, packed.coding is not None
    allowed = (torch.uint8,) if coded else (torch.bfloat16, torch.float16, torch.int8)
    if values.dim() != 1 or values.dtype not in allowed:
        expected = "uint8 where they are coded" if coded else "bfloat16, float16 or int8"
        raise ValueError(
            f"packed values must be one row of {expected}, got {values.dtype} {tuple(values.shape)}"
        )
    if (values.dtype == torch.int8) != (packed.scales is not None):
        raise ValueError("int8 values need scales, and no others have them")


def _check_scales(scales: torch.Tensor, rows: int) -> None:
    if scales.dtype != torch.float32 or tuple(scales.shape) != (rows,):
        raise ValueError(
            f"scales must be float32 ({rows},), got {scales.dtype} {tuple(scales.shape)}"
        )
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("a scale is infinite or not a number")


def expand(
    packed: PackedWeight,
    dtype: torch.dtype | None = None,
    offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense weight (O, I).

    Values that are stored as floats come back bit for bit where `dtype` is theirs (the default); int8 values
    are multiplied by their scale in float32 and rounded once to `dtype` (default bfloat16).

    Args:
        packed: a weight that `check` accepted.
        dtype: bfloat16, float16 or float32.
        offsets: what `check` returned, to save counting again.
        out: contiguous memory that the kernel may write the result to: (O, I) of `dtype`.
    """
    scales, device = packed.scales, packed.values.device
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
    weight = _placed(values, packed)
    return (weight if scales is None else weight * scales[:, None]).to(target)


def expand_rows(
    packed: PackedWeight, rows: torch.Tensor, offsets: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Some rows of the dense weight, as `expand` would give them: rows (...) int -> (..., I).

    Args:
        packed: a weight on the CPU that `check` accepted.
        rows: on the CPU, in any order, more than once if need be.
        offsets: what `check` returned.
        dtype: bfloat16, float16 or float32.

    Raises:
        IndexError: there is no such row.
    """
    kernels = load()
    if kernels is None:
        return expand(packed, dtype, offsets)[rows]
    if not rows.numel():
        return torch.empty(*rows.shape, packed.shape[1], dtype=dtype)
    scales, wanted = packed.scales, rows.to(torch.int64).contiguous()
    written = (
        packed.dtype if scales is None else dtype if dtype == torch.float16 else torch.bfloat16
    )
    out = torch.empty(*rows.shape, packed.shape[1], dtype=written)
    if scales is None or dtype == written:
        kernels.expand_rows(packed, offsets, wanted, out)
        return out.to(dtype)
    # Integers up to 128 are exact in bfloat16.
    kernels.expand_rows(packed._replace(scales=torch.ones_like(scales)), offsets, wanted, out)
    return out.float() * scales[wanted][..., None]


def _placed(values_K: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """Values (K,) of any dtype, perhaps filled up, where the mask has them, zeros elsewhere: (O, I)."""
    rows, columns = packed.shape
    if packed.mask is None:
        return values_K[: rows * columns].view(rows, columns)
    keep_OI = ((packed.mask[:, :, None] & _PLACES.to(packed.mask.device)) != 0).view(rows, -1)[
        :, :columns
    ]
    weight_OI = values_K.new_zeros(rows, columns)
    weight_OI[keep_OI] = values_K[: int(keep_OI.sum())]
    return weight_OI


def relative_error(weight_OI: torch.Tensor, packed: PackedWeight) -> float:
    """‖W − Ŵ‖² / ‖W‖² of a packed weight in float64 (0 where W is all zero)."""
    weight = weight_OI.double()
    total = weight.square().sum()
    if total == 0:
        return 0.0
    return float((weight - expand(packed, torch.float32).double()).square().sum() / total)
