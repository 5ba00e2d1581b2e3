"""The rows of a linear shared out over ranks: each solves its part, and all get the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.distributed import Ranks, split_range
from prunus.methods.base import UNSHARDED, Pruned, RowShard, RowSharding

__all__ = ["row_sharding"]

# Notes that count: those of parts add up. Of other numbers the largest holds, and of words anybody's.
_COUNTS = frozenset({"swaps"})


def row_sharding(ranks: Ranks) -> RowSharding:
    """How methods share rows out where there are these ranks."""
    return _RowsOverRanks(ranks) if ranks.size > 1 else UNSHARDED


@dataclass(frozen=True)
class _Share:
    """See `RowShard`."""

    ranks: Ranks
    rows: slice
    lengths: list[int]

    def keep_among_all_rows(self, score_OB: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
        return keep(self.ranks.all_gather(score_OB, self.lengths))[self.rows]

    def sum(self, number: float) -> float:
        return self.ranks.sum_floats([number])[0]


@dataclass(frozen=True)
class _RowsOverRanks:
    """See `RowSharding`. Where there are not enough rows for all ranks, each solves all of them."""

    ranks: Ranks

    def solve(self, count: int, together: int, solve: Callable[[RowShard], Pruned]) -> Pruned:
        lengths = [len(part) for part in split_range(count, self.ranks.size, together)]
        if not all(lengths):
            return UNSHARDED.solve(count, together, solve)
        mine = self.ranks.own_range(count, together)
        pruned = solve(_Share(self.ranks, slice(mine.start, mine.stop), lengths))
        notes = [json.loads(text) for text in self.ranks.gather_text(json.dumps(pruned.notes))]
        # Weights and masks travel side by side, row by row, in one meeting.
        weight_OI, keep_OI = pruned.weight_OI.contiguous(), pruned.keep_OI.contiguous()
        sides = [weight_OI.view(torch.uint8), keep_OI.view(torch.uint8)]
        all_OB = self.ranks.all_gather(torch.cat(sides, dim=1), lengths)
        weight_OB, keep_OI = all_OB.split([side.shape[1] for side in sides], dim=1)
        return Pruned(
            weight_OB.contiguous().view(pruned.weight_OI.dtype),
            keep_OI.contiguous().view(torch.bool),
            _merged(notes),
        )


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for notes in parts:
        for key, value in notes.items():
            if key not in merged or isinstance(value, str):
                merged[key] = value
            else:
                merged[key] = merged[key] + value if key in _COUNTS else max(merged[key], value)
    return merged
