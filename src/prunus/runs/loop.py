"""The loop over the blocks of a run: read ahead, change, write behind, record, report.

    finished by an earlier run   the windows run through the stored block
    all others                   read the block ► the step changes it ► write its shard

Disk and processor work at the same time where memory has room for two more blocks.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from prunus.hardware.memory import HeapTrimmer, peak_memory
from prunus.runs.blocks import StoredBlock, read_stored
from prunus.runs.hashed_source import check_measured
from prunus.runs.job import RunJob
from prunus.runs.overlap import BackgroundWrites, read_ahead
from prunus.runs.progress import Progress


@dataclass(frozen=True)
class Made:
    """What a step has made of a block.

    Attributes:
        tensors: All tensors of the finished block by relative name, as they are stored.
        record: What the record of the run says about it.
        message: The same in a few words, for the progress.
        packed: By relative name, the linears that the result stores in another form.
    """

    tensors: Mapping[str, torch.Tensor]
    record: Any
    message: str
    packed: Mapping[str, Any] = field(default_factory=dict)


class BlockStep(Protocol):
    """What a verb does to blocks, one after the other."""

    def take(self, place: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Run the windows through a block that an earlier run has finished."""
        ...

    def make(self, place: int, stored: StoredBlock) -> Made:
        """Change a block, and run the windows through what it has become."""
        ...


class BlockOutput(Protocol):
    """Where finished blocks are kept."""

    def read_block(self, place: int) -> Mapping[str, torch.Tensor]:
        """The tensors of a finished block by relative name."""
        ...

    def write_block(self, place: int, made: Made) -> None:
        """Keep a finished block, then enter it in the record."""
        ...


def run_blocks(
    job: RunJob,
    step: BlockStep,
    output: BlockOutput,
    finished: int,
    *,
    made_from: Sequence[int] | None = None,
    names: Callable[[int], str] | None = None,
    again: bool = False,
) -> None:
    """Change the blocks of a model, from the first one that is not finished to the last.

    Args:
        made_from: The block of the source for each block of the result; None for all in order.
        names: The name of each block of the result; None for those of the source.
        again: Change finished blocks once more without writing them, because the next block depends
            on what is not stored of them.
    """
    started = time.perf_counter()
    places = made_from if made_from is not None else range(len(job.skeleton))
    name_of = names or job.skeleton.block_name

    def report(place: int, message: str) -> None:
        job.options.step(
            Progress(
                done=place + 1,
                total=len(places),
                message=f"{name_of(place)} {message}",
                seconds=time.perf_counter() - started,
                peak_memory=peak_memory(job.device),
            )
        )

    taken = 0 if again else finished
    for place in range(taken):
        step.take(place, output.read_block(place))
        report(place, "taken from the earlier run")
    heap, left = HeapTrimmer(), range(taken, len(places))
    with BackgroundWrites(job.overlaps) as writes:
        blocks = read_ahead(left, lambda place: _read(job, places[place]), job.overlaps)
        for place, stored in zip(left, blocks, strict=True):
            source_name = job.skeleton.block_name(places[place])
            check_measured(job.measured, source_name, stored.digest)
            made = step.make(place, stored)
            if place >= finished:
                writes.submit(functools.partial(output.write_block, place, made))
            if job.ranks.size > 1:
                heap.trim_if_grown()
            report(place, made.message)


def _read(job: RunJob, index: int) -> StoredBlock:
    """Read a block of the source, check it and hash it.

    Raises:
        ValueError: It holds NaN or infinity, or its file was changed.
    """
    tensors = job.source.block(index, pinned=job.overlaps and job.device.type == "cuda")
    return read_stored(job.skeleton.block_name(index), tensors)
