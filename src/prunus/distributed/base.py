"""What a run asks of its ranks, and the answers where there is one process only: its own.

Every call but `share` and `at` is a meeting: all ranks make it, in the same order, and each goes on once all have come.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

__all__ = ["ALONE", "Alone", "ElsewhereError", "RankError", "Ranks", "shares"]


class RankError(RuntimeError):
    """Another rank has died, hangs or met an error; the message names it."""


class ElsewhereError(RuntimeError):
    """Rank 0 has met an error and says so itself."""


def shares(count: int, size: int, together: int = 1) -> list[range]:
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

    def share(self, count: int, together: int = 1) -> range:
        """Which of `count` things are this rank's; see `shares`."""

    def at(self, place: str) -> None:
        """Say where this rank stands, for the others' messages should it never come back."""

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Equally many integers from every rank, in the order of ranks."""

    def gather_text(self, text: str) -> list[str]:
        """A text from every rank, in the order of ranks."""

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """The sums of everybody's numbers, equally many, float64, added in the order of ranks."""

    def add(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by the sum of everybody's; the same bits on all ranks."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace a contiguous tensor by the one of rank `source`, of the same shape and dtype."""

    def concatenate(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Everybody's tensors (n, …), one after the other along the first dimension; each rank's n is its own.

        `lengths` are everybody's n where they are known: one meeting less.
        """

    def claims(self, what: str, count: int) -> Iterator[int]:
        """Numbers below `count` that are this rank's to work on: whoever is free takes the next. No meeting."""

    def wait_for_all(self, what: str) -> None:
        """A meeting that may be long in coming: only signs of life are asked for meanwhile."""

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0, plain values that JSON can hold; an error in it is an error of all."""

    def tensors_from_first(
        self, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """The tensors that `make` gives on rank 0, on the processor, on all ranks."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """A piece of work that either all ranks get through or none."""


class Alone:
    """The only process there is."""

    rank = 0
    size = 1
    on_host = 1

    def share(self, count: int, together: int = 1) -> range:
        return range(count)

    def at(self, place: str) -> None:
        pass

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        return [list(numbers)]

    def gather_text(self, text: str) -> list[str]:
        return [text]

    def totals(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def add(self, tensor: torch.Tensor) -> None:
        pass

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        pass

    def concatenate(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        return tensor

    def claims(self, what: str, count: int) -> Iterator[int]:
        return iter(range(count))

    def wait_for_all(self, what: str) -> None:
        pass

    def from_first(self, make: Callable[[], Any]) -> Any:
        return make()

    def tensors_from_first(
        self, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        return make()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        yield


ALONE: Ranks = Alone()
