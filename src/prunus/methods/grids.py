"""Weights in grids, such as the types of GGUF: what is stored, and rounding without feedback."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunus.hardware.errors import did_you_mean
from prunus.methods.grid_fits import Scales, fit_scales
from prunus.methods.grid_packing import GRIDS, Grid, Spans, integer_grid, pack, unpack

__all__ = [
    "GRIDS", "Grid", "GridWeight", "grid_for", "grid_weight", "integer_grid", "round_to_grid",
]  # fmt: skip

# What llama.cpp takes where 256 does not divide a width.
_FALLBACKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}  # fmt: skip
# Weights that are rounded at once: few enough for the cache of a processor.
_ELEMENTS = 2**19


class GridWeight(NamedTuple):
    """A weight in a grid."""

    grid: Grid
    data_OB: Tensor  #: uint8 (O, bytes of a row); of a type of GGUF as a file stores it

    def dense(self) -> Tensor:
        """The weight, float32 (O, I)."""
        rows = len(self.data_OB)
        spans = unpack(self.data_OB.reshape(-1, self.grid.nbytes), self.grid)
        return spans.dense(self.grid).view(rows, -1)


def grid_for(name: str, columns: int) -> Grid:
    """The grid of a type, or what llama.cpp takes for it where its span does not divide a width.

    Raises:
        ValueError: where 32 does not divide the width, so that no grid suits it.

    >>> grid_for("Q3_K", 1536).name, grid_for("Q3_K", 576).name
    ('Q3_K', 'Q4_0')
    """
    if name not in GRIDS:
        raise ValueError(
            f"{name} is not a type that prunus writes: give one of {', '.join(GRIDS)}"
            f"{did_you_mean(name, GRIDS)}"
        )
    grid = GRIDS[name]
    if columns % grid.span:
        grid = GRIDS[_FALLBACKS.get(name, name)]
    if columns % grid.span:
        raise ValueError(
            f"{columns} columns cannot be stored as {name}: give a width that 32 divides"
        )
    return grid


def round_to_grid(weight_OI: Tensor, grid: Grid, importance_I: Tensor | None = None) -> GridWeight:
    """Round a weight of any float dtype, with the scales of the smallest weighted squared error.

    `importance_I` weighs the squared error of each column, such as the mean square of an input
    (llama.cpp's importance matrix); None for equal weights.
    """
    columns = weight_OI.shape[1]
    if importance_I is None or not bool(importance_I.any()):
        importance_I = torch.ones(columns, device=weight_OI.device)
    # A group of inputs that are always 0 keeps its weights: other texts may use them.
    importance_I = importance_I.float().clamp_min(1e-6 * float(importance_I.mean()))
    parts = []
    for rows_OI in weight_OI.split(max(1, _ELEMENTS // columns)):
        weight_IO = rows_OI.float().T.contiguous()
        scales, levels = [], []
        for weight_BO, importance_B in zip(
            weight_IO.split(grid.span), importance_I.split(grid.span), strict=True
        ):
            found = fit_scales(weight_BO, importance_B, grid)
            scales.append(found)
            levels.append(found.levels(weight_BO, grid))
        parts.append(grid_weight(scales, torch.cat(levels), grid).data_OB)
    return GridWeight(grid, torch.cat(parts))


def grid_weight(scales: list[Scales], levels_IO: Tensor, grid: Grid) -> GridWeight:
    """The weight of spans with their scales, and of levels, uint8 (I, O)."""
    d_NO, dmin_NO, codes_NGO, minima_NGO = (
        torch.stack(parts) for parts in zip(*scales, strict=True)
    )
    spans = Spans(
        d_NO.T.flatten(),
        dmin_NO.T.flatten(),
        codes_NGO.permute(2, 0, 1).flatten(0, 1),
        minima_NGO.permute(2, 0, 1).flatten(0, 1),
        levels_IO.T.reshape(-1, grid.span),
    )
    return GridWeight(grid, pack(spans, grid).view(levels_IO.shape[1], -1))
