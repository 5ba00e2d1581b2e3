"""How much has to go for a size: part of benchmarks/structure.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import prunus
from prunus.model.block_lists import find_block_list
from prunus.pruning.job import RunOptions
from prunus.pruning.structure.plan import plan_structure

#: Shares of width that are tried are multiples of one part in so many.
STEPS = 128


class Sizes:
    """The sizes that a model can have: shares of its parameters in blocks.

    Args:
        model: its checkpoint folder.
        ids: calibration windows (windows, tokens).
    """

    def __init__(self, model: Path, ids: torch.Tensor) -> None:
        self._model, self._ids = model, ids
        self._narrowed: dict[int, float] = {0: 1.0}

    @cached_property
    def of_blocks(self) -> list[int]:
        """Parameters of each block."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self._model))
        return [parameters(block) for block in find_block_list(model)[1]]

    def blocks(self, size: float) -> int:
        """The number of blocks to keep that comes nearest to a size; of two the smaller."""
        count = len(self.of_blocks)
        return min(range(1, count), key=lambda keep: abs(keep / count - size))

    def width(self, size: float) -> float:
        """The share of width to remove that comes nearest to a size."""
        step = nearest(self._share_at, STEPS - 1, size)
        return max(1, step) / STEPS

    def _share_at(self, step: int) -> float:
        """The share of the parameters in blocks that stays without some steps of width."""
        if step not in self._narrowed:
            options: dict[str, Any] = {"samples": len(self._ids), "seqlen": self._ids.shape[1]}
            recipe = prunus.StructureRecipe(
                width=step / STEPS, calibration="token ids", repair=False, **options
            )
            output = self._model.parent / "is not written"
            try:
                job = plan_structure(self._model, output, recipe, RunOptions(input_ids=self._ids))
            except ValueError:
                return 1.0  # less than one channel or head would go
            smaller = job.smaller(range(len(self.of_blocks))).skeleton
            share = sum(map(parameters, smaller.blocks)) / sum(self.of_blocks)
            self._narrowed[step] = share
        return self._narrowed[step]


def nearest(share_at: Callable[[int], float], last: int, size: float) -> int:
    """The step of 0 to `last` whose share, which never rises, is nearest to a size.

    >>> nearest(lambda step: 1 - step / 10, 9, 0.72)
    3
    """
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share_at(middle) > size else (low, middle)
    return min((high, low), key=lambda step: abs(share_at(step) - size))


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
