"""Where channels and heads are on an axis of a tensor.

A unit is a channel of an MLP, a query head, or a key-value group. Units follow each other on an
axis, each with a number of entries of its own. Where linears are joined into one, its rows are
several such runs:

    gate_up_proj    all gates │ all ups                  two runs of channels
    qkv_proj        all queries │ all keys │ all values  one run of heads, two runs of groups

Shapes do not decide which of these it is, so `possible_spans` gives all that fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

UnitKind = Literal["channels", "heads", "groups"]
#: How many units of each kind there are before and after.
Units = Mapping[UnitKind, tuple[int, int]]
#: The units that stay, by kind.
KeptUnits = Mapping[UnitKind, Sequence[int]]


@dataclass(frozen=True)
class Span:
    """A run of units on an axis.

    Attributes:
        kind: what a unit is; "groups" are key-value groups.
        units: how many there are.
        width: entries per unit.
    """

    kind: UnitKind
    units: int
    width: int


@dataclass(frozen=True)
class Cut:
    """An axis of a tensor that becomes shorter.

    Attributes:
        axis: which one.
        spans: the runs of units on it, from its first entry to its last.

    >>> gate_up = Cut(0, (Span("channels", 3, 1), Span("channels", 3, 1)))
    >>> gate_up.entries({"channels": [0, 2]})
    [0, 2, 3, 5]
    """

    axis: int
    spans: tuple[Span, ...]

    def entries(self, kept: KeptUnits) -> list[int]:
        """The entries of the axis that belong to some units; none of a kind that is not named."""
        found: list[int] = []
        start = 0
        for span in self.spans:
            for unit in kept.get(span.kind, ()):
                first = start + unit * span.width
                found += range(first, first + span.width)
            start += span.units * span.width
        return found

    def take(self, tensor: Tensor, kept: KeptUnits) -> Tensor:
        """The tensor with only the units that stay."""
        return tensor.index_select(self.axis, torch.tensor(self.entries(kept)))


def possible_spans(length: tuple[int, int], units: Units, width: int) -> list[tuple[Span, ...]]:
    """The runs of units that an axis may consist of, the likeliest first.

    Args:
        width: entries per unit where units are read.

    >>> possible_spans((6, 4), {"channels": (3, 2)}, 1)[0]
    (Span(kind='channels', units=3, width=1), Span(kind='channels', units=3, width=1))
    """
    found: list[tuple[Span, ...]] = []
    # Key-value groups are tried first: where whole groups are removed, their rows may also count
    # as heads.
    kinds = sorted(units, key=lambda kind: kind != "groups")
    for kind in kinds:
        for each in (1, width):
            if length == (units[kind][0] * each, units[kind][1] * each):
                return [(Span(kind, units[kind][0], each),)]

    def add(*spans: Span) -> None:
        whole = sum(span.units * span.width for span in spans)
        left = sum(units[span.kind][1] * span.width for span in spans)
        if (whole, left) == length:
            found.append(spans)

    for kind in kinds:
        count = units[kind][0]
        several = [[Span(kind, count, width)] * runs for runs in (2, 3)]
        one = [Span(kind, count, max(1, length[0] // count))]
        for spans in [*several, one] if kind == "channels" else [one, *several]:
            add(*spans)
    if "heads" in units:
        heads = Span("heads", units["heads"][0], width)
        other = Span("groups", units["groups"][0], width) if "groups" in units else heads
        if other != heads:
            add(heads, other, other)
    return found
