"""What a run on a given checkpoint costs: memory per block, disk, and seconds.

Everything is estimated from shapes; no weights are read. The only measurement is the rate of matrix
products on this machine. `forecast.py` does the same for models and machines that are not present.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from prunus.hardware.memory import matmul_rate
from prunus.hardware.rates import ASSUMED_GPU
from prunus.methods.statistics import statistics_bytes
from prunus.model.config_fields import experts_per_token
from prunus.model.source import ModuleSource
from prunus.pruning.allocation.sensitivity import (
    PROBE_PARTS,
    PROBE_STEPS,
    PROBE_TOKENS,
    PROBE_WINDOWS,
    layers_of,
)
from prunus.pruning.compression_cost import compressed_bytes, measured_tokens
from prunus.pruning.job import PruningJob
from prunus.pruning.loss_sensitivity import part_width
from prunus.pruning.reconstruction.kl_loss import CHUNK_TOKENS
from prunus.pruning.reconstruction.reconstruct_block import in_front_of_head
from prunus.pruning.reconstruction.schedule import (
    ReconstructionSchedule,
    default_schedule,
    linears_to_train,
    validation_count,
)
from prunus.runs.block_memory import (
    BYTES_PER_PRUNED_WEIGHT,
    REPLAY_PASSES,
    BlockMemory,
    paused_bytes,
    transient_bytes,
)

__all__ = ["block_memory", "disk_bytes", "estimate_seconds", "file_bytes"]

# Matrix products are not everything: norms, softmax, masks, hashes and files add about this much.
_OVERHEAD = 1.4


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


def estimate_seconds(job: PruningJob) -> float:
    """Seconds of a run: its operations at the rate that this machine shows, plus overhead.

    A GPU computes so fast that files and transfers count as well. Their rates are assumed, as in
    `prunus.hardware.rates`.
    """
    flops = sum(
        _forward_flops(job, index) + _solver_flops(job, index) for index in range(len(job.skeleton))
    )
    if job.recipe.allocation == "search":
        flops += _search_flops(job)
    if job.recipe.bits is not None:
        flops += _measurement_flops(job)
    flops += _logit_flops(job)
    computing = _OVERHEAD * flops / matmul_rate(job.device, job.dtype)
    return round(computing if job.device.type == "cpu" else _with_files(job, computing), 1)


def _with_files(job: PruningJob, computing: float) -> float:
    """Seconds of a run on a GPU, from the seconds of its computing."""
    read = sum(job.source.block_nbytes(index) for index in range(len(job.skeleton)))
    written, rates = file_bytes(job), ASSUMED_GPU
    assert rates.bus is not None
    reading = read / rates.read + read / rates.hashed
    writing = max(written / rates.write, written / rates.hashed)
    computing += 2 * read / rates.bus
    if isinstance(job.source, ModuleSource):
        return computing
    together = max(reading, computing, writing) if job.overlaps else reading + computing + writing
    return rates.start + together


def _forward_flops(job: PruningJob, index: int) -> float:
    """Operations of all passes of the windows through block `index`, training included."""
    tokens = job.windows * job.skeleton.window_shape(index, job.recipe.seqlen)[0]
    routing = _expert_routing(job, index)
    # Weights that an average token meets, per linear.
    sizes = {
        linear.name: linear.shape[0] * linear.shape[1] * routing.share(linear.name)
        for linear in job.skeleton.linears(index)
    }
    weights = sum(sizes.values())
    passes: float = 0
    if job.needs_inputs:
        passes = 1 if job.recipe.propagate == "linear" else 2
    if passes == 1 and not job.fits_lockstep(index):
        passes = REPLAY_PASSES + routing.experts
    passes += _dense_share(job)
    if job.reconstruction is not None and job.reconstruction.applies_to(index, len(job.skeleton)):
        names = linears_to_train(list(sizes), job.linear_settings.method.updates_weights)
        trained_share = sum(sizes[name] for name in names) / weights
        token_passes = _token_passes(job, _schedule(job, index))
        # A training step costs three passes, forward and twice as much backward.
        passes += 1 + 3 * _dense_share(job) * token_passes * trained_share
    return 2.0 * weights * tokens * passes


def _solver_flops(job: PruningJob, index: int) -> float:
    """Operations on the Gram matrices of block `index`: to sum, factor and solve with them."""
    method = job.linear_settings.method
    if method.needs != "gram":
        return 0.0
    tokens = job.windows * job.skeleton.window_shape(index, job.recipe.seqlen)[0]
    routing, flops = _expert_routing(job, index), 0.0
    for linear in job.skeleton.linears(index):
        if linear.name in job.selected[index]:
            rows, columns = linear.shape
            # About 4 of 7 linears have an input of their own, and 2 operations per entry make 1.2.
            grams = 1.2 + _dense_share(job) * job.uses_dense_target(columns)
            flops += grams * tokens * routing.share(linear.name) * columns**2
            flops += columns**3
            flops += 2.0 * method.cost_in_products * rows * columns**2
    return flops


def _logit_flops(job: PruningJob) -> float:
    """Operations of the head, where the last block is reconstructed by its logits."""
    last = len(job.skeleton) - 1
    if job.reconstruction is None or not in_front_of_head(job.skeleton, last):
        return 0.0
    window_tokens, hidden = job.skeleton.window_shape(last, job.recipe.seqlen)
    schedule = _schedule(job, last)
    dense_tokens = job.windows * window_tokens * _dense_share(job)
    tokens = dense_tokens * _token_passes(job, schedule) / schedule.logit_stride
    validated = validation_count(job.dense_batches) / job.dense_batches
    # Two operations per weight and product: the head runs forward for both models, in training and
    # in validation, and once backward in training.
    return (4.0 * validated + 6.0) * job.skeleton.vocabulary * hidden * tokens


def _search_flops(job: PruningJob) -> float:
    """Operations of a search for the allocation.

    The trials of a layer run through all blocks from its own to the last, half of them on average.
    Then whole models are pruned by parts of what was found, and compared with a second dense pass.
    """
    blocks = range(len(job.skeleton))
    weights = sum(x.shape[0] * x.shape[1] for index in blocks for x in job.skeleton.linears(index))
    layers = len(layers_of(job.selected, job.recipe.allocation_by))
    tokens = PROBE_WINDOWS * min(PROBE_TOKENS, job.recipe.seqlen)
    return 2.0 * weights * tokens * (2 + len(PROBE_PARTS) + 0.5 * layers * len(PROBE_STEPS))


def _measurement_flops(job: PruningJob) -> float:
    """Operations of the pass that measures how the loss depends on each linear.

    It runs forward through every block, then forward again and backward. Weights get no gradients,
    so backward costs as much as forward.
    """
    skeleton, tokens = job.skeleton, measured_tokens(job)
    hidden = skeleton.window_shape(0, job.recipe.seqlen)[1]
    flops = 4.0 * tokens * skeleton.vocabulary * hidden
    for index in range(len(skeleton)):
        routing, linears = _expert_routing(job, index), skeleton.linears(index)
        width = part_width(linears)
        for linear in linears:
            rows, columns = linear.shape
            part, reached = min(columns, width), tokens * routing.share(linear.name)
            flops += 6.0 * reached * rows * columns
            # A Gram matrix and a factor for each part of the inputs.
            flops += 2.0 * reached * columns * part + columns * part**2
    return flops


def _dense_share(job: PruningJob) -> float:
    """Share of the batches that also run through the dense model."""
    return 1 / job.drift_stride if job.runs_dense_stream else 0.0


def _schedule(job: PruningJob, index: int) -> ReconstructionSchedule:
    """The default schedule of block `index`, as far as the run's shapes decide it."""
    tokens, hidden = job.skeleton.window_shape(index, job.recipe.seqlen)
    return default_schedule(
        job.batch * tokens,
        hidden,
        job.linear_settings.method.updates_weights,
        job.dense_batches,
        in_front_of_head(job.skeleton, index),
    )


def _token_passes(job: PruningJob, schedule: ReconstructionSchedule) -> float:
    """How often training runs every token of a block."""
    assert job.reconstruction is not None
    return (job.reconstruction.epochs or schedule.epochs) / schedule.token_stride


class _ExpertRouting(NamedTuple):
    """How the tokens of a block spread over experts.

    Attributes:
        experts: Number of experts, 0 without any.
        share: From a linear's relative name to the share of all tokens that reach it, on average.
    """

    experts: int
    share: Callable[[str], float]


def _expert_routing(job: PruningJob, index: int) -> _ExpertRouting:
    fused = job.skeleton.fused(index)
    if not fused:
        return _ExpertRouting(0, lambda _name: 1.0)
    chosen = experts_per_token(job.source.config.get_text_config())
    experts_of = {
        member.removesuffix(".weight"): each.shape[0] for each in fused for member in each.members
    }

    def share(name: str) -> float:
        return min(1.0, chosen / experts_of[name]) if name in experts_of else 1.0

    return _ExpertRouting(max(experts_of.values()), share)
