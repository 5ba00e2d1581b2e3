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

    `multiple_of` items stay together in a run. With fewer runs than ranks some ranges are empty.

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
    """All processes of a run, as seen by process `rank` of `size`; here a run with one process.

    `local_size` of them run on this host and share its memory.
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
        """Elementwise sums in float64, in the order of ranks: the same bits on all. All call it."""
        return list(numbers)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by its sum, the same bits on all ranks. All must call it."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace a contiguous tensor by the like one of rank `source`. All ranks must call it."""

    def all_gather(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Concatenate tensors (n, …). All ranks call it; `lengths`, every n, save a message."""
        return tensor

    def on_rank_0(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, as JSON can hold it. All call it, and fail together."""
        return make()

    def tensors_from_rank_0(
        self, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """Run `make` on rank 0 and return its tensors, on the CPU. All ranks must call it."""
        return make()

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """A `with` block, entered by all ranks, that succeeds on all or fails on all.

        Without it, the ranks that succeed would wait in their next collective call for the one that
        failed. They raise RankError; if rank 0 failed, all others raise OtherRankError.
        """
        yield


SINGLE_PROCESS = Ranks()
