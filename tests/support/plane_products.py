"""Weights in bit planes for tests of the kernels, and what the kernels should compute."""

import numpy as np
import torch
from prunus.runtime.weight import PlaneCode, QuantizedWeight

from plane_reference import write_planes

# Columns of a block, whose 16 scales are picked by lane.
BLOCK = 256


def plane_weight(
    levels_OI: torch.Tensor,
    classes: list[int],
    codes: tuple[PlaneCode, ...],
    rows_per_chunk: int,
    seed: int = 0,
) -> QuantizedWeight:
    rows, columns = levels_OI.shape
    generator = torch.Generator().manual_seed(seed)
    data = write_planes(levels_OI.tolist(), classes, list(codes), rows_per_chunk)
    return QuantizedWeight(
        (rows, columns),
        torch.tensor(list(data), dtype=torch.uint8),
        torch.tensor(classes, dtype=torch.uint8),
        (0.5 + torch.rand(columns, generator=generator)).bfloat16(),
        (0.01 + torch.rand(rows, generator=generator)).bfloat16(),
        codes,
        rows_per_chunk,
    )


def dense(levels_OI: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """The dense weight, exact in float64 (O, I)."""
    return levels_OI.double() * weight.steps.double() * weight.scales.double()[:, None]


def rounded_inputs(x_TI: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """What the kernels multiply the integers by, float64 (T, I).

    That is x · step, rounded to int8 in blocks of 256 columns of a class. A block has 16 scales,
    number l for the columns 4l to 4l + 3 of each 64.
    """
    scaled = (x_TI.float() * weight.steps.float()).numpy()
    result = np.zeros(scaled.shape)
    classes = weight.classes.numpy()
    for which in range(len(weight.codes)):
        members = np.flatnonzero(classes == which)
        for first in range(0, len(members), BLOCK):
            columns = members[first : first + BLOCK]
            lanes = np.arange(len(columns)) % 64 // 4
            for lane in range(16):
                chosen = columns[lanes == lane]
                if not len(chosen):
                    continue
                part = scaled[:, chosen]
                scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
                inverse = np.float32(1) / np.where(scale > 0, scale, np.float32(1))
                integers = np.rint(part * inverse).astype(np.float64)
                result[:, chosen] = integers * scale.astype(np.float64)
    return torch.from_numpy(result)
