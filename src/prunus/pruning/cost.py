"""What a run on a given checkpoint costs: memory per block, and disk.

Everything follows from shapes; no weights are read.
"""

from __future__ import annotations

from prunus.methods.statistics import statistics_bytes
from prunus.model.source import ModuleSource
from prunus.pruning.compression_cost import compressed_bytes
from prunus.pruning.job import PruningJob
from prunus.pruning.reconstruction.kl_loss import CHUNK_TOKENS
from prunus.pruning.reconstruction.reconstruct_block import in_front_of_head
from prunus.runs.block_memory import (
    BYTES_PER_PRUNED_WEIGHT,
    BlockMemory,
    paused_bytes,
    transient_bytes,
)

__all__ = ["block_memory", "disk_bytes", "file_bytes"]


def block_memory(job: PruningJob, index: int) -> BlockMemory:
    """The memory that block `index` needs while it is pruned, in bytes.

    Args:
        job: The run; its own `block_memory` may still be empty.
        index: Position of the block.
    """
    linears = job.skeleton.linears(index)
    itemsize = job.dtype.itemsize
    window_tokens, hidden = job.skeleton.window_shape(index, job.recipe.seqlen)
    tokens = job.windows * window_tokens
    batch_tokens = min(job.batch * window_tokens, tokens)
    widest = max(max(linear.shape) for linear in linears)
    parameters = sum(p.numel() for p in job.skeleton.blocks[index].parameters())
    # The hidden states of the dense model are kept beside those of the pruned one.
    models = 2 if job.runs_dense_stream else 1
    streams = job.needs_inputs * models

    working = _working_bytes(job, index)
    transient = job.needs_inputs * transient_bytes(batch_tokens, hidden, widest, itemsize)
    if job.reconstruction is not None and job.reconstruction.applies_to(index, len(job.skeleton)):
        # Training holds six float32 tensors per parameter: the weight, its gradient, Adam's two
        # moments, a copy of the start and a copy of the best so far.
        working += 6 * 4 * parameters
        # The backward pass needs all activations in float32, with the scores of every head.
        heads = int(getattr(job.source.config.get_text_config(), "num_attention_heads", 1) or 1)
        transient += 4 * batch_tokens * (24 * hidden + 8 * widest + 4 * heads * window_tokens)
        if in_front_of_head(job.skeleton, index):
            # The head, and for some tokens the logits of both models; see `kl_divergence`.
            vocabulary = job.skeleton.vocabulary
            transient += vocabulary * hidden * itemsize + 24 * CHUNK_TOKENS * job.batch * vocabulary
    return BlockMemory(
        weights=2 * job.source.block_nbytes(index) + models * parameters * itemsize,
        working=working,
        hidden=streams * tokens * hidden * itemsize,
        paused=streams * paused_bytes(tokens, hidden, widest, itemsize),
        transient=transient,
    )


def _working_bytes(job: PruningJob, index: int) -> int:
    """Bytes of temporaries while a linear of block `index` is pruned, and of its statistics."""
    method, linears = job.linear_settings.method, job.skeleton.linears(index)
    largest = max(linear.shape[0] * linear.shape[1] for linear in linears)
    inputs = max(linear.shape[1] for linear in linears)
    working = BYTES_PER_PRUNED_WEIGHT * largest + statistics_bytes(inputs, method.needs)
    if method.needs == "gram":
        # Solvers hold six float32 matrices like the weight, and six like the Gram matrix, or three
        # of the latter in float64.
        working += 6 * 4 * largest + 6 * 4 * inputs**2
        if job.recipe.propagate == "block":
            # Two passes: the statistics of all linears of the block exist at the same time.
            working += sum(statistics_bytes(linear.shape[1], method.needs) for linear in linears)
    # A dense target adds five float32 matrices like the Gram, or ten with held-out statistics.
    targets = [linear.shape[1] for linear in linears if job.uses_dense_target(linear.shape[1])]
    matrices = 10 if method.needs_held_out else 5
    return working + matrices * 4 * max(targets, default=0) ** 2


def file_bytes(job: PruningJob) -> int:
    """Bytes of the weights of the result. A loaded model is pruned in place and has no file."""
    if isinstance(job.source, ModuleSource):
        return 0
    if job.recipe.bits is not None:
        return compressed_bytes(job)
    return job.source.checkpoint.nbytes(job.source.checkpoint.tensors)


def disk_bytes(job: PruningJob) -> int:
    """Bytes of the result, with the file of spilled hidden states beside it.

    A loaded model is pruned in place and needs no disk.
    """
    if isinstance(job.source, ModuleSource):
        return 0
    return file_bytes(job) + (
        max(memory.hidden for memory in job.block_memory) if job.spills else 0
    )
