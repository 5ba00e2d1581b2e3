"""One linear: score, mask, write back, measure. The only place where a method meets a module.

Shape suffixes: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.hardware.numerics import all_finite, count_zeros, low_precision_product, row_spans
from prunus.methods.quantized import LinearQuantization, Quantized
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear
from prunus.packed.weight import QuantizedWeight
from prunus.pruning.block.row_sharding import row_sharding
from prunus.pruning.block.settings import LinearSettings
from prunus.pruning.records import LinearRecord


class LinearFinish(Protocol):
    """What a verb does to each linear after its zeros are chosen, such as rounding it."""

    def begin(self, name: str, statistics: InputStatistics) -> LinearQuantization:
        """How the next linear is rounded."""
        ...

    def end(self, name: str, quantized: Quantized) -> tuple[QuantizedWeight, dict[str, Any]]:
        """Note what became of a linear.

        Returns:
            The weight as the result stores it, and fields of its record.
        """
        ...


@dataclass(frozen=True)
class PrunedLinear:
    """A finished linear.

    Attributes:
        weight: in dtype and orientation of the stored weight, on its device.
        record: for the manifest.
        packed: the weight as a compressed checkpoint stores it, or None.
    """

    weight: torch.Tensor
    record: LinearRecord
    packed: QuantizedWeight | None = None


def prune_linear(
    settings: LinearSettings,
    linear: Linear,
    full_name: str,
    stored: torch.Tensor,
    statistics: InputStatistics,
    ranks: Ranks = SINGLE_PROCESS,
    finish: LinearFinish | None = None,
) -> PrunedLinear:
    """Prune one linear in place and return what is stored.

    Scores and updates start from the stored weight in float32, whatever dtype the block computes
    in. The block continues with the stored result, so that a run resumed from the shard sees the
    same numbers. The exception is `Work.reference_order`: the block continues with
    unrounded weights, and a resumed run prunes finished blocks again.

    Args:
        stored: the weight in the checkpoint's dtype and orientation, on any device.
        statistics: of its inputs, complete; see `InputStatistics.complete`.
        ranks: processes that prune the same linear at the same time and can split its rows.
        finish: what the verb does to the linear at the end; None for nothing.
    """
    started = time.perf_counter()
    method, notes = settings.method, dict[str, Any]()
    statistics.check_finite(full_name)
    if statistics.tokens == 0 and method.needs != "none":
        # Nothing is known of the inputs, so no weight can be preferred because of them.
        statistics = InputStatistics.of_equal_inputs(
            statistics.in_features, statistics.spec, statistics.sum_squares_I.device
        )
        notes["unreached"] = (
            "no calibration token reached this linear: its inputs were taken as equal"
        )
    stored_OI = _on_device(_oriented(stored, linear), linear.weight_OI)
    weight_OI = stored_OI.to(torch.float32)
    quantization = None if finish is None else finish.begin(full_name, statistics)
    work = replace(settings.work, rows=row_sharding(ranks), quantization=quantization)
    try:
        pruned = method.apply(weight_OI, statistics, work)
    except ValueError as fault:
        raise ValueError(f"{full_name}: {fault}") from fault
    if method.updates_weights:
        new_OI = pruned.weight_OI.to(stored.dtype)
    else:
        # Kept weights stay as stored, bit for bit. A way through float32 would round wider dtypes.
        new_OI = stored_OI.masked_fill(~pruned.keep_OI, 0)
    if method.updates_weights and not all_finite(new_OI):
        raise ValueError(
            f"{method.name} gave weights that are not finite for {full_name}; "
            "try a larger `damping` or more `samples`"
        )
    error, energy = _output_error(weight_OI, new_OI, statistics, ranks)
    # From here on `weight_OI` may not be used: on a device it can be the weight that this changes.
    # The original code continues with the weight as computed, and rounds only when it saves.
    linear.assign(pruned.weight_OI if work.reference_order else new_OI)
    zeros = count_zeros(new_OI)
    packed, fields = None, dict[str, Any]()
    if finish is not None and pruned.quantized is not None:
        packed, fields = finish.end(full_name, pruned.quantized)
    record = LinearRecord(
        shape=linear.shape,
        zeros=zeros,
        sparsity=zeros / new_OI.numel(),
        relative_output_error=error,
        removed_energy=energy,
        tokens=0 if "unreached" in notes else statistics.tokens,
        seconds=round(time.perf_counter() - started, 4),
        notes=notes | pruned.notes,
        **fields,
    )
    result = new_OI.T if linear.transposed else new_OI
    return PrunedLinear(result.to(stored.device).contiguous(), record, packed)


def _on_device(stored_OI: torch.Tensor, current_OI: torch.Tensor) -> torch.Tensor:
    """The stored weight on the device of the block, sent there at most once more.

    The block was filled with the stored weight, and nothing has changed it yet. So where the block
    computes in the stored dtype, its weight on the device is the stored one.
    """
    if stored_OI.device == current_OI.device:
        return stored_OI
    if stored_OI.dtype == current_OI.dtype:
        return current_OI
    return stored_OI.to(current_OI.device)


def _oriented(stored: torch.Tensor, linear: Linear) -> torch.Tensor:
    return stored.T if linear.transposed else stored


def _output_error(
    before_OI: torch.Tensor, after_OI: torch.Tensor, statistics: InputStatistics, ranks: Ranks
) -> tuple[float | None, float | None]:
    """(relative output error, removed energy); see `LinearRecord`.

    With the Gram matrix G and the change D = W − Ŵ, the lost energy of the outputs is
    ‖XDᵀ‖² = tr(D G Dᵀ) = Σ (D G) ⊙ D. With norms alone, G is taken as diagonal.
    """
    if statistics.needs == "none":
        return None, None
    gram_II = statistics.gram_II
    # A low-precision Gram is rounded already, so its products may be rounded as far.
    product = low_precision_product if statistics.spec.low_precision else torch.matmul
    squares_I = statistics.sum_squares_I.float()
    lost = total = 0.0
    if gram_II is not None:
        # Only these two products take long enough to split their rows over ranks.
        own = ranks.own_range(len(before_OI))
        before_OI, after_OI = before_OI[own.start : own.stop], after_OI[own.start : own.stop]
    # Slices of rows keep the temporaries small.
    for span in row_spans(before_OI):
        before, after = before_OI[span], after_OI[span]
        change = before - after.float()
        if gram_II is not None:
            terms = product(change, gram_II) * change, product(before, gram_II) * before
        else:
            terms = change.square_() @ squares_I, before.square() @ squares_I
        # Both sums come from the device at once, because the host waits for every number.
        sums = torch.stack([term.sum(dtype=torch.float64) for term in terms]).tolist()
        lost, total = lost + sums[0], total + sums[1]
    if gram_II is not None:
        lost, total = ranks.sum_floats([lost, total])
    share = max(0.0, lost / total) if total > 0 else 0.0
    return (share, None) if gram_II is not None else (None, share)
