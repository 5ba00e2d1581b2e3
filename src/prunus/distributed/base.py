"""What a run needs from its ranks (processes), and the answers of a run with one process.

`ranks()` says which processes work together now. Code asks it only to divide work; all else uses
the functions at the end of the file, which are the same for one process and for many.

A collective call is one that all ranks must make, in the same order; each returns once all ranks
have made it. The docstring of every method of `Ranks` says whether it is collective.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch

from prunus.words import reason

_Items = TypeVar("_Items", Sequence[Any], torch.Tensor)

# "torch.float32" -> the dtype: dtypes travel by their names.
_DTYPES = {str(dtype): dtype for dtype in torch.__dict__.values() if isinstance(dtype, torch.dtype)}


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


class Ranks:
    """All processes of a run, as one of them sees them. This class is a run with one process.

    `ProcessGroup` in group.py overrides every method for several processes.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_size: Number of those processes that run on this host and share its memory.
        location: What this rank works on, such as a block, for the error that it raises if another
            rank is lost; see `set_location`.
    """

    rank = 0
    size = 1
    local_size = 1
    location = "the start"

    def own_range(self, count: int, multiple_of: int = 1) -> range:
        """This rank's part of `range(count)`, by the arguments of `split_range`. Not collective."""
        return split_range(count, self.size, multiple_of)[self.rank]

    def gather_ints(self, numbers: Sequence[int]) -> list[list[int]]:
        """The integers of every rank, by rank. All ranks must call it, with equally many integers.

        They travel as int64.
        """
        return [list(numbers)]

    def gather_text(self, text: str) -> list[str]:
        """The text of every rank, by rank. All ranks must call it."""
        return [text]

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


#: The only rank of a run with one process. It decides nothing, so all callers share it.
SINGLE_PROCESS = Ranks()
# The processes that work together now are the last of these; see `ranks`.
_working: list[Ranks] = [SINGLE_PROCESS]


def ranks() -> Ranks:
    """The processes that work together now, as this one sees them.

    torch has one process group for a process, so there is one answer for the whole process. It is
    `SINGLE_PROCESS` outside of `process_group`, and in what rank 0 does alone.
    """
    return _working[-1]


@contextlib.contextmanager
def using(other: Ranks) -> Iterator[Ranks]:
    """Let `ranks` answer `other` for the length of a `with` block."""
    _working.append(other)
    try:
        yield other
    finally:
        _working.pop()


# --- what several processes do together; all but the first two are collective ---


def set_location(location: str) -> None:
    """Record what this rank works on, such as a block. Not collective."""
    ranks().location = location


def own_part(items: _Items, multiple_of: int = 1) -> _Items:
    """The items of this rank, out of those of all ranks; see `split_range`. Not collective."""
    part = ranks().own_range(len(items), multiple_of)
    return items[part.start : part.stop]


def sum_ints(numbers: Sequence[int]) -> list[int]:
    """Elementwise sums of integers over the ranks. All have equally many."""
    return [sum(summands) for summands in zip(*ranks().gather_ints(numbers), strict=True)]


def sum_floats(numbers: Sequence[float]) -> list[float]:
    """Elementwise sums over the ranks, in float64. All have equally many.

    Every rank adds in the order of the ranks, so that all ranks get the same bits.
    """
    row = torch.tensor([list(numbers)], dtype=torch.float64)
    by_rank = ranks().all_gather(row, [1] * ranks().size).tolist()
    return [sum(summands) for summands in zip(*by_rank, strict=True)]


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """A `with` block that succeeds on all ranks or fails on all.

    Without it, the ranks that succeed would wait in their next collective call for the one that
    failed. Each rank contributes the text of its error, cut off at 2,000 characters, or an empty
    text. A RankError is passed on without an exchange.

    Raises:
        OtherRankError: On all ranks but 0, if rank 0 failed.
        RankError: On the ranks that succeeded, if another rank than 0 failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        # After a RankError a rank is lost: the others cannot take part in the exchange below.
        if isinstance(raised, RankError) or ranks().size == 1:
            raise
        error = raised
    texts = ranks().gather_text("" if error is None else reason(error, most=2000))
    if ranks().rank > 0 and texts[0]:
        raise OtherRankError(texts[0]) from error
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text:
            raise RankError(f"rank {rank} stopped: {text}")


def on_rank_0(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 alone, and return its result on every rank.

    There `make` is a single process: what it calls asks no other. The result travels as JSON:
    tuples become lists, and keys become text. If `make` raises an error, all ranks fail; see
    `fail_together`.
    """
    if ranks().size == 1:
        return make()
    text = ""
    with fail_together():
        if ranks().rank == 0:
            with using(SINGLE_PROCESS):
                text = json.dumps(make())
    return json.loads(ranks().gather_text(text)[0])


def tensors_from_rank_0(
    make: Callable[[], Mapping[str, torch.Tensor]],
) -> Mapping[str, torch.Tensor]:
    """Call `make` on rank 0 alone, and return its tensors on every rank, on the CPU.

    If `make` raises an error, all ranks fail; see `fail_together`.
    """
    if ranks().size == 1:
        return make()
    sent: dict[str, torch.Tensor] = {}

    def describe() -> list[Any]:
        sent.update({name: x.detach().cpu().contiguous() for name, x in make().items()})
        return [[name, str(x.dtype), list(x.shape)] for name, x in sent.items()]

    # Names, dtypes and shapes go first, so that the others can allocate what they receive.
    received = {}
    for name, dtype, shape in on_rank_0(describe):
        x = sent[name] if ranks().rank == 0 else torch.empty(shape, dtype=_DTYPES[dtype])
        ranks().broadcast(x, 0)
        received[name] = x
    return received
