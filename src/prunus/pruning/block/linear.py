"""One linear: score, mask, write back, measure. The only place where a method meets a module."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.hardware.numerics import all_finite, low_precision_product, count_zeros, row_spans
from prunus.methods import Method
from prunus.methods.base import MethodOptions
from prunus.methods.patterns import Pattern
from prunus.methods.refine.permutation import Channels, with_permutation
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear
from prunus.pruning.block.row_sharding import row_sharding
from prunus.pruning.records import LinearRecord

__all__ = ["LinearSettings", "prune_linear"]


@dataclass(frozen=True)
class LinearSettings:
    """How every linear of a run is pruned."""

    method: Method
    pattern: Pattern
    sparsity: float
    options: MethodOptions


def prune_linear(
    job: LinearSettings,
    linear: Linear,
    full_name: str,
    stored: torch.Tensor,
    statistics: InputStatistics,
    channels: Channels | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[torch.Tensor, LinearRecord, torch.Tensor | None]:
    """Prune one linear in place and return what is to be stored.

    Scores and updates start from the stored weight in float32, whatever dtype the computation uses; what
    the block goes on with is the stored result, so that a run resumed from the shard sees the same numbers
    (but for `Options.reference_order`, whose resumed runs prune finished blocks again).

    Args:
        job: method, pattern, sparsity.
        linear: the module; its weight is overwritten.
        full_name: for messages.
        stored: the weight as stored, in the checkpoint's dtype and orientation, on any device.
        statistics: of its inputs, complete; see `InputStatistics.complete`.
        channels: which inputs may change places, or None.
        ranks: who prunes the same linear at the same time, and can take some of its rows.

    Returns:
        The pruned weight in dtype and orientation of `stored`, on its device; the record for the manifest; and the
        order of the inputs in which the weight keeps the pattern, int64 (in,), or None where that is theirs.

    Raises:
        ValueError: non-finite weights or activations; names the linear.
    """
    started = time.perf_counter()
    method, notes = job.method, {}
    order: Callable[[], torch.Tensor] | None = None
    if channels is not None and not job.pattern.removes_nothing(job.sparsity):
        method, order = with_permutation(method, channels)
    statistics.check_finite(full_name)
    if statistics.tokens == 0 and method.needs != "none":
        # Without inputs every feature counts the same, which makes Wanda's score row-wise magnitude.
        statistics = _equal_inputs(statistics)
        notes["unreached"] = (
            "no calibration token reached this linear: its inputs were taken as equal"
        )
    weight_OI = _oriented(stored, linear).to(linear.weight_OI.device, torch.float32)
    try:
        options = replace(job.options, rows=row_sharding(ranks))
        pruned = method.prune(weight_OI, statistics, job.pattern, job.sparsity, options)
    except ValueError as fault:
        raise ValueError(f"{full_name}: {fault}") from fault
    if method.updates_weights:
        new_OI = pruned.weight_OI.to(stored.dtype)
    else:
        # Kept weights stay as stored, bit for bit: no way through float32 for dtypes wider than it.
        new_OI = _oriented(stored, linear).to(pruned.keep_OI.device).masked_fill(~pruned.keep_OI, 0)
    if method.updates_weights and not all_finite(new_OI):
        raise ValueError(
            f"{method.name} gave weights that are not finite for {full_name}; try a larger --damping or more samples"
        )
    # The original goes on with the weight as computed, and rounds when it saves.
    linear.assign(pruned.weight_OI if job.options.reference_order else new_OI)
    error, energy = _damage(weight_OI, new_OI, statistics, ranks)
    zeros = count_zeros(new_OI)
    record = LinearRecord(
        shape=linear.shape,
        zeros=zeros,
        sparsity=zeros / new_OI.numel(),
        relative_output_error=error,
        removed_energy=energy,
        tokens=0 if "unreached" in notes else statistics.tokens,
        seconds=round(time.perf_counter() - started, 4),
        notes=notes | pruned.notes,
    )
    result = new_OI.T if linear.transposed else new_OI
    return result.to(stored.device).contiguous(), record, order() if order is not None else None


def _oriented(stored: torch.Tensor, linear: Linear) -> torch.Tensor:
    return stored.T if linear.transposed else stored


def _equal_inputs(statistics: InputStatistics) -> InputStatistics:
    return InputStatistics.of_equal_inputs(
        statistics.in_features, statistics.spec, statistics.sum_squares_I.device
    )


def _damage(
    before_OI: torch.Tensor, after_OI: torch.Tensor, statistics: InputStatistics, ranks: Ranks
) -> tuple[float | None, float | None]:
    """(relative output error, removed energy); see `LinearRecord`. Rows are taken in slices to save memory.

    The two products with a Gram matrix are shared out; what norms alone give is not worth a meeting.
    """
    if statistics.needs == "none":
        return None, None
    gram_II = statistics.gram_II
    # A low-precision Gram matrix is of inputs rounded as far as factors are here.
    product = low_precision_product if statistics.spec.low_precision else torch.matmul
    squares_I = statistics.sum_squares_I.float()
    lost = total = 0.0
    if gram_II is not None:
        mine = ranks.own_range(len(before_OI))
        before_OI, after_OI = before_OI[mine.start : mine.stop], after_OI[mine.start : mine.stop]
    for span in row_spans(before_OI):
        before, after = before_OI[span], after_OI[span]
        change = before - after.float()
        if gram_II is not None:
            lost += float((product(change, gram_II) * change).sum(dtype=torch.float64))
            total += float((product(before, gram_II) * before).sum(dtype=torch.float64))
        else:
            lost += float((change.square_() @ squares_I).sum(dtype=torch.float64))
            total += float((before.square() @ squares_I).sum(dtype=torch.float64))
    if gram_II is not None:
        lost, total = ranks.sum_floats([lost, total])
    share = max(0.0, lost / total) if total > 0 else 0.0
    return (share, None) if gram_II is not None else (None, share)
