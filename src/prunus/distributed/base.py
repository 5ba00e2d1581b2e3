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
    """Another rank has died, hangs, or raised an error. A rank that could say why is named."""


class OtherRankError(RuntimeError):
    """Rank 0 raised this error and reports it itself; this rank only ends."""


def split_range(count: int, size: int, multiple_of: int = 1) -> list[range]:
    """Split `range(count)` into one contiguous range per rank, in order and as equal as possible.

    Args:
        count: Number of items.
        size: Number of ranks.
        multiple_of: Every boundary between two ranges is a multiple of this number. It is above 1
            for items that must stay together in runs of that length.

    Returns:
        `size` ranges. Some are empty if there are fewer runs than ranks.

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
    rank_range = ranks.own_range(len(items))
    return items[rank_range.start : rank_range.stop]


class Ranks:
    """All processes of a run, as one of them sees them. This class is a run with one process.

    `ProcessGroup` in group.py overrides every method for several processes.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_size: Number of those processes that run on this host and share its memory.
    """

    rank = 0
    size = 1
    local_size = 1

    def own_range(self, count: int, multiple_of: int = 1) -> range:
        """This rank's part of `range(count)`, by the arguments of `split_range`. Not collective."""
        return split_range(count, self.size, multiple_of)[self.rank]

    def set_location(self, location: str) -> None:
        """Record what this rank works on, such as a block. Not collective.

        The text stands in the error that this rank raises if another rank is lost.
        """

    def gather_ints(self, numbers: Sequence[int]) -> list[list[int]]:
        """The integers of every rank, by rank. All ranks must call it, with equally many integers.

        They travel as int64.
        """
        return [list(numbers)]

    def gather_text(self, text: str) -> list[str]:
        """The text of every rank, by rank. All ranks must call it."""
        return [text]

    def sum_floats(self, numbers: Sequence[float]) -> list[float]:
        """Elementwise sums over the ranks, in float64. All ranks must call it, with equal lengths.

        Every rank adds in the order of the ranks, so that all ranks get the same bits.
        """
        return list(numbers)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor, in place, by its sum over the ranks. All ranks must call it.

        All ranks get the same bits. The tensor has the same shape and dtype on all ranks.
        """

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace a contiguous tensor, in place, by that of rank `source`. All ranks must call it.

        The tensor has the same shape and dtype on all ranks. Any dtype can travel.
        """

    def all_gather(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Concatenate the tensors (n, …) of all ranks along axis 0. All ranks must call it.

        Args:
            tensor: This rank's part. Its length n may differ between ranks, and be 0. The other
                sides and the dtype may not differ.
            lengths: The n of every rank, by rank, if the caller knows them. They save one message.
        """
        return tensor

    def on_rank_0(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0 alone, and return its result on every rank. All ranks must call it.

        The result travels as JSON: tuples become lists, and keys become text. If `make` raises an
        error, all ranks fail; see `fail_together`.
        """
        return make()

    def tensors_from_rank_0(
        self, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """Call `make` on rank 0 alone, and return its tensors on every rank, on the CPU.

        All ranks must call it. If `make` raises an error, all ranks fail; see `fail_together`.
        """
        return make()

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """A `with` block that succeeds on all ranks or fails on all. All ranks must enter it.

        Without it, the ranks that succeed would wait in their next collective call for the one that
        failed.

        Raises:
            OtherRankError: On all ranks but 0, if rank 0 failed.
            RankError: On the ranks that succeeded, if another rank than 0 failed.
        """
        yield


#: The only rank of a run with one process. It has no state, so all callers share it.
SINGLE_PROCESS = Ranks()
