"""Block matching from checkpoint to checkpoint: one block of each model in memory, one shard written at a time.

Two streams go through the models side by side: dense hidden states through dense blocks, and those of the
recovered model through its blocks. Block l of the pruned model is trained so that it turns the second stream's
states before it into the first stream's behind it (see `prunus.pruning.reconstruction.train`), then both go on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from prunus.calibration.stream import TrainingText
from prunus.hardware.memory import available_memory, resident_memory
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.model.stream import Stream
from prunus.pruning.output import shard_name
from prunus.pruning.reconstruction.train import TrainOptions, TrainResult, train_block
from prunus.recovery.masks import is_pruned, mask_of, recorded_linears
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.output import ResultFolder
from prunus.recovery.record import BlockMatch
from prunus.recovery.training import Step

__all__ = ["match_blocks", "windows_of"]

# What a budget in minutes is spent on: windows of so many tokens, passed over as often as there is time.
_TOKENS = 65_536
_MANY_PASSES = 1000


def windows_of(options: RecoveryOptions) -> int:
    """Windows to train on: those of the budget's tokens divided by the passes, since every pass counts."""
    tokens = options.budget_tokens
    if tokens is None:
        return max(1, _TOKENS // options.seqlen)
    return max(1, math.ceil(tokens / (options.passes * options.seqlen)))


def match_blocks(
    options: RecoveryOptions,
    pruned: tuple[CheckpointSource, Skeleton],
    dense: tuple[CheckpointSource, Skeleton],
    text: TrainingText,
    device: torch.device,
    dtype: torch.dtype,
    result: ResultFolder,
    progress: Callable[[Step], None] | None = None,
    memory: int | None = None,
) -> None:
    """Match block after block, from the first that the result's record does not name.

    Args:
        options: budget, passes, learning rate.
        pruned, dense: source and skeleton in the dtype of the computation, of one architecture.
        text: windows.
        device: where blocks run and hidden states live.
        dtype: of the computation.
        result: shards and records go there, block by block.
        progress: called after every block.
        memory: budget of the process in bytes; None for what is free.

    Raises:
        ValueError: no linear counts as pruned, or hidden states that are not finite.
    """
    record, blocks = result.record, len(pruned[1])
    held_out = list(text.held_out.split(options.batch))
    batches = [*held_out, *text.windows(0, windows_of(options)).split(options.batch)]
    split = (range(len(held_out), len(batches)), range(len(held_out)))
    recorded = recorded_linears(pruned[0].checkpoint.folder)
    spill_to = _spill_to(batches, pruned, dtype, result.folder, memory)
    began = time.perf_counter() - sum(block.seconds for block in record.blocks)
    student, teacher = (Stream(skeleton, source, device) for source, skeleton in (pruned, dense))
    with torch.no_grad(), contextlib.closing(student), contextlib.closing(teacher):
        for stream in (student, teacher):
            stream.embed(batches, spill_to)
        for index in range(blocks):
            started = time.perf_counter()
            teacher.propagate(index, teacher.source.block(index))
            if index < len(record.blocks):
                student.propagate(index, _finished_block(result.folder, pruned[0], index))
                message = f"{record.blocks[index].name} taken from the earlier run"
            else:
                left = _seconds_left(options, time.perf_counter() - began, blocks - index)
                match, names = _match_one(
                    options, student, teacher, index, split, recorded, dtype, left
                )
                weights = match.weights if match is not None else {}
                written, linears = result.write_block(index, weights, names)
                student.propagate(index, written)
                entry = _entry(
                    student.skeleton.block_name(index), match, time.perf_counter() - started
                )
                entry.linears = linears
                record.blocks.append(entry)
                record.save(result.folder)
                message = f"{entry.name} {_in_words(entry)}"
            if progress is not None:
                share = (index + 1) / blocks
                tokens = round(share * windows_of(options) * options.seqlen * options.passes)
                progress(Step(share, tokens, time.perf_counter() - began, message))
        if not any(block.linears for block in record.blocks):
            raise ValueError(
                f"{pruned[0].checkpoint.folder} has no pruned linears; prune it first (prunus prune)"
            )


def _match_one(
    options: RecoveryOptions,
    student: Stream,
    teacher: Stream,
    index: int,
    split: tuple[range, range],
    recorded: set[str] | None,
    dtype: torch.dtype,
    seconds: float | None,
) -> tuple[TrainResult | None, list[str]]:
    """Train block `index`; returns None where none of its linears is pruned, and the names of those that are."""
    stored, skeleton = student.source.block(index), student.skeleton
    prefix = skeleton.block_name(index)
    names = [
        linear.name
        for linear in skeleton.linears(index)
        if is_pruned(f"{prefix}.{linear.name}", stored[f"{linear.name}.weight"], recorded)
    ]
    if not names:
        return None, []
    block = skeleton.fill(index, stored, student.device)
    supports = {f"{name}.weight": mask_of(block.get_parameter(f"{name}.weight")) for name in names}
    matching = TrainOptions(
        learning_rate=options.peak_rate(),
        relative=options.learning_rate is None,
        passes=options.passes if seconds is None else _MANY_PASSES,
        seconds=seconds,
        dtype=dtype,
    )
    forward = student.forward(index, block)
    try:
        match = train_block(
            block,
            lambda batch, _all: forward(batch),
            teacher.states.get,
            *split,
            supports=supports,
            options=matching,
        )
    except ValueError as fault:
        raise ValueError(f"{prefix}: {fault}") from fault
    skeleton.release(index)
    return match, names


def _entry(name: str, match: TrainResult | None, seconds: float) -> BlockMatch:
    return BlockMatch(
        name=name,
        error_before=match.error_before if match is not None else None,
        error_after=match.error_after if match is not None else None,
        steps=match.steps if match is not None else 0,
        seconds=round(seconds, 3),
        stopped=match.stopped if match is not None else None,
        linears={},
    )


def _in_words(entry: BlockMatch) -> str:
    if entry.error_before is None or entry.error_after is None:
        return "has no pruned linears"
    words = f"error {entry.error_before:.3%} to {entry.error_after:.3%} in {entry.seconds:.1f} s"
    return f"{words}; {entry.stopped}" if entry.stopped is not None else words


def _finished_block(folder: Path, source: CheckpointSource, index: int) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder, only=[shard_name(index)])
    return source.from_stored(index, checkpoint.read(source.block_keys(index)))


def _spill_to(
    batches: list[torch.Tensor],
    pruned: tuple[CheckpointSource, Skeleton],
    dtype: torch.dtype,
    folder: Path,
    memory: int | None,
) -> Path | None:
    """The folder for a file of hidden states where two streams of them do not fit beside a block that is trained.

    Raises:
        ValueError: the budget does not even hold the block.
    """
    source, skeleton = pruned
    tokens = sum(batch.numel() for batch in batches)
    need = 2 * tokens * source.config.get_text_config().hidden_size * dtype.itemsize
    # A block as stored, in the dtype of the computation, and trained in float32: weights, gradients, two moments, where
    # they began, and the best.
    parts = [
        source.block_nbytes(index)
        + sum(p.numel() for p in block.parameters()) * (dtype.itemsize + 24)
        for index, block in enumerate(skeleton.blocks)
    ]
    free = available_memory() if memory is None else memory - resident_memory()
    if memory is not None and max(parts) > free:
        raise ValueError(
            f"training a block needs {(max(parts) + resident_memory()) / 1e9:.2f} GB; the memory budget is "
            f"{memory / 1e9:.2f} GB. Raise --memory"
        )
    return folder if need > (free - max(parts)) // 2 else None


def _seconds_left(options: RecoveryOptions, elapsed: float, blocks: int) -> float | None:
    """Seconds to train a block when `blocks` are left; a fifth of its share is for what is not training."""
    if options.minutes is None:
        return None
    return max(0.1, 0.8 * (60 * options.minutes - elapsed) / blocks)
