"""What a run asks of its ranks, and the answers where there is one process only: its own.

Every call but `share` and `at` is a meeting: all ranks make it, in the same order, and each goes on once all have come.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

__all__ = ["SINGLE_PROCESS", "OtherRankError", "RankError", "Ranks", "SingleProcess", "split_range"]


class RankError(RuntimeError):
    """Another rank has died, hangs or met an error; the message names it."""


class OtherRankError(RuntimeError):
    """Rank 0 has met an error and says so itself."""


def split_range(count: int, size: int, together: int = 1) -> list[range]:
    """`count` things shared out over `size` ranks: contiguous, in order, as equal as whole runs of `together` allow."""
    runs = -(-count // together)
    edges = [min(count, runs * rank // size * together) for rank in range(size + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


class Ranks(Protocol):
    """All processes of a run, as one of them sees them.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        on_host: how many of them share this machine and its memory.
    """

    rank: int
    size: int
    on_host: int

    def own_range(self, count: int, together: int = 1) -> range:
        """Which of `count` things are this rank's; see `shares`."""

    def set_location(self, place: str) -> None:
        """Say where this rank stands, for the others' messages should it never come back."""

    def gather_ints(self, numbers: Sequence[int]) -> list[list[int]]:
        """Equally many integers from every rank, in the order of ranks."""

    def gather_text(self, text: str) -> list[str]:
        """A text from every rank, in the order of ranks."""

    def sum_floats(self, numbers: Sequence[float]) -> list[float]:
        """The sums of everybody's numbers, equally many, float64, added in the order of ranks."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by the sum of everybody's; the same bits on all ranks."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace a contiguous tensor by the one of rank `source`, of the same shape and dtype."""

    def all_gather(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Everybody's tensors (n, …), one after the other along the first dimension; each rank's n is its own.

        `lengths` are everybody's n where they are known: one meeting less.
        """

    def claim(self, what: str, count: int) -> Iterator[int]:
        """Numbers below `count` that are this rank's to work on: whoever is free takes the next. No meeting."""

    def barrier(self, what: str) -> None:
        """A meeting that may be long in coming: only signs of life are asked for meanwhile."""

    def on_rank_0(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0, plain values that JSON can hold; an error in it is an error of all."""

    def tensors_from_rank_0(
        self, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """The tensors that `make` gives on rank 0, on the processor, on all ranks."""

    def fail_together(self) -> contextlib.AbstractContextManager[None]:
        """A piece of work that either all ranks get through or none."""


class SingleProcess:
    """The only process there is."""

    rank = 0
    size = 1
    on_host = 1

    def own_range(self, count: int, together: int = 1) -> range:
        return range(count)

    def set_location(self, place: str) -> None:
        pass

    def gather_ints(self, numbers: Sequence[int]) -> list[list[int]]:
        return [list(numbers)]

    def gather_text(self, text: str) -> list[str]:
        return [text]

    def sum_floats(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        pass

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        pass

    def all_gather(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        return tensor

    def claim(self, what: str, count: int) -> Iterator[int]:
        return iter(range(count))

    def barrier(self, what: str) -> None:
        pass

    def on_rank_0(self, make: Callable[[], Any]) -> Any:
        return make()

    def tensors_from_rank_0(
        self, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        return make()

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        yield


SINGLE_PROCESS: Ranks = SingleProcess()
