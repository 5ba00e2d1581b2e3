"""Finds by running a block which rows of a linear belong to which channels or heads.

Shapes often leave more than one possibility. The block knows: where the linear that reads the units
has zeros for some of them, nothing that writes these units can change the output. So one layout
after the other is tried. The entries that it gives to some units are replaced by noise, and the
layout holds if the output of the block stays the same to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunus.model.skeleton import Skeleton
from prunus.model.source import Source
from prunus.model.stream import Stream
from prunus.structure.spans import Cut, KeptUnits, Span, UnitKind

__all__ = ["LayoutTrial"]

_TOKENS = 16


class LayoutTrial:
    """Tries layouts on the blocks of a model. Blocks of one kind are tried once.

    Args:
        skeleton: the model.
        source: its weights.
        device: where blocks run.
    """

    def __init__(self, skeleton: Skeleton, source: Source, device: torch.device) -> None:
        self._skeleton, self._source, self._device = skeleton, source, device
        self._known: dict[tuple[object, ...], Cut | None] = {}

    def choose(
        self, index: int, reader: str, read: Cut, name: str, cuts: Sequence[Cut]
    ) -> Cut | None:
        """The first layout of a tensor that holds; None if none does.

        Args:
            index: position of the block.
            reader: relative name of the linear whose inputs the units are.
            read: where they lie among its inputs.
            name: relative name of the tensor.
            cuts: its layouts, the likeliest first.
        """
        key = (type(self._skeleton.blocks[index]), reader, read, name, *cuts)
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = self._tried(index, reader, read, name, cuts)
        return self._known[key]

    def _tried(
        self, index: int, reader: str, read: Cut, name: str, cuts: Sequence[Cut]
    ) -> Cut | None:
        skeleton = self._skeleton
        stream = Stream(skeleton, self._source, self._device)
        with contextlib.closing(stream):
            stream.embed([skeleton.trial_batch(_TOKENS)], None)
            hidden = stream.states.get(0)
            block = skeleton.fill(index, self._source.block(index), self._device)
            run = stream.call(index, block)
            linear = next(each for each in skeleton.linears(index) if each.name == reader)
            gone = _some_units(read.spans, cuts)
            weight_OI = linear.weight_OI.clone()
            weight_OI[:, read.entries(gone)] = 0
            linear.assign(weight_OI)
            expected, tensor = run(hidden), block.state_dict()[name]
            found = next(
                (cut for cut in cuts if _unread(cut, gone, tensor, run, hidden, expected)), None
            )
            skeleton.release(index)
        return found


def _some_units(read: Sequence[Span], cuts: Sequence[Cut]) -> KeptUnits:
    """A quarter of the units, but not all: key-value groups with their heads where there are any.

    Args:
        read: the units as they are read.
        cuts: layouts, which say whether heads share key-value groups.
    """
    ((kind, units),) = {(span.kind, span.units) for span in read}
    groups = {span.units for cut in cuts for span in cut.spans if span.kind == "groups"}
    found: dict[UnitKind, range] = {kind: range(max(1, units // 4))}
    if groups and (count := groups.pop()) > 1:
        gone = max(1, count // 4)
        found = {"heads": range(gone * (units // count)), "groups": range(gone)}
    return found


def _unread(
    cut: Cut,
    gone: KeptUnits,
    tensor: Tensor,
    run: Callable[[Tensor], Tensor],
    hidden: Tensor,
    expected: Tensor,
) -> bool:
    """Whether noise in place of some units of a tensor leaves the output of a block as it is."""
    entries = torch.tensor(cut.entries(gone), dtype=torch.int64, device=tensor.device)
    before = tensor.index_select(cut.axis, entries)
    # Of the size of the weights; a bias may be zero everywhere.
    scale = before.float().abs().mean().clamp(min=0.01).cpu()
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)) * scale
    tensor.index_copy_(cut.axis, entries, noise.to(tensor))
    found = run(hidden)
    tensor.index_copy_(cut.axis, entries, before)
    return torch.equal(found, expected)
