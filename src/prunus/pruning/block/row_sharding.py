"""Splits the rows of a linear over ranks: each rank solves its rows, and all get the whole linear.

Shape suffixes: O outputs (rows), I inputs (columns), B bytes or columns of a block.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.distributed import Ranks, split_range
from prunus.methods.base import Pruned
from prunus.methods.work import UNSHARDED, RowShard, RowSharding

# Notes that count something: those of the shards add up. Of other numbers the largest is kept.
_COUNTS = frozenset({"swaps"})


def row_sharding(ranks: Ranks) -> RowSharding:
    """How methods split the rows of a linear over these ranks."""
    return _RowsOverRanks(ranks) if ranks.size > 1 else UNSHARDED


@dataclass(frozen=True)
class _RankShard:
    """The rows of one rank; see `RowShard`."""

    ranks: Ranks
    rows: slice
    lengths: list[int]

    def joint_mask(self, score_OB: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        return choose(self.ranks.all_gather(score_OB, self.lengths))[self.rows]

    def sum(self, number: float) -> float:
        return self.ranks.sum_floats([number])[0]


@dataclass(frozen=True)
class _RowsOverRanks:
    """One shard per rank; see `RowSharding`. With too few rows, every rank solves all of them."""

    ranks: Ranks

    def solve(self, rows: int, rows_per_group: int, solve: Callable[[RowShard], Pruned]) -> Pruned:
        lengths = [len(part) for part in split_range(rows, self.ranks.size, rows_per_group)]
        if not all(lengths):
            return UNSHARDED.solve(rows, rows_per_group, solve)
        # Rows that compete with each other stay on one rank.
        own = self.ranks.own_range(rows, rows_per_group)
        pruned = solve(_RankShard(self.ranks, slice(own.start, own.stop), lengths))
        notes = [json.loads(text) for text in self.ranks.gather_text(json.dumps(pruned.notes))]
        # Weights and masks travel side by side, row by row, as bytes: one message instead of two.
        weight_OI, keep_OI = pruned.weight_OI.contiguous(), pruned.keep_OI.contiguous()
        sides = [weight_OI.view(torch.uint8), keep_OI.view(torch.uint8)]
        all_OB = self.ranks.all_gather(torch.cat(sides, dim=1), lengths)
        weight_OB, keep_OI = all_OB.split([side.shape[1] for side in sides], dim=1)
        return Pruned(
            weight_OB.contiguous().view(pruned.weight_OI.dtype),
            keep_OI.contiguous().view(torch.bool),
            _merge_notes(notes),
        )


def _merge_notes(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up counts, keep the largest of other numbers, and keep the last of texts.

    >>> _merge_notes([{"swaps": 2, "damping": 0.1}, {"swaps": 3, "damping": 0.2}])
    {'swaps': 5, 'damping': 0.2}
    """
    merged: dict[str, Any] = {}
    for notes in by_rank:
        for key, value in notes.items():
            if key not in merged or isinstance(value, str):
                merged[key] = value
            else:
                merged[key] = merged[key] + value if key in _COUNTS else max(merged[key], value)
    return merged
