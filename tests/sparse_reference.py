"""Slow and obvious versions of the bitmap format, and pruned models to pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny import tiny_model


def bitmap(weight: torch.Tensor) -> tuple[list[list[int]], list[float]]:
    """Mask bytes per row and surviving values of a small weight, one entry after another."""
    rows, values = [], []
    for row in weight.tolist():
        taken = [0] * ((len(row) + 7) // 8)
        for column, entry in enumerate(row):
            if entry != 0:
                taken[column // 8] |= 1 << (column % 8)
                values.append(entry)
        rows.append(taken)
    return rows, values


def random_sparse(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A weight whose first row is empty and whose last is full, where there are more than two."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) < density
    if rows > 2:
        keep[0], keep[-1] = False, True
    return torch.where(keep, torch.randn(rows, columns, generator=generator), torch.tensor(0.0)).to(dtype)


def prune_in_place(model: Any, sparsity: float = 0.5) -> Any:
    """Zero the smallest entries of every row of every matrix inside the blocks."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inside = any(part in name for part in (".layers.", ".h.", ".blocks."))
            if inside and parameter.dim() == 2:
                count = int(parameter.shape[1] * sparsity)
                smallest = parameter.float().abs().argsort(dim=1)[:, :count]
                parameter.scatter_(1, smallest, 0)
    return model


def pruned_checkpoint(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    sparsity: float = 0.5,
    **options: Any,
) -> Path:
    """A tiny pruned model, saved."""
    prune_in_place(tiny_model(family, dtype, **options), sparsity).save_pretrained(folder)
    return folder
