"""Weights and inputs for the tests of methods, from ordinary to degenerate.

Shape suffixes: O outputs (rows), I inputs, T tokens.
"""

import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from prunus.methods import METHODS, MethodOptions, Pruned
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics

PATTERNS = [
    Pattern(),
    Pattern(group="layer"),
    Pattern(group="column"),
    Pattern(group=3),
    Pattern(group="block", block_size=5),
    Pattern(group="block-row", block_size=5),
    Pattern(2, 4),
    Pattern(1, 3),
]
BY_BLOCKS = [Pattern(group="block-row"), Pattern(group="block"), Pattern(2, 4), Pattern(1, 3)]
#: Kind of degenerate example -> what makes it of an ordinary one (weight, inputs).
WEIRD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rank one": lambda weight_OI, X_TI: (weight_OI, X_TI[:, :1] * X_TI[:1]),
    "fewer tokens than inputs": lambda weight_OI, X_TI: (
        weight_OI,
        X_TI[: max(1, X_TI.shape[1] // 3)],
    ),
    "dead": lambda weight_OI, X_TI: (
        weight_OI,
        X_TI.index_fill(1, torch.arange(0, X_TI.shape[1], 2), 0),
    ),
    "all dead": lambda weight_OI, X_TI: (weight_OI, torch.zeros_like(X_TI)),
    "duplicates": lambda weight_OI, X_TI: (weight_OI, X_TI[:, :1].repeat(1, X_TI.shape[1])),
    "zero weight": lambda weight_OI, X_TI: (torch.zeros_like(weight_OI), X_TI),
    "one outlier": lambda weight_OI, X_TI: (
        weight_OI,
        torch.cat([X_TI[:, :-1], X_TI[:, -1:] * 1e6], dim=1),
    ),
}


def example(rows: int, columns: int, seed: int = 0, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A random weight (O, I), and correlated inputs (T, I) whose norms differ."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, columns, generator=generator)
    mix_II = torch.randn(columns, columns, generator=generator) + torch.eye(columns) * columns**0.5
    X_TI = torch.randn(tokens, columns, generator=generator) @ mix_II
    return weight_OI, X_TI * torch.rand(columns, generator=generator).add(0.1)


def weird_example(kind: str, rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A degenerate weight or input matrix of one of the kinds in `WEIRD`."""
    return WEIRD[kind](*example(rows, columns, seed))


def gather(X_TI: Tensor) -> InputStatistics:
    statistics = InputStatistics(X_TI.shape[1], "gram")
    statistics.add(X_TI)
    return statistics


def prune(
    name: str,
    weight_OI: Tensor,
    X_TI: Tensor,
    pattern: Pattern,
    sparsity: float = 0.5,
    block: int | None = None,
    **options,
) -> Pruned:
    """Prune, and check what holds for every method; no argument may change.

    Options may also be out of range. `block` is the width of a block; None for the pattern's.
    """
    statistics, before = gather(X_TI), gather(X_TI)
    given_OI = weight_OI.clone()
    chosen = MethodOptions.model_construct(**options)
    if block is not None:
        pattern = replace(pattern, block_size=block)
    pruned = METHODS[name].prune(weight_OI, statistics, pattern, sparsity, chosen)
    assert torch.equal(weight_OI, given_OI)
    assert torch.equal(statistics.gram_II, before.gram_II)
    assert torch.equal(statistics.sum_squares_I, before.sum_squares_I)
    assert pruned.weight_OI.shape == pruned.keep_OI.shape == weight_OI.shape
    assert pruned.weight_OI.is_contiguous()
    assert pruned.keep_OI.is_contiguous()
    assert pruned.weight_OI.isfinite().all()
    assert not pruned.weight_OI[~pruned.keep_OI].any()
    if not METHODS[name].updates_weights:
        assert torch.equal(pruned.weight_OI[pruned.keep_OI], weight_OI[pruned.keep_OI])
    return pruned


class ThreeShards:
    """Rows that three processes would solve, one after the other."""

    def solve(self, rows, rows_per_group, solve):
        assert rows_per_group == 1
        starts = [0, rows // 3, rows // 2, rows]
        # No shard asks another one here, so they need a slice of rows, and sums of their own.
        spans = [slice(*span) for span in itertools.pairwise(starts)]
        parts = [solve(SimpleNamespace(rows=span, sum=float)) for span in spans]
        names = [x.name for x in fields(parts[0]) if isinstance(getattr(parts[0], x.name), Tensor)]
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **whole)
