"""One linear: score, mask, write back, measure. The only place where a method meets a module.

`change_linear` is the way of one linear through a method. Several ranks split the rows: each solves
its own, and all get the whole linear. `_RowsOverRanks` at the end of the file does that.

Shape suffixes: O outputs (rows), I inputs (columns), B bytes or columns of a block.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from prunus.distributed import own_part, ranks, split_range, sum_floats
from prunus.engine.linear_record import LinearRecord
from prunus.hardware.numerics import (
    all_finite,
    count_zeros,
    low_precision_factor,
    low_precision_product,
    row_spans,
)
from prunus.methods import Method, Work
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import (
    UNSHARDED,
    Rounded,
    RowShard,
    RowSharding,
    SolvedRows,
)
from prunus.model.linears import Linear
from prunus.words import naming

#: From the full name of a linear to how it is rounded; see `Work.rounding`.
LinearRounding = Callable[[str], object]
#: A model with a larger share of zeros than this was pruned already. Dense checkpoints have next to
#: no weights that are exactly zero.
SPARSE = 0.01
# The columns of a Gram matrix of at least this width are cut into this number of parts, when only
# one half of it is multiplied. Products with narrower parts would be slow.
_SYMMETRIC_FROM, _PARTS = 4096, 8


@dataclass(frozen=True)
class PrunedLinear:
    """A finished linear.

    Attributes:
        weight: The weight with its zeros, in dtype and orientation of the stored weight and on its
            device.
        record: What the manifest says about the linear.
        rounded: The same weight as its type stores it; None in a run that does not compress.
    """

    weight: torch.Tensor
    record: LinearRecord
    rounded: Rounded | None = None


def change_linear(
    method: Method,
    work: Work,
    linear: Linear,
    full_name: str,
    stored: torch.Tensor,
    statistics: InputStatistics,
    round_as: LinearRounding | None = None,
    learnt: torch.Tensor | None = None,
) -> PrunedLinear:
    """Prune one linear in place, and return what is stored.

    Processes that work together prune the same linear at the same time, and can split its rows.

    Scores and updates start from the stored weight in float32, whatever dtype the block computes
    in. The block continues with the stored result, so that a run resumed from the shard sees the
    same numbers. The exception is `Work.reference_order`: the block continues with unrounded
    weights, and a resumed run prunes finished blocks again.

    Args:
        method: The method, with targets and weight updates composed in.
        work: What is asked of it. How rows are split and weights are rounded is decided here.
        linear: The module. Its weight is overwritten.
        full_name: Name of the linear in the model, for messages.
        stored: The weight in the checkpoint's dtype and orientation, on any device.
        statistics: Statistics of the linear's inputs, complete; see `InputStatistics.complete`.
        round_as: How linears are rounded; None for a run that rounds none.
        learnt: The weight that is changed in place of the stored one, float32 in its orientation;
            None for the stored one.

    Raises:
        ValueError: The inputs or the new weights are not finite, or the method refuses the weight.
            The message names the linear.
    """
    started = time.perf_counter()
    notes: dict[str, Any] = {}
    statistics.check_finite(full_name)
    tokens = statistics.tokens
    if tokens == 0 and statistics.spec.needs != "none":
        # No input was seen, so no weight can be preferred because of its inputs.
        statistics = InputStatistics.of_equal_inputs(
            statistics.in_features, statistics.spec, statistics.sum_squares_I.device
        )
        notes["unreached"] = (
            "no calibration token reached this linear: its inputs were taken as equal"
        )
    stored_OI = _on_device(stored.T if linear.transposed else stored, linear.weight_OI)
    if learnt is None:
        weight_OI = stored_OI.to(torch.float32)
    else:
        weight_OI = (learnt.T if linear.transposed else learnt).to(stored_OI.device)
    if (before := count_zeros(stored_OI)) > SPARSE * stored_OI.numel():
        notes["zeros_before"] = before
    rows: RowSharding = _RowsOverRanks() if ranks().size > 1 else UNSHARDED
    work = replace(work, rows=rows, rounding=round_as(full_name) if round_as else None)
    with naming(full_name):
        pruned = method.apply(weight_OI, statistics, work)
    if method.updates_weights:
        new_OI = pruned.weight_OI.to(stored.dtype)
        if not all_finite(new_OI):
            raise ValueError(
                f"{method.name} gave weights that are not finite for {full_name}; "
                "try a larger `damping` or more `samples`"
            )
    else:
        # Weights that are not removed stay as stored, bit for bit. A way through float32 would
        # round wider dtypes.
        new_OI = stored_OI.masked_fill(~pruned.keep_OI, 0)
    error, energy = _output_error(weight_OI, new_OI, statistics, method.adds_ridge)
    # From here on `weight_OI` may not be used: on a device it can be the weight that this changes.
    # The original code continues with the weight as computed, and rounds only when it saves.
    linear.assign(pruned.weight_OI if work.reference_order else new_OI)
    zeros = count_zeros(new_OI)
    record = LinearRecord(
        shape=linear.shape,
        zeros=zeros,
        sparsity=zeros / new_OI.numel(),
        relative_output_error=error,
        removed_energy=energy,
        tokens=tokens,
        seconds=round(time.perf_counter() - started, 4),
        bits=None if pruned.rounded is None else pruned.rounded.bits,
        notes=notes | pruned.notes,
    )
    oriented = (new_OI.T if linear.transposed else new_OI).to(stored.device)
    return PrunedLinear(oriented.contiguous(), record, pruned.rounded)


def _on_device(stored_OI: torch.Tensor, current_OI: torch.Tensor) -> torch.Tensor:
    """The stored weight on the device of the block, sent there at most once more.

    The block was filled with the stored weight, and nothing has changed it yet. So if the block
    computes in the stored dtype, `current_OI`, its weight on the device, is the stored one.
    """
    is_there = stored_OI.device != current_OI.device and stored_OI.dtype == current_OI.dtype
    return current_OI if is_there else stored_OI.to(current_OI.device)


def _output_error(
    before_OI: torch.Tensor,
    after_OI: torch.Tensor,
    statistics: InputStatistics,
    low_precision: bool,
) -> tuple[float | None, float | None]:
    """(relative output error, removed energy), of which at most one is a number.

    With the Gram matrix G = XᵀX and the change D = W − Ŵ, the lost energy of the outputs is
    ‖XDᵀ‖² = tr(D G Dᵀ) = Σ (D G) ⊙ D. Divided by that of W in place of D, it is the relative output
    error. With norms alone, G is taken as diagonal, and the same quotient is the removed energy;
    see `LinearRecord`. Both are None for a run that keeps no statistics.

    Args:
        before_OI: The stored weight, float32.
        after_OI: The new weight, in the stored dtype.
        statistics: Statistics of the inputs, complete.
        low_precision: Multiply D too in bfloat16 or TF32 where that is faster. The Gram matrix of
            such a method comes from rounded inputs already, so its products may be rounded as far.
            Otherwise parts of D that later columns cancel would seem to be left. W is always
            multiplied so: nothing cancels in it.
    """
    if statistics.spec.needs == "none":
        return None, None
    gram_II = statistics.gram_II
    product = low_precision_product if low_precision else torch.matmul
    squares_I = statistics.sum_squares_I.float()
    lost = 0.0
    total = 0.0
    if gram_II is not None:
        # Only these two products take long enough to split their rows over ranks.
        before_OI, after_OI = own_part(before_OI), own_part(after_OI)
    # Slices of rows keep the temporaries small.
    spans = row_spans(before_OI)
    if gram_II is not None:
        # Rounded once for all slices, if it is for the last one, which has the fewest rows.
        factor_II = low_precision_factor(gram_II, len(before_OI) - spans[-1].start)
    for span in spans:
        before, after = before_OI[span], after_OI[span]
        change = before - after.float()
        if gram_II is not None:
            exact_II = factor_II if low_precision else gram_II
            terms = (
                _energy(change, exact_II, product),
                _energy(before, factor_II, low_precision_product),
            )
        else:
            terms = (
                (change.square_() @ squares_I).sum(dtype=torch.float64),
                (before.square() @ squares_I).sum(dtype=torch.float64),
            )
        # Both sums come from the device at once, because the host waits for every number.
        sums = torch.stack(terms).tolist()
        lost += sums[0]
        total += sums[1]
    if gram_II is not None:
        lost, total = sum_floats([lost, total])
    share = max(0.0, lost / total) if total > 0 else 0.0
    return (share, None) if gram_II is not None else (None, share)


def _energy(
    rows_RI: Tensor, gram_II: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """tr(R G Rᵀ), float64, for some rows R and the symmetric matrix G.

    With parts of the columns it is Σ_i tr(R_i G_ii R_iᵀ) + 2 Σ_{i<j} tr(R_i G_ij R_jᵀ). So a wide
    matrix needs little more than half of the products.
    """
    inputs = len(gram_II)
    step = -(-inputs // _PARTS) if inputs >= _SYMMETRIC_FROM and gram_II.is_cpu else inputs
    total = gram_II.new_zeros((), dtype=torch.float64)
    for start in range(0, inputs, step):
        columns = slice(start, start + step)
        terms_RI = product(rows_RI[:, columns], gram_II[columns, start:]).mul_(rows_RI[:, start:])
        terms_RI[:, :step] /= 2
        total += 2 * terms_RI.sum(dtype=torch.float64)
    return total


@dataclass(frozen=True)
class _RankShard(RowShard):
    """The rows of one linear that one rank solves."""

    rows: slice = field()  #: rows of this rank
    lengths: list[int]  #: per rank, its number of rows

    def joint_mask(self, score_OB: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        return choose(ranks().all_gather(score_OB, self.lengths))[self.rows]

    def sum(self, number: float) -> float:
        return sum_floats([number])[0]


class _RowsOverRanks(RowSharding):
    """One shard per rank. With too few rows, every rank solves all of them."""

    def solve(
        self, rows: int, rows_per_group: int, solve: Callable[[RowShard], SolvedRows]
    ) -> SolvedRows:
        lengths = [len(part) for part in split_range(rows, ranks().size, rows_per_group)]
        if not all(lengths):
            return UNSHARDED.solve(rows, rows_per_group, solve)
        # Rows that compete with each other stay on one rank.
        part = ranks().own_range(rows, rows_per_group)
        solved = solve(_RankShard(slice(part.start, part.stop), lengths))
        notes = [json.loads(text) for text in ranks().gather_text(json.dumps(solved.notes))]
        # Weights and masks travel side by side, row by row, as bytes: one message instead of two.
        values = {each.name: getattr(solved, each.name) for each in fields(solved)}
        own = {name: x.contiguous() for name, x in values.items() if isinstance(x, Tensor)}
        sides = [tensor.view(torch.uint8) for tensor in own.values()]
        all_OB = ranks().all_gather(torch.cat(sides, dim=1), lengths)
        parts = all_OB.split([side.shape[1] for side in sides], dim=1)
        whole = zip(own.items(), parts, strict=True)
        tensors = {name: part.contiguous().view(x.dtype) for (name, x), part in whole}
        return replace(solved, notes=_merge_notes(notes), **tensors)


def _merge_notes(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """The notes of a linear from those of its shards, in the order of ranks.

    Of numbers the largest stays, of texts the last.

    >>> _merge_notes([{"ridge": 0.1, "conjugate_gradients": 9}, {"ridge": 0.2}])
    {'ridge': 0.2, 'conjugate_gradients': 9}
    """
    merged: dict[str, Any] = {}
    for notes in by_rank:
        for key, value in notes.items():
            merged[key] = value if isinstance(value, str) else max(merged.get(key, value), value)
    return merged
