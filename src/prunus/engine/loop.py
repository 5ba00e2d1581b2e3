"""The loop over the blocks of a run: read ahead, change, write behind, record, report.

    finished by an earlier run   the windows run through the stored block
    all others                   read the block ► the step changes it ► write its shard

Disk and processor work at the same time where memory has room for two more blocks. Two threads do
it, which change nothing but the time: blocks are read and written one at a time and in order, and a
shard still has its final name before the record names it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from prunus.distributed import RankError, ranks
from prunus.engine.progress import Progress
from prunus.engine.run_plan import RunPlan, check_known
from prunus.engine.session import Session
from prunus.hardware.machine import peak_memory, return_freed_memory
from prunus.hardware.numerics import check_finite
from prunus.model.source import tensors_digest
from prunus.words import about


@dataclass(frozen=True)
class FinishedBlock:
    """A block as a step has changed it.

    Attributes:
        tensors: Its tensors by relative name.
        record: The block's entry in the record of the run.
        message: What was done to the block, for people, such as "pruned".
        rounded: Relative name of a rounded linear -> its weight as its type stores it; empty
            where the result has plain tensors.
    """

    tensors: Mapping[str, torch.Tensor]
    record: Any
    message: str
    rounded: Mapping[str, Any] = field(default_factory=dict)


class StoredBlock(NamedTuple):
    """A block of the source, as it was read.

    Attributes:
        tensors: Its tensors by relative name, in the stored dtypes.
        digest: Their SHA-256.
    """

    tensors: Mapping[str, torch.Tensor]
    digest: str


class BlockStep(Protocol):
    """What a command does to blocks, one after the other.

    `position` counts the blocks of the result from 0.
    """

    def propagate(self, position: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Run the windows through a block that an earlier run has finished."""

    def change_block(self, position: int, stored: StoredBlock) -> FinishedBlock:
        """Run the windows through a block of the source and change it."""


class BlockOutput(Protocol):
    """Where finished blocks are kept; `position` is that of `BlockStep`.

    Attributes:
        finished: How many blocks are finished, the first ones of the model.
        finished_seconds: Seconds that making these took.
    """

    @property
    def finished(self) -> int: ...

    @property
    def finished_seconds(self) -> float: ...

    def read_block(self, position: int) -> Mapping[str, torch.Tensor]:
        """The tensors of a finished block by relative name."""

    def write_block(self, position: int, block: FinishedBlock) -> None:
        """Keep a finished block, then enter it in the record."""


def run_blocks(
    plan: RunPlan,
    session: Session,
    step: BlockStep,
    output: BlockOutput,
    measured: Mapping[str, str],
    *,
    made_from: Sequence[int] | None = None,
    names: Callable[[int], str] | None = None,
    again: bool = False,
) -> None:
    """Change the blocks of a model, from the first one that is not finished to the last.

    Args:
        plan: The run.
        session: Who hears of each block.
        step: What is done to each block.
        output: Where finished blocks are kept.
        measured: Name of a block -> SHA-256 of the weights that a measurement before the first
            block read.
        made_from: For each block of the result, the index of the block of the source that it is
            made from; None for all blocks in order.
        names: Gives the name of a block of the result for progress; None for those of the source.
        again: Whether to change finished blocks once more without writing them. That is needed
            where the next block depends on what is not stored of them.

    Raises:
        ValueError: A weight of the source is not finite.
        FileExistsError: A block of the source is not the one that a measurement has read.
    """
    started = time.perf_counter()
    source_blocks = made_from if made_from is not None else range(len(plan.skeleton))
    name_of = names or plan.skeleton.block_name
    finished, total = output.finished, len(source_blocks)
    taken, making = 0 if again else finished, 0.0
    # What the blocks after those that are taken need, by the time of the earlier run.
    rest = output.finished_seconds / max(1, finished) * (total - finished)

    def report(position: int, message: str) -> None:
        seconds, done = time.perf_counter() - started, position + 1
        if done <= taken:
            left = seconds / done * (taken - done) + rest
        else:
            left = (seconds - making) / (done - taken) * (total - done)
        message, peak = f"{name_of(position)} {message}", peak_memory(plan.device)
        session.step(Progress(done, total, message, seconds, peak, left=left))

    def read(position: int) -> StoredBlock:
        return read_block(plan, source_blocks[position], measured)

    if taken:
        session.tell(
            f"{taken} of {total} blocks are kept from the earlier run; the others take "
            f"{about(rest)}, after the windows have passed through those that are kept"
        )
    for position in range(taken):
        step.propagate(position, output.read_block(position))
        report(position, "taken from the earlier run")
    making = time.perf_counter() - started
    left = range(taken, total)
    with background_writes(plan.memory.overlaps) as submit:
        blocks = read_ahead(left, read, plan.memory.overlaps)
        for position, stored in zip(left, blocks, strict=True):
            block = step.change_block(position, stored)
            if position >= finished:
                submit(functools.partial(output.write_block, position, block))
            if ranks().size > 1 or not plan.keeps_freed_memory:
                return_freed_memory()
            report(position, block.message)


def read_block(plan: RunPlan, index: int, measured: Mapping[str, str]) -> StoredBlock:
    """Read every byte of a block of the source, and check it; see `run_blocks`."""
    name = plan.skeleton.block_name(index)
    tensors = plan.source.block(index, pinned=plan.memory.overlaps and plan.device.type == "cuda")
    check_finite(tensors, f"{name}.")
    digest = tensors_digest(tensors)
    check_known(measured, name, digest)
    return StoredBlock(tensors, digest)


def check_same(name: str, changed: Mapping[str, torch.Tensor]) -> None:
    """Check that all ranks have changed a block to the same bytes. All ranks call it.

    Each rank continues with its own copy of the block, so a difference would grow unnoticed.

    Args:
        name: What was changed, for the error.
        changed: The tensors that were changed.

    Raises:
        RankError: Some rank has other bytes than rank 0; names these ranks.
    """
    if ranks().size == 1:
        return
    digests = ranks().gather_text(tensors_digest(changed))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RankError(
            f"{name} was pruned to other bytes on rank {', '.join(map(str, others))} than on "
            "rank 0: their machines round differently. Run the ranks on machines of one kind"
        )


#: What `read_ahead` reads for each index.
T = TypeVar("T")


def read_ahead(indices: Iterable[int], read: Callable[[int], T], overlaps: bool) -> Iterator[T]:
    """Yield `read(index)` for each index, and read the next one meanwhile.

    Reading of the next one begins when its predecessor is taken, so the caller computes with one
    block while the other arrives.

    Args:
        indices: What is read, in this order.
        read: Reads one of them, on a thread of its own.
        overlaps: Whether to read ahead; otherwise `read` is called when its result is asked for.

    >>> list(read_ahead([1, 2, 3], lambda index: 10 * index, overlaps=True))
    [10, 20, 30]
    """
    if not overlaps:
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read") as executor:
        coming: Future[T] | None = None
        for index in indices:
            ready, coming = coming, executor.submit(read, index)
            if ready is not None:
                yield ready.result()
            # What was taken can leave memory before the next one is asked for.
            del ready
        if coming is not None:
            yield coming.result()


@contextlib.contextmanager
def background_writes(overlaps: bool) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Yield a function that runs writes one at a time and in order, on a thread of its own.

    It waits for the write before, and begins the next one. Leaving the `with` waits for the last
    write, also if an error ends the run: what is finished is not lost. An error of a write is
    raised by the next call, or on leaving the `with`.

    Args:
        overlaps: Whether there is a thread; otherwise each write ends before the call does.

    >>> with background_writes(overlaps=True) as submit:
    ...     submit(lambda: print("written"))
    written
    """
    if not overlaps:
        yield lambda write: write()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="write") as executor:
        last: Future[None] | None = None

        def submit(write: Callable[[], None]) -> None:
            nonlocal last
            if last is not None:
                last.result()
            # Each thread has a gradient mode of its own.
            last = executor.submit(torch.no_grad()(write))

        yield submit
        if last is not None:
            last.result()
