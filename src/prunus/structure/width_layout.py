"""Where the channels of an MLP, or the heads, lie in the tensors of a block.

Two blocks without weights are compared, one of them with fewer channels or heads. One linear reads
them: the one with fewer columns. What writes them are the other tensors that become shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from prunus.model.linears import Linear, find_linears
from prunus.structure.layout import axis_that_changes, shapes_of
from prunus.structure.layout_trial import LayoutTrial
from prunus.structure.spans import Cut, Span, UnitKind, possible_spans

__all__ = ["PartLayout", "channel_layouts", "head_layout"]


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


def channel_layouts(
    old: nn.Module, new: nn.Module, index: int, trial: LayoutTrial
) -> list[PartLayout]:
    """Where the channels of each MLP lie in a block. Every routed expert is an MLP of its own.

    Args:
        old, new: the block, and that with fewer channels.
        index: position of the block.
        trial: decides where shapes do not.

    Raises:
        NotImplementedError: the channels are read or written in another way than in an MLP.
    """
    axes, readers = _changes(old, new, "channels")
    # What belongs to an MLP lies in the module of the linear that reads its channels.
    owners = {name.rpartition(".")[0]: name for name in readers}
    if len(owners) != len(readers) or (axes and not readers):
        raise NotImplementedError(
            f"{len(readers)} linears of a block read its channels, and one is needed per MLP: this "
            "family cannot become narrower yet"
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
        before = readers[name].shape[1]
        keep = shapes_of(new)[f"{name}.weight"][of_part[f"{name}.weight"]]
        units: dict[UnitKind, tuple[int, int]] = {"channels": (before, keep)}
        found.append(_part(old, new, readers[name], of_part, units, index, trial))
    return found


def head_layout(
    old: nn.Module,
    new: nn.Module,
    units: Mapping[UnitKind, tuple[int, int]],
    index: int,
    trial: LayoutTrial,
) -> PartLayout | None:
    """Where the heads lie in a block; None for a block without heads.

    Args:
        old, new: the block, and that with fewer heads.
        units: "heads", and "groups" if heads share them -> how many there are before and after.
        index: position of the block.
        trial: decides where shapes do not.

    Raises:
        NotImplementedError: fewer heads would change more than sizes.
    """
    axes, readers = _changes(old, new, "heads")
    if not axes:
        return None
    if len(readers) != 1:
        raise NotImplementedError(f"{len(readers)} linears of a block read them, and not one")
    (reader,) = readers.values()
    return _part(old, new, reader, axes, units, index, trial)


def _changes(old: nn.Module, new: nn.Module, what: str) -> tuple[dict[str, int], dict[str, Linear]]:
    """Name of a tensor -> the axis that becomes shorter, and the linears that lose columns.

    Raises:
        NotImplementedError: the blocks differ in another way.
    """
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


def _part(
    old: nn.Module,
    new: nn.Module,
    reader: Linear,
    axes: Mapping[str, int],
    units: Mapping[UnitKind, tuple[int, int]],
    index: int,
    trial: LayoutTrial,
) -> PartLayout:
    """The layout of the units that one linear reads.

    Raises:
        NotImplementedError: a norm goes over all of them, or a linear holds them in no known order.
    """
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
                f"{name} normalises all {kind} together, so fewer of them would change the others"
            )
        if name == own:
            cuts[name] = Cut(axis, (read,))
            continue
        possible = [
            Cut(axis, spans) for spans in possible_spans((length, after[name][axis]), units, width)
        ]
        simple = len(possible) == 1 and len(spans := possible[0].spans) == 1
        if simple and spans[0].width in (1, width):
            cuts[name] = possible[0]
            continue
        chosen = trial.choose(index, reader.name, Cut(axis, (read,)), name, possible)
        if chosen is None:
            raise NotImplementedError(
                f"{name} holds {length} rows for {count} {kind}, in an order that is not known"
            )
        cuts[name] = chosen
    return PartLayout(reader.name, read, keep, cuts)
