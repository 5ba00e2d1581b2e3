"""The dense model beside the pruned one: its hidden states, and what its linears are given for the same tokens.

Only where targets from the dense model or block matching ask for it. Every dense block runs in a copy of its own, so
that pruning cannot touch it; its outputs take the place of its inputs once the pruned block is through.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from prunus.methods.refine.dense_targets import MAX_STRIDE
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear, find_linears
from prunus.model.skeleton import Skeleton
from prunus.model.source import Source
from prunus.model.stream import Stream
from prunus.pruning.block.hooks import Accumulate, input_hooks

__all__ = ["DenseStream", "accumulate_both", "drift_stride_for", "held_out_batches"]

_TOKENS_PER_FEATURE = 2.5


class _Seen(BaseException):
    """Ends a dense forward pass: its input to the linear in question is known."""


class DenseStream:
    """All calibration windows on their way through the dense model.

    Args:
        skeleton, source: as of the run; the source gives the trained weights.
        device: where the copies of the blocks run.
        one_in: one batch in so many goes along, from the first on.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: Source,
        device: torch.device,
        stride: int = 1,
    ) -> None:
        self.stream = Stream(skeleton, source, device)
        self._one_in = stride
        #: Batch of the pruned model that goes along -> its number here.
        self.along: dict[int, int] = {}

    def embed(
        self,
        batches: Sequence[torch.Tensor],
        spill_to: Path | None,
        on_device: bool = True,
        before: int = 0,
    ) -> None:
        """As `Stream.embed`; `before` batches come before these, on other ranks."""
        along = [batch for batch in range(len(batches)) if (before + batch) % self._one_in == 0]
        self.along = {batch: here for here, batch in enumerate(along)}
        self.stream.embed([batches[batch] for batch in along], spill_to, on_device)

    def counts_per_rank(self, counts: Sequence[int]) -> list[int]:
        """How many go along of the batches of every rank, which are so many."""
        ends = [-(-end // self._one_in) for end in itertools.accumulate(counts, initial=0)]
        return [end - start for start, end in itertools.pairwise(ends)]

    def propagate(self, index: int) -> None:
        """Take all batches through dense block `index`."""
        if len(self.stream):
            self.stream.propagate(index, self.stream.source.block(index))

    @contextlib.contextmanager
    def beside(
        self, index: int, stored: Mapping[str, torch.Tensor], names: Sequence[str], keep: bool
    ) -> Iterator[DenseBlockInputs]:
        """While block `index` is pruned: the dense block's inputs of the linears `names`; after it, its outputs.

        Args:
            index: position of the block.
            stored: its trained tensors by relative name.
            names: linears that may be asked for.
            keep: run every batch once and keep what its linears were given (lockstep), rather than once per question.
        """
        block = self.stream.skeleton.duplicate(index, stored, self.stream.device)
        linears = [linear for linear in find_linears(block) if linear.name in names]
        inputs = DenseBlockInputs(self.stream, self.along, index, block, linears, keep)
        yield inputs
        inputs.finish()

    def close(self) -> None:
        """Release hidden states."""
        self.stream.close()


class DenseBlockInputs:
    """What the linears of one dense block are given, batch by batch; see `DenseStream.beside`."""

    def __init__(
        self,
        stream: Stream,
        along: Mapping[int, int],
        index: int,
        block: torch.nn.Module,
        linears: list[Linear],
        keep: bool,
    ) -> None:
        self._stream = stream
        self._along = along
        self._forward = stream.forward(index, block)
        self._linears = {linear.name: linear for linear in linears}
        self._keep = keep
        self._kept: dict[int, dict[str, torch.Tensor]] = {}

    def of(self, name: str, batch: int, tokens: int) -> torch.Tensor | None:
        """The input (tokens, in) of linear `name` for `batch`, once; None where it is not told.

        That is for batches that did not go along, and where other tokens than the linear's reach it.

        `tokens` are the rows that reach it in the pruned model. Only where these are all tokens of the batch, on either
        side, is it certain that row t is the same token: an expert's tokens may be others.
        """
        if batch not in self._along:
            return None
        batch = self._along[batch]
        states = self._stream.states.get(batch)
        # Of images as grids (images, channels, height, width) no positions are routed anywhere: all come along.
        everything = tokens if states.dim() == 4 else states.shape[:-1].numel()
        if tokens != everything:
            return None
        x = self._recorded(batch, name) if self._keep else self._measured(batch, name)
        if x is None or x.shape[:-1].numel() != everything:
            return None
        return x.reshape(everything, x.shape[-1])

    def finish(self) -> None:
        """Put the dense block's outputs in the place of its inputs."""
        for batch in range(len(self._stream)):
            if batch not in self._kept:
                self._stream.states.put(batch, self._forward(batch))
        self._kept.clear()

    def _recorded(self, batch: int, name: str) -> torch.Tensor | None:
        if batch not in self._kept:
            seen: dict[str, torch.Tensor] = {}
            with input_hooks(
                list(self._linears.values()), lambda linear, x: seen.update({linear.name: x})
            ):
                output = self._forward(batch)
            self._stream.states.put(batch, output)
            self._kept[batch] = seen
        kept = self._kept[batch]
        found = kept.get(name)
        # Linears with the same input ask once: its statistics are shared.
        self._kept[batch] = {other: x for other, x in kept.items() if x is not found}
        return found

    def _measured(self, batch: int, name: str) -> torch.Tensor | None:
        seen: list[torch.Tensor] = []

        def stop(_linear: Linear, x: torch.Tensor) -> None:
            seen.append(x)
            raise _Seen

        with input_hooks([self._linears[name]], stop), contextlib.suppress(_Seen):
            self._forward(batch)
        return seen[0] if seen else None


def drift_stride_for(tokens: int, width: int) -> int:
    """Of how many batches one is enough to see how far inputs have drifted, with `tokens` in all.

    The drift (X − X̂)ᵀX̂ is far smaller than the Gram X̂ᵀX̂, so fewer tokens will do for it: `_TOKENS_PER_FEATURE` of them
    for each of the widest linear's `width` inputs.
    """
    return max(1, min(MAX_STRIDE, int(tokens / (_TOKENS_PER_FEATURE * width))))


def held_out_batches(count: int) -> frozenset[int]:
    """Of `count` batches every fourth, or the last of fewer; none of a single one."""
    return frozenset(range(3, count, 4) if count >= 4 else range(max(1, count - 1), count))


def accumulate_both(dense: DenseBlockInputs, held_out: frozenset[int]) -> Accumulate:
    """Adds what a linear is given in either model, where its statistics have a place for both."""

    def feed(statistics: InputStatistics, linear: Linear, batch: int, x_TI: torch.Tensor) -> None:
        dense_TI = None if statistics.drift_II is None else dense.of(linear.name, batch, len(x_TI))
        statistics.add(x_TI, dense_TI, held_out=batch in held_out)

    return feed
