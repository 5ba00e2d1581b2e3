"""The rows of a linear shared out over ranks: each solves its part, and all get the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.distributed import Ranks, shares
from prunus.methods.base import ALL_ROWS, Part, Pruned, Rows

__all__ = ["rows_over"]

# Notes that count: those of parts add up. Of other numbers the largest holds, and of words anybody's.
_COUNTS = frozenset({"swaps"})


def rows_over(ranks: Ranks) -> Rows:
    """How methods share rows out where there are these ranks."""
    return _SharedRows(ranks) if ranks.size > 1 else ALL_ROWS


@dataclass(frozen=True)
class _Share:
    """See `Part`."""

    ranks: Ranks
    rows: slice
    lengths: list[int]

    def among_all(self, score_OB: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
        return keep(self.ranks.concatenate(score_OB, self.lengths))[self.rows]

    def total(self, number: float) -> float:
        return self.ranks.totals([number])[0]


@dataclass(frozen=True)
class _SharedRows:
    """See `Rows`. Where there are not enough rows for all ranks, each solves all of them."""

    ranks: Ranks

    def share(self, count: int, together: int, solve: Callable[[Part], Pruned]) -> Pruned:
        lengths = [len(part) for part in shares(count, self.ranks.size, together)]
        if not all(lengths):
            return ALL_ROWS.share(count, together, solve)
        mine = self.ranks.share(count, together)
        pruned = solve(_Share(self.ranks, slice(mine.start, mine.stop), lengths))
        notes = [json.loads(text) for text in self.ranks.gather_text(json.dumps(pruned.notes))]
        # Weights and masks travel side by side, row by row, in one meeting.
        weight_OI, keep_OI = pruned.weight_OI.contiguous(), pruned.keep_OI.contiguous()
        sides = [weight_OI.view(torch.uint8), keep_OI.view(torch.uint8)]
        all_OB = self.ranks.concatenate(torch.cat(sides, dim=1), lengths)
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
