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
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prunus.model.linears import Linear, find_linears
from prunus.model.skeleton import Skeleton
from prunus.model.source import Source
from prunus.model.stream import Stream
from prunus.structure.layout import axis_that_changes, shapes_of

_TRIAL_TOKENS = 16

UnitKind = Literal["channels", "heads", "groups"]
#: How many units of each kind there are before and after.
Units = Mapping[UnitKind, tuple[int, int]]
#: The units that stay, by kind.
KeptUnits = Mapping[UnitKind, Sequence[int]]


@dataclass(frozen=True)
class Span:
    """A run of `units` units on an axis, each of them `width` entries."""

    kind: UnitKind
    units: int
    width: int


@dataclass(frozen=True)
class Cut:
    """An axis of a tensor that becomes shorter, and the runs of units on it in order.

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

    Where units are read, each has `width` entries.

    >>> possible_spans((6, 4), {"channels": (3, 2)}, 1)[0]
    (Span(kind='channels', units=3, width=1), Span(kind='channels', units=3, width=1))
    """
    # Key-value groups are tried first: where whole groups are removed, their rows may also count
    # as heads.
    kinds = sorted(units, key=lambda kind: kind != "groups")
    for kind in kinds:
        for each in (1, width):
            if length == (units[kind][0] * each, units[kind][1] * each):
                return [(Span(kind, units[kind][0], each),)]
    possible: list[tuple[Span, ...]] = []
    for kind in kinds:
        count = units[kind][0]
        one = (Span(kind, count, max(1, length[0] // count)),)
        several = [(Span(kind, count, width),) * runs for runs in (2, 3)]
        possible += [*several, one] if kind == "channels" else [one, *several]
    if "groups" in units:
        groups = Span("groups", units["groups"][0], width)
        possible.append((Span("heads", units["heads"][0], width), groups, groups))

    def fits(spans: Sequence[Span]) -> bool:
        before = sum(span.units * span.width for span in spans)
        return length == (before, sum(units[span.kind][1] * span.width for span in spans))

    return list(filter(fits, possible))


@dataclass(frozen=True)
class PartLayout:
    """The tensors of one block that the channels of an MLP, or the heads, are part of."""

    reader: str  #: the linear whose inputs they are, such as `mlp.down_proj`
    read: Span  #: the run of units that its inputs are, of which `keep` stay
    keep: int
    #: relative name of a tensor -> the axis that becomes shorter, of the reader's too.
    cuts: dict[str, Cut]


class _Change(NamedTuple):
    """The axis of a tensor that becomes shorter, and its length before and after."""

    axis: int
    length: tuple[int, int]


class LayoutFinder:
    """Finds the layouts of the blocks of a model. Blocks of one kind are run once."""

    def __init__(self, skeleton: Skeleton, source: Source, device: torch.device) -> None:
        self._skeleton, self._source, self._device = skeleton, source, device
        self._known: dict[tuple[object, ...], Cut | None] = {}

    def channels(self, old: nn.Module, new: nn.Module, index: int) -> list[PartLayout]:
        """Where the channels of each MLP are. Every routed expert is an MLP of its own."""
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
        """Where the heads of a block are; None for a block without heads."""
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
        inputs, width = reader.shape[1], reader.shape[1] // count
        if inputs != count * width:
            raise NotImplementedError(f"{reader.name} reads {inputs} inputs of {count} {kind}")
        read, cuts = Span(kind, count, width), dict[str, Cut]()
        linears = {linear.name for linear in self._skeleton.linears(index)}
        for name, (axis, length) in changes.items():
            one_each = kind == "heads" and length[0] in {before for before, _ in units.values()}
            if name.rpartition(".")[0] not in linears and not one_each:
                raise NotImplementedError(
                    f"{name} normalises all {kind} together, so fewer of them would change the "
                    "others"
                )
            spans = possible_spans(length, units, width)
            if name == f"{reader.name}.weight":
                spans = [(read,)]
            layouts = [Cut(axis, each) for each in spans]
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
        """The first layout of a tensor that holds when the block runs; None if none does."""
        skeleton = self._skeleton
        key = (type(skeleton.blocks[index]), reader, read, name, *layouts)
        if key in self._known:
            return self._known[key]
        stream = Stream(skeleton, self._source, self._device)
        with contextlib.closing(stream), torch.no_grad():
            stream.embed([skeleton.trial_batch(_TRIAL_TOKENS)], None)
            hidden = stream.states.get(0)
            block = skeleton.fill(index, self._source.block(index), self._device)
            run = stream.call(index, block)
            linear = next(each for each in skeleton.linears(index) if each.name == reader)
            unread = _some_units(read.spans, layouts)
            weight_OI = linear.weight_OI.clone()
            weight_OI[:, read.entries(unread)] = 0
            linear.assign(weight_OI)
            expected, tensor = run(hidden), block.state_dict()[name]

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

            self._known[key] = next((layout for layout in layouts if holds(layout)), None)
            skeleton.release(index)
        return self._known[key]


def _changes(
    old: nn.Module, new: nn.Module, what: str
) -> tuple[dict[str, _Change], dict[str, Linear]]:
    """Name of a tensor -> how it becomes shorter, and the linears that lose columns."""
    before, after, found = shapes_of(old), shapes_of(new), dict[str, _Change]()
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
            found[name] = _Change(axis, (shape[axis], after[name][axis]))
    readers = {
        linear.name: linear
        for linear in find_linears(old)
        if (change := found.get(f"{linear.name}.weight")) is not None
        and change.axis == (0 if linear.transposed else 1)
    }
    return found, readers


def _some_units(read: Sequence[Span], layouts: Sequence[Cut]) -> KeptUnits:
    """A quarter of the units, but not all: key-value groups with their heads, if there are any."""
    ((kind, units),) = {(span.kind, span.units) for span in read}
    groups = {span.units for cut in layouts for span in cut.spans if span.kind == "groups"}
    found: dict[UnitKind, range] = {kind: range(max(1, units // 4))}
    if groups and (count := groups.pop()) > 1:
        some = max(1, count // 4)
        found = {"heads": range(some * (units // count)), "groups": range(some)}
    return found
