"""Which tensors of a block the channels of an MLP, or the heads, are part of.

Two blocks without weights are compared, one of them with fewer channels or heads. One linear reads
them: the one with fewer columns. The other tensors that become shorter write them.

A unit is a channel of an MLP, a query head, or a key-value group. Units follow each other on an
axis, each with a number of entries of its own. Where linears are joined into one, its rows are
several such runs:

    gate_up_proj    all gates │ all ups                  two runs of channels
    qkv_proj        all queries │ all keys │ all values  one run of heads, two runs of groups

Shapes often leave several possibilities. Running the block decides: with zeros in some columns of
the linear that reads the units, nothing that writes these units can change the output. So one
layout after the other is tried. Noise replaces the entries that it gives to some units, and the
layout holds if the output of the block stays the same to the bit.

Names of tensors and linears here are relative to their block, such as `mlp.down_proj.weight`.
Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from prunus.model.linears import Linear, find_linears
from prunus.model.skeleton import Skeleton
from prunus.model.source import Source
from prunus.model.stream import Stream
from prunus.structure.layout import axis_that_changes, shapes_of

# Tokens of the one window that a block is run on.
_TRIAL_TOKENS = 16

#: What a unit is: a channel of an MLP, a query head, or a key-value group.
UnitKind = Literal["channels", "heads", "groups"]
#: Kind of a unit -> how many there are before and after.
Units = Mapping[UnitKind, tuple[int, int]]
#: Kind of a unit -> old numbers of some of them, mostly of those that stay.
KeptUnits = Mapping[UnitKind, Sequence[int]]


@dataclass(frozen=True)
class Span:
    """A run of units that follow each other on an axis."""

    #: What a unit is.
    kind: UnitKind
    #: How many units there are.
    units: int
    #: Entries of the axis per unit.
    width: int


@dataclass(frozen=True)
class Cut:
    """An axis of a tensor that becomes shorter, and the runs of units on it in order.

    Attributes:
        axis: The axis, from 0.
        spans: The runs of units, from the first entry of the axis to its last.

    >>> gate_up = Cut(0, (Span("channels", 3, 1), Span("channels", 3, 1)))
    >>> gate_up.entries({"channels": [0, 2]})
    [0, 2, 3, 5]
    """

    axis: int
    spans: tuple[Span, ...]

    def entries(self, units: KeptUnits) -> list[int]:
        """The entries of the axis that belong to some units, in the order of the axis.

        A kind that `units` does not name has no entries.
        """
        entries: list[int] = []
        start = 0
        for span in self.spans:
            for unit in units.get(span.kind, ()):
                first = start + unit * span.width
                entries += range(first, first + span.width)
            start += span.units * span.width
        return entries


def possible_spans(length: tuple[int, int], units: Units, width: int) -> list[tuple[Span, ...]]:
    """The runs of units that an axis may consist of, the likeliest first.

    Args:
        length: Entries of the axis before and after.
        units: How many units of each kind there are before and after.
        width: Entries per unit on the axis where a linear reads them.

    Returns:
        One tuple of runs per possibility. It is empty if no runs of these units have this length.

    >>> possible_spans((6, 4), {"channels": (3, 2)}, 1)[0]
    (Span(kind='channels', units=3, width=1), Span(kind='channels', units=3, width=1))
    """
    # Key-value groups are tried first: where whole groups are removed, their rows may also count
    # as heads.
    kinds = sorted(units, key=lambda kind: kind != "groups")
    for kind in kinds:
        for entries in (1, width):
            if length == (units[kind][0] * entries, units[kind][1] * entries):
                return [(Span(kind, units[kind][0], entries),)]
    possible: list[tuple[Span, ...]] = []
    for kind in kinds:
        count = units[kind][0]
        # One run whose units are wider than where they are read, or runs of joined linears.
        one = (Span(kind, count, max(1, length[0] // count)),)
        several = [(Span(kind, count, width),) * runs for runs in (2, 3)]
        possible += [*several, one] if kind == "channels" else [one, *several]
    if "groups" in units:  # queries, keys and values in one linear
        groups = Span("groups", units["groups"][0], width)
        possible.append((Span("heads", units["heads"][0], width), groups, groups))

    def fits(spans: Sequence[Span]) -> bool:
        before = sum(span.units * span.width for span in spans)
        return length == (before, sum(units[span.kind][1] * span.width for span in spans))

    return list(filter(fits, possible))


@dataclass(frozen=True)
class PartLayout:
    """The tensors of one block that the channels of an MLP, or the heads, are part of."""

    #: Relative name of the linear whose inputs the units are, such as `mlp.down_proj`.
    reader: str
    #: The run of units that its inputs are, before the cut.
    read: Span
    #: How many units of `read` stay.
    keep: int
    #: Relative name of a tensor -> the axis that becomes shorter. It includes the reader's weight.
    cuts: dict[str, Cut]


class _Change(NamedTuple):
    """How a tensor becomes smaller."""

    #: The axis that becomes shorter.
    axis: int
    #: Entries of that axis before and after.
    length: tuple[int, int]


class LayoutFinder:
    """Finds the layouts of the blocks of a model. Blocks of one kind are run once.

    Args:
        skeleton: The old model without weights, with all its experts.
        source: The weights of the old model.
        device: Where blocks run when shapes do not decide.
    """

    def __init__(self, skeleton: Skeleton, source: Source, device: torch.device) -> None:
        self._skeleton, self._source, self._device = skeleton, source, device
        # What was tried -> the layout that holds, None if none does.
        self._chosen: dict[tuple[object, ...], Cut | None] = {}

    def channels(self, old: nn.Module, new: nn.Module, index: int) -> list[PartLayout]:
        """Where the channels of each MLP are. Every routed expert is an MLP of its own.

        Args:
            old: The block, without weights.
            new: The block with fewer channels, without weights.
            index: Old position of the block.

        Raises:
            NotImplementedError: The channels are read or written in another way than in an MLP, or
                no layout holds.
        """
        changes, readers = _changes(old, new, "channels")
        # The tensors of an MLP are in the module of the linear that reads its channels.
        owners = {name.rpartition(".")[0]: name for name in readers}
        if len(owners) != len(readers) or (changes and not readers):
            raise NotImplementedError(
                f"{len(readers)} linears of a block read its channels, and one is needed per MLP: "
                "this family cannot become narrower yet"
            )
        parts: dict[str, dict[str, _Change]] = {name: {} for name in readers}
        for name, change in changes.items():
            inside = [owner for owner in owners if not owner or name.startswith(f"{owner}.")]
            if not inside:
                raise NotImplementedError(
                    f"{name} depends on the number of channels, and belongs to no MLP: this family "
                    "cannot become narrower yet"
                )
            parts[owners[max(inside, key=len)]][name] = change
        return [
            self._part(readers[name], part, {"channels": part[f"{name}.weight"].length}, index)
            for name, part in parts.items()
        ]

    def heads(self, old: nn.Module, new: nn.Module, units: Units, index: int) -> PartLayout | None:
        """Where the heads of a block are; None for a block without heads.

        Args:
            old: The block, without weights.
            new: The block with fewer heads, without weights.
            units: "heads", and "groups" if heads share them -> how many there are before and after.
            index: Old position of the block.

        Raises:
            NotImplementedError: Fewer heads would change more than sizes, or no layout holds.
        """
        changes, readers = _changes(old, new, "heads")
        if not changes:
            return None
        if len(readers) != 1:
            raise NotImplementedError(f"{len(readers)} linears of a block read them, and not one")
        (reader,) = readers.values()
        return self._part(reader, changes, units, index)

    def _part(
        self, reader: Linear, changes: Mapping[str, _Change], units: Units, index: int
    ) -> PartLayout:
        """The layout of the units that one linear reads."""
        kind: UnitKind = "channels" if "channels" in units else "heads"
        count, keep = units[kind]
        inputs = reader.shape[1]
        width = inputs // count
        if inputs != count * width:
            raise NotImplementedError(f"{reader.name} reads {inputs} inputs of {count} {kind}")
        read = Span(kind, count, width)
        cuts: dict[str, Cut] = {}
        linears = {linear.name for linear in self._skeleton.linears(index)}
        for name, (axis, length) in changes.items():
            # A tensor outside of linears may have one entry per head, such as an attention sink.
            # Any other would be a norm over all units.
            one_each = kind == "heads" and length[0] in {before for before, _ in units.values()}
            if name.rpartition(".")[0] not in linears and not one_each:
                raise NotImplementedError(
                    f"{name} normalises all {kind} together, so fewer of them would change the "
                    "others"
                )
            spans = possible_spans(length, units, width)
            if name == f"{reader.name}.weight":
                spans = [(read,)]
            layouts = [Cut(axis, runs) for runs in spans]
            # A single plain run needs no trial.
            if len(spans) == 1 and len(spans[0]) == 1 and spans[0][0].width in (1, width):
                chosen: Cut | None = layouts[0]
            else:
                chosen = self.choose(index, reader.name, Cut(axis, (read,)), name, layouts)
            if chosen is None:
                raise NotImplementedError(
                    f"{name} holds {length[0]} rows for {count} {kind}, in an order that is not "
                    "known"
                )
            cuts[name] = chosen
        return PartLayout(reader.name, read, keep, cuts)

    def choose(
        self, index: int, reader: str, read: Cut, name: str, layouts: Sequence[Cut]
    ) -> Cut | None:
        """The first layout of a tensor that holds when the block runs; None if none does.

        Args:
            index: Old position of the block.
            reader: Relative name of the linear that reads the units.
            read: The units on the axis of its inputs.
            name: Relative name of the tensor.
            layouts: The layouts to try, the likeliest first.
        """
        skeleton = self._skeleton
        key = (type(skeleton.blocks[index]), reader, read, name, *layouts)
        if key in self._chosen:
            return self._chosen[key]
        stream = Stream(skeleton, self._source, self._device)
        with contextlib.closing(stream), torch.no_grad():
            stream.embed([skeleton.trial_batch(_TRIAL_TOKENS)], None)
            hidden = stream.states.get(0)
            block = skeleton.fill(index, self._source.block(index), self._device)
            run = stream.call(index, block)
            linear = next(one for one in skeleton.linears(index) if one.name == reader)
            unread = _some_units(read.spans, layouts)
            weight_OI = linear.weight_OI.clone()
            weight_OI[:, read.entries(unread)] = 0
            linear.assign(weight_OI)
            expected = run(hidden)
            tensor = block.state_dict()[name]

            def holds(layout: Cut) -> bool:
                """Whether noise in place of the unread units leaves the output as it is."""
                entries = torch.tensor(
                    layout.entries(unread), dtype=torch.int64, device=tensor.device
                )
                before = tensor.index_select(layout.axis, entries)
                # Noise of the size of the weights. A bias may be zero everywhere.
                scale = before.float().abs().mean().clamp(min=0.01).cpu()
                noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
                tensor.index_copy_(layout.axis, entries, (noise * scale).to(tensor))
                same = torch.equal(run(hidden), expected)
                tensor.index_copy_(layout.axis, entries, before)
                return same

            self._chosen[key] = next((layout for layout in layouts if holds(layout)), None)
            skeleton.release(index)
        return self._chosen[key]


def _changes(
    old: nn.Module, new: nn.Module, what: str
) -> tuple[dict[str, _Change], dict[str, Linear]]:
    """Name of a tensor -> how it becomes shorter, and the linears that lose columns, by name.

    `what` names the units in messages.
    """
    before, after = shapes_of(old), shapes_of(new)
    changes: dict[str, _Change] = {}
    if before.keys() != after.keys():
        raise NotImplementedError(f"fewer {what} would change more than the sizes of this family")
    for name, shape in before.items():
        try:
            axis = axis_that_changes(shape, after[name])
        except ValueError as fault:
            raise NotImplementedError(
                f"fewer {what} would change this family in more than one way: {fault}"
            ) from fault
        if axis is not None:
            changes[name] = _Change(axis, (shape[axis], after[name][axis]))
    readers = {
        linear.name: linear
        for linear in find_linears(old)
        if (change := changes.get(f"{linear.name}.weight")) is not None
        and change.axis == (0 if linear.transposed else 1)
    }
    return changes, readers


def _some_units(read: Sequence[Span], layouts: Sequence[Cut]) -> KeptUnits:
    """A quarter of the units, but not all: key-value groups with their heads, if there are any."""
    ((kind, units),) = {(span.kind, span.units) for span in read}
    groups = {span.units for cut in layouts for span in cut.spans if span.kind == "groups"}
    if groups and (count := groups.pop()) > 1:
        some = max(1, count // 4)
        return {"heads": range(some * (units // count)), "groups": range(some)}
    return {kind: range(max(1, units // 4))}
