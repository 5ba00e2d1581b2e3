"""What a compressed checkpoint weighs, and what the measurement before it costs.

Everything follows from shapes. `cost.py` adds it to the cost of the run itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prunus.methods.statistics import statistics_bytes
from prunus.model.linears import Linear
from prunus.model.source import CheckpointSource
from prunus.pruning.compressed_output import embedding_and_head
from prunus.pruning.job import PruningJob
from prunus.pruning.loss_sensitivity import PROBE_TOKENS, PROBE_WINDOWS, part_width
from prunus.pruning.rate_control import side_bits
from prunus.runs.block_memory import BlockMemory

__all__ = [
    "check_bits",
    "compressed_bytes",
    "measurement_memory",
]

# A tensor's entry in the header of a shard, without its name.
_HEADER_BYTES = 75
# What a quantised weight has beside its data: classes, steps and scales.
_PARTS = 4


def check_bits(job: PruningJob) -> None:
    """Check that the bits that the recipe asks for can be reached.

    A weight of zeros takes one bit plane, and every linear has steps, scales and classes.

    Raises:
        ValueError: They are too few.
    """
    assert job.recipe.bits is not None
    shapes = [linear.shape for linear in job.selected_linears().values()]
    weights = [rows * columns for rows, columns in shapes]
    least = sum(
        (1 + side_bits(shape)) * count for shape, count in zip(shapes, weights, strict=True)
    ) / sum(weights)
    if job.recipe.bits <= least:
        raise ValueError(
            f"bits = {job.recipe.bits:g} cannot be reached: if all weights were 0, the linears of "
            f"this model would take {least:.2f} bits per weight with their steps and scales. Give "
            "more"
        )


def compressed_bytes(job: PruningJob) -> int:
    """Bytes of the shards of a compressed checkpoint.

    The rate control spends the bits that the recipe asks for, so they say what the linears take.
    """
    assert isinstance(job.source, CheckpointSource)
    assert job.recipe.bits is not None
    checkpoint = job.source.checkpoint
    bits = dict.fromkeys(job.selected_linears(), job.recipe.bits)
    if job.recipe.head_bits is not None:
        bits |= dict.fromkeys(embedding_and_head(job.skeleton.model), job.recipe.head_bits)
    total = float(checkpoint.nbytes(checkpoint.tensors))
    total += sum(len(name) + _HEADER_BYTES for name in checkpoint.tensors)
    for name, each in bits.items():
        key = job.source.stored_name(f"{name}.weight")
        total += math.prod(checkpoint.tensors[key].shape) * each / 8 - checkpoint.nbytes([key])
        total += (_PARTS - 1) * (len(key) + _HEADER_BYTES)
    return round(total)


def measurement_memory(job: PruningJob) -> BlockMemory:
    """The memory of the pass that measures how the loss depends on each linear.

    The entry `hidden` are the inputs of all blocks, which stay on the host.
    """
    skeleton, itemsize = job.skeleton, job.dtype.itemsize
    blocks, length = range(len(skeleton)), min(PROBE_TOKENS, job.recipe.seqlen)
    tokens = min(PROBE_WINDOWS, job.recipe.samples) * length
    hidden = skeleton.window_shape(0, job.recipe.seqlen)[1]
    linears = [skeleton.linears(index) for index in blocks]
    widest = max(max(linear.shape) for block in linears for linear in block)
    parameters = max(
        sum(p.numel() for p in skeleton.blocks[index].parameters()) for index in blocks
    )
    heads = int(getattr(job.source.config.get_text_config(), "num_attention_heads", 1) or 1)
    # The backward pass needs all activations of a block, with the scores of every head.
    activations = itemsize * tokens * (24 * hidden + 8 * widest + 4 * heads * length)
    # The head sees one window at a time: its logits, their logarithms, and the gradients of both.
    vocabulary = skeleton.vocabulary
    logits = vocabulary * (hidden * itemsize + 16 * length)
    return BlockMemory(
        weights=max(map(job.source.block_nbytes, blocks)) + parameters * itemsize,
        working=max(map(_statistics_bytes, linears)),
        hidden=len(blocks) * tokens * hidden * itemsize,
        paused=0,
        transient=2 * tokens * hidden * itemsize + max(activations, logits),
    )


def _statistics_bytes(linears: Sequence[Linear]) -> int:
    """Bytes of the Gram matrices of a block's linears, one for each part of their inputs."""
    part = part_width(linears)
    return sum(
        statistics_bytes(min(part, linear.shape[1] - start), "gram")
        for linear in linears
        for start in range(0, linear.shape[1], part)
    )
