"""The bitmap of one weight: which entries survived, and their values. `docs/bitmap-format.md` is the reference.

Knows tensors; nothing of files, modules or models.

Shape suffixes: O output features (rows), I input features (columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prunus.sparse.kernels import load

__all__ = [
    "INT8_LEVELS",
    "PackedWeight",
    "check",
    "expand",
    "kept",
    "pack_weight",
    "packed_nbytes",
    "relative_error",
    "row_offsets",
]

#: int8 values go from -INT8_LEVELS to INT8_LEVELS, so that the scale is the row's largest magnitude / 127.
INT8_LEVELS = 127
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)
_PLACES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight (O, I) as a bitmap.

    Attributes:
        mask: uint8 (O, ceil(I / 8)); bit j % 8 of byte j // 8 is set where column j survived. Bits beyond
            the last column are 0.
        values: (kept,) the survivors, row after row, left to right: bfloat16 or float16 as in the original,
            or int8.
        scales: float32 (O,) for int8 values: entry = value · scale of its row; otherwise None.
        in_features: I.
    """

    mask: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.in_features

    @property
    def nbytes(self) -> int:
        tensors = [self.mask, self.values] + ([] if self.scales is None else [self.scales])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept(weight_OI: torch.Tensor) -> torch.Tensor:
    """bool (O, I): entries that are not exactly +0.0. A -0.0 counts as kept, so that packing loses no bit."""
    if weight_OI.dtype not in _BITS:
        raise ValueError(f"weights must be bfloat16, float16 or float32 to be packed, got {weight_OI.dtype}")
    return weight_OI.view(_BITS[weight_OI.dtype]) != 0


def packed_nbytes(out_features: int, in_features: int, count: int, value_bytes: int) -> int:
    """Bytes of mask and values (and, for one-byte values, scales) of a packed weight with `count` survivors."""
    scales = 4 * out_features if value_bytes == 1 else 0
    return out_features * -(-in_features // 8) + count * value_bytes + scales


def pack_weight(weight_OI: torch.Tensor, values: torch.dtype) -> PackedWeight:
    """Pack a weight.

    Args:
        weight_OI: on the CPU; any strides.
        values: the dtype of `weight_OI` (lossless, bfloat16 or float16), or int8: symmetric, one scale per
            row, nearest. The set of survivors is the same either way.

    Raises:
        ValueError: a dtype that cannot be packed this way, or, for int8, a weight that is not finite.
    """
    weight_OI = weight_OI.contiguous()
    keep = kept(weight_OI)
    rows, columns = weight_OI.shape
    bits = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8)
    bits[:, :columns] = keep
    mask = (bits.view(rows, -1, 8) * _PLACES).sum(dim=2, dtype=torch.uint8)
    if values == torch.int8:
        weight = weight_OI.float()
        largest = weight.abs().amax(dim=1) if columns else torch.zeros(rows)
        if not torch.isfinite(largest).all():
            raise ValueError("weights that are infinite or not a number cannot be packed as int8")
        scales = torch.where(largest > 0, largest / INT8_LEVELS, torch.ones(rows))
        # A row of subnormals can have a scale of 0 once divided.
        scales = torch.where(scales > 0, scales, torch.ones(rows))
        levels = (weight / scales[:, None]).round().clamp(-INT8_LEVELS, INT8_LEVELS)
        return PackedWeight(mask, levels[keep].to(torch.int8), scales, columns)
    if values != weight_OI.dtype or values == torch.float32:
        raise ValueError(
            f"weights of {weight_OI.dtype} cannot be packed as {values} without loss; float32 weights must be "
            "converted to bfloat16 or float16 first, or packed as int8"
        )
    return PackedWeight(mask, weight_OI[keep], None, columns)


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


def check(packed: PackedWeight) -> torch.Tensor:
    """See that mask, values and scales belong together, before anything is computed with them.

    Returns:
        The row offsets (see `row_offsets`).

    Raises:
        ValueError: saying what does not fit.
    """
    mask, values, scales = packed.mask, packed.values, packed.scales
    rows, columns = mask.shape[0] if mask.dim() else 0, packed.in_features
    if rows < 1 or columns < 1:
        raise ValueError(f"a packed weight needs at least one row and one column, got {rows} x {columns}")
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, -(-columns // 8)):
        raise ValueError(
            f"the mask of a weight of {rows} x {columns} must be uint8 ({rows}, {-(-columns // 8)}), "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if values.dim() != 1 or values.dtype not in (torch.bfloat16, torch.float16, torch.int8):
        raise ValueError(
            f"packed values must be one row of bfloat16, float16 or int8, got {values.dtype} {tuple(values.shape)}"
        )
    if (values.dtype == torch.int8) != (scales is not None):
        raise ValueError("int8 values need scales, and no others have them")
    if scales is not None:
        if scales.dtype != torch.float32 or tuple(scales.shape) != (rows,):
            raise ValueError(f"scales must be float32 ({rows},), got {scales.dtype} {tuple(scales.shape)}")
        if not bool(torch.isfinite(scales).all()):
            raise ValueError("a scale is infinite or not a number")
    offsets = row_offsets(mask.cpu().contiguous(), columns).to(mask.device)
    if int(offsets[-1]) != values.shape[0]:
        raise ValueError(
            f"the mask keeps {int(offsets[-1]):,} weights but there are {values.shape[0]:,} values"
        )
    return offsets


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
    mask, values, scales = packed.mask, packed.values, packed.scales
    written = torch.bfloat16 if scales is not None else values.dtype
    target = dtype or written
    if scales is not None and target == torch.float16:
        written = target
    kernels = load() if mask.device.type == "cpu" else None
    if kernels is not None and (scales is None or target == written):
        offsets = row_offsets(mask, packed.in_features) if offsets is None else offsets
        if out is None or target != written:
            out = torch.empty(packed.shape, dtype=written)
        kernels.expand(mask, values, offsets, scales, out)
        return out.to(target)
    rows, columns = packed.shape
    keep = ((mask[:, :, None] & _PLACES.to(mask.device)) != 0).view(rows, -1)[:, :columns]
    if scales is None:
        weight = torch.zeros(rows, columns, dtype=values.dtype, device=mask.device)
        weight[keep] = values
        return weight.to(target)
    levels = torch.zeros(rows, columns, dtype=torch.float32, device=mask.device)
    levels[keep] = values.float()
    return (levels * scales[:, None]).to(target)


def relative_error(weight_OI: torch.Tensor, packed: PackedWeight) -> float:
    """‖W − Ŵ‖² / ‖W‖² of a packed weight in float64 (0 where W is all zero)."""
    weight = weight_OI.double()
    total = weight.square().sum()
    if total == 0:
        return 0.0
    return float((weight - expand(packed, torch.float32).double()).square().sum() / total)
