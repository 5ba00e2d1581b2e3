"""What a run needs from its ranks (processes), and the answers of a run with one process.

A collective call is one that all ranks must make, in the same order; each returns once all ranks
have made it. The docstring of every method of `Ranks` says whether it is collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch

_Item = TypeVar("_Item")


class RankError(RuntimeError):
    """Another rank has died, hangs, or raised an error. The message names the rank."""


class OtherRankError(RuntimeError):
    """Rank 0 raised this error and reports it itself; this rank only ends."""


def split_range(count: int, size: int, multiple_of: int = 1) -> list[range]:
    """Split `range(count)` into one contiguous range per rank, in order and as equal as possible.

    Args:
        multiple_of: every boundary between two ranges is a multiple of this, for items that must
            stay together in runs of that many.

    Returns:
        `size` ranges; some are empty where there are fewer runs than ranks.

    >>> split_range(10, 3)
    [range(0, 3), range(3, 6), range(6, 10)]
    >>> split_range(10, 3, multiple_of=4)
    [range(0, 4), range(4, 8), range(8, 10)]
    """
    runs = -(-count // multiple_of)
    edges = [min(count, runs * rank // size * multiple_of) for rank in range(size + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


def own_part(ranks: Ranks, items: Sequence[_Item]) -> Sequence[_Item]:
    """The items of this rank, out of those of all ranks; see `split_range`. Not collective."""
    own = ranks.own_range(len(items))
    return items[own.start : own.stop]


class Ranks:
    """All processes of a run, as seen by one of them; here a run with one process.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_size: how many of them run on this host and share its memory.
    """

    rank = 0
    size = 1
    local_size = 1

    def own_range(self, count: int, multiple_of: int = 1) -> range:
        """This rank's part of `range(count)`; see `split_range`. Not collective."""
        return split_range(count, self.size, multiple_of)[self.rank]

    def set_location(self, location: str) -> None:
        """Say what this rank works on, for messages if it is lost. Not collective."""

    def gather_ints(self, numbers: Sequence[int]) -> list[list[int]]:
        """The integers of every rank, by rank. All ranks must call it, with equally many."""
        return [list(numbers)]

    def gather_text(self, text: str) -> list[str]:
        """The text of every rank, by rank. All ranks must call it."""
        return [text]

    def sum_floats(self, numbers: Sequence[float]) -> list[float]:
        """Elementwise sums over ranks, in float64. All ranks must call it, with equally many.

        Ranks are added in order, so that the sums are the same bits on all of them.
        """
        return list(numbers)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks, in place. All ranks must call it.

        The result is the same bits on all ranks.
        """

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace a contiguous tensor by that of rank `source`, in place. All ranks must call it.

        Shape and dtype must be the same on all ranks.
        """

    def all_gather(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Concatenate the tensors (n, …) of all ranks along axis 0. All ranks must call it.

        Args:
            lengths: the n of every rank, if known. This saves one exchange of messages.
        """
        return tensor

    def claim(self, what: str, count: int) -> Iterator[int]:
        """Yield numbers below `count` that no other rank gets, until none is left. Not collective.

        A rank that is free takes the next number, so fast ranks do more work than slow ones.

        Args:
            what: name of the work; the same on all ranks, and used only once in a run.
        """
        return iter(range(count))

    def barrier(self, what: str) -> None:
        """Wait until all ranks have finished `what`. All ranks must call it.

        Waiting may take as long as the work does: only a rank without a heartbeat counts as lost,
        and no timeout applies to the others.
        """

    def on_rank_0(self, make: Callable[[], Any]) -> Any:
        """Run `make` on rank 0 and return its result on all ranks. All ranks must call it.

        The result must consist of plain values that JSON can hold. If `make` raises an error, all
        ranks raise one.
        """
        return make()

    def tensors_from_rank_0(
        self, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """Run `make` on rank 0 and return its tensors, on the CPU. All ranks must call it."""
        return make()

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """A `with` block that succeeds on all ranks or fails on all. All ranks must enter it.

        Without it, the ranks that succeed would wait in their next collective call for the one
        that failed.

        Raises:
            OtherRankError: on all ranks but 0, if rank 0 failed.
            RankError: on the ranks that succeeded, if another rank than 0 failed.
        """
        yield


SINGLE_PROCESS = Ranks()
