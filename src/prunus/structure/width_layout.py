"""Which tensors of a block the channels of an MLP, or the heads, are part of.

Two blocks without weights are compared, one of them with fewer channels or heads. One linear reads
them: the one with fewer columns. The other tensors that become shorter write them.

Shapes often leave several possibilities for the order of the rows. Running the block decides: with
zeros in some columns of the linear that reads the units, nothing that writes these units can change
the output. So one layout after the other is tried. Noise replaces the entries that it gives to some
units, and the layout holds if the output of the block stays the same to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.model.linears import Linear, find_linears
from prunus.model.skeleton import Skeleton
from prunus.model.source import Source
from prunus.model.stream import Stream
from prunus.structure.layout import axis_that_changes, shapes_of
from prunus.structure.spans import Cut, KeptUnits, Span, UnitKind, Units, possible_spans

_TRIAL_TOKENS = 16


@dataclass(frozen=True)
class PartLayout:
    """The tensors of one block that the channels of an MLP, or the heads, are part of.

    Attributes:
        reader: the linear whose inputs they are, such as `mlp.down_proj`.
        read: the run of units that its inputs are.
        keep: how many of them stay.
        cuts: relative name of a tensor -> the axis that becomes shorter, of the reader's too.
    """

    reader: str
    read: Span
    keep: int
    cuts: dict[str, Cut]


class LayoutFinder:
    """Finds the layouts of the blocks of a model. Blocks of one kind are run once."""

    def __init__(self, skeleton: Skeleton, source: Source, device: torch.device) -> None:
        self._skeleton, self._source, self._device = skeleton, source, device
        self._known: dict[tuple[object, ...], Cut | None] = {}

    def channels(self, old: nn.Module, new: nn.Module, index: int) -> list[PartLayout]:
        """Where the channels of each MLP are. Every routed expert is an MLP of its own."""
        axes, readers = _changes(old, new, "channels")
        # The tensors of an MLP are in the module of the linear that reads its channels.
        owners = {name.rpartition(".")[0]: name for name in readers}
        if len(owners) != len(readers) or (axes and not readers):
            raise NotImplementedError(
                f"{len(readers)} linears of a block read its channels, and one is needed per MLP: "
                "this family cannot become narrower yet"
            )
        parts: dict[str, dict[str, int]] = {name: {} for name in readers}
        for name, axis in axes.items():
            inside = [owner for owner in owners if not owner or name.startswith(f"{owner}.")]
            if not inside:
                raise NotImplementedError(
                    f"{name} depends on the number of channels, and belongs to no MLP: this family "
                    "cannot become narrower yet"
                )
            parts[owners[max(inside, key=len)]][name] = axis
        found = []
        for name, of_part in parts.items():
            keep = shapes_of(new)[f"{name}.weight"][of_part[f"{name}.weight"]]
            units: Units = {"channels": (readers[name].shape[1], keep)}
            found.append(self._part(old, new, readers[name], of_part, units, index))
        return found

    def heads(self, old: nn.Module, new: nn.Module, units: Units, index: int) -> PartLayout | None:
        """Where the heads of a block are; None for a block without heads."""
        axes, readers = _changes(old, new, "heads")
        if not axes:
            return None
        if len(readers) != 1:
            raise NotImplementedError(f"{len(readers)} linears of a block read them, and not one")
        (reader,) = readers.values()
        return self._part(old, new, reader, axes, units, index)

    def _part(
        self,
        old: nn.Module,
        new: nn.Module,
        reader: Linear,
        axes: Mapping[str, int],
        units: Units,
        index: int,
    ) -> PartLayout:
        """The layout of the units that one linear reads."""
        shapes, after = shapes_of(old), shapes_of(new)
        kind: UnitKind = "channels" if "channels" in units else "heads"
        count, keep = units[kind]
        inputs, width = reader.shape[1], reader.shape[1] // count
        if inputs != count * width:
            raise NotImplementedError(f"{reader.name} reads {inputs} inputs of {count} {kind}")
        read = Span(kind, count, width)
        own = f"{reader.name}.weight"
        linears = {linear.name for linear in find_linears(old)}
        cuts = {}
        for name, axis in axes.items():
            length = shapes[name][axis]
            one_each = kind == "heads" and length in {before for before, _ in units.values()}
            if name.rpartition(".")[0] not in linears and not one_each:
                raise NotImplementedError(
                    f"{name} normalises all {kind} together, so fewer of them would change the "
                    "others"
                )
            if name == own:
                cuts[name] = Cut(axis, (read,))
                continue
            possible = possible_spans((length, after[name][axis]), units, width)
            layouts = [Cut(axis, spans) for spans in possible]
            if len(possible) == len(possible[0]) == 1 and possible[0][0].width in (1, width):
                cuts[name] = layouts[0]
                continue
            chosen = self.choose(index, reader.name, Cut(axis, (read,)), name, layouts)
            if chosen is None:
                raise NotImplementedError(
                    f"{name} holds {length} rows for {count} {kind}, in an order that is not known"
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
                with _noise(tensor, layout, unread):
                    return torch.equal(run(hidden), expected)

            self._known[key] = next((layout for layout in layouts if holds(layout)), None)
            skeleton.release(index)
        return self._known[key]


def _changes(old: nn.Module, new: nn.Module, what: str) -> tuple[dict[str, int], dict[str, Linear]]:
    """Name of a tensor -> the axis that becomes shorter, and the linears that lose columns."""
    before, after = shapes_of(old), shapes_of(new)
    if before.keys() != after.keys():
        raise NotImplementedError(f"fewer {what} would change more than the sizes of this family")
    try:
        axes = {name: axis_that_changes(shape, after[name]) for name, shape in before.items()}
    except ValueError as fault:
        raise NotImplementedError(
            f"fewer {what} would change this family in more than one way: {fault}"
        ) from fault
    found = {name: axis for name, axis in axes.items() if axis is not None}
    readers = {
        linear.name: linear
        for linear in find_linears(old)
        if found.get(f"{linear.name}.weight") == (0 if linear.transposed else 1)
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


@contextlib.contextmanager
def _noise(tensor: Tensor, layout: Cut, units: KeptUnits) -> Iterator[None]:
    """While active, some units of a tensor are noise of the size of its weights."""
    entries = torch.tensor(layout.entries(units), dtype=torch.int64, device=tensor.device)
    before = tensor.index_select(layout.axis, entries)
    # A bias may be zero everywhere.
    scale = before.float().abs().mean().clamp(min=0.01).cpu()
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)) * scale
    tensor.index_copy_(layout.axis, entries, noise.to(tensor))
    yield
    tensor.index_copy_(layout.axis, entries, before)
