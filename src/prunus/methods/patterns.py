"""Which weights compete with each other, and from a score per weight to a mask.

In every group of competing weights the lowest scores are removed. The Wanda paper calls the group
by (outputs, inputs): "row" is (1, all), "layer" is (all, all), "column" is (all, 1), the number 128
is (128, all), and "block" is (all, 128).

Shape suffixes: O outputs (rows), I inputs (columns); G groups of weights that compete, C
competitors in a group, D dropped weights of a group, K positions of tied scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

#: The groups of unstructured sparsity that have names; see `Pattern`.
GROUPS = ("row", "layer", "column", "block", "block-row")

#: The columns of a block, as published for SparseGPT.
BLOCK_SIZE = 128

# Groups are ranked about this many scores at a time. On a CPU temporaries are then small and stay
# in its cache.
_SCORES_AT_A_TIME = 2**19
# On a GPU every part costs kernels and a wait of the host, so parts are large there. The indices of
# such a part take half a gigabyte.
_SCORES_AT_A_TIME_ON_GPU = 2**26
# On a GPU `kthvalue` gives each group one thread block. Fewer groups than this leave most of the
# device idle, and sorting is faster.
_MIN_GROUPS_TO_SELECT = 64
# Groups of N:M up to this width are ranked by comparing all pairs.
_MAX_COMPARED = 16
# The share of a matrix that may be removed beyond the sparsity because scores are equal.
_MAX_SURPLUS = 0.01


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which weights of a linear compete, and for N:M how many of them stay.

    With `n` and `m` the pattern is N:M: at most `n` of every `m` consecutive inputs of a row are
    kept, which is also what the hardware means. (The original code of Wanda and SparseGPT counts
    the zeros instead; for 2:4 and 4:8 both readings agree.) Without `n` and `m` the pattern is
    unstructured, and `group` says which weights compete:

    - "row": the weights of one output; exactly `int(in * sparsity)` of each row are removed
    - "layer": the whole matrix; `int(out * in * sparsity)` are removed
    - "column": the weights of one input; `int(out * sparsity)` of each column are removed
    - an integer k: k consecutive rows; `int(k * in * sparsity)` are removed. The last group may be
      smaller.
    - "block": all rows of `block_size` consecutive columns; the last block may be smaller
    - "block-row": each row of `block_size` consecutive columns

    SparseGPT chooses its mask block after block, from weights that are corrected already. So it
    knows "block" and "block-row" alone.

    Attributes:
        n: How many of every `m` weights N:M keeps; None for unstructured sparsity.
        m: How many consecutive inputs compete in N:M; None for unstructured sparsity.
        group: Which weights compete in unstructured sparsity; N:M ignores it.
        block_size: The columns of a block.

    Raises:
        ValueError: One of `n` and `m` is missing, `n` is not in 0..m, or the group is unknown.

    >>> str(Pattern(2, 4)), Pattern(2, 4).is_unstructured
    ('2:4', False)
    """

    n: int | None = None
    m: int | None = None
    group: str | int = "row"
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        if (self.n is None) != (self.m is None):
            raise ValueError(f"an N:M pattern needs both numbers, got n={self.n} and m={self.m}")
        if self.n is not None and self.m is not None and (self.m < 1 or not 0 <= self.n <= self.m):
            raise ValueError(
                f"the pattern {self.n}:{self.m} is impossible: N:M keeps N of every M weights, "
                "so 0 <= N <= M and M >= 1"
            )
        is_count = (
            isinstance(self.group, int) and not isinstance(self.group, bool) and self.group >= 1
        )
        if not is_count and self.group not in GROUPS:
            raise ValueError(
                f"the group {self.group!r} is unknown: "
                f"give {', '.join(GROUPS)}, or how many rows compete together"
            )

    @property
    def is_unstructured(self) -> bool:
        """True where a sparsity says how many weights are removed, False for N:M."""
        return self.n is None

    def check_sparsity(self, sparsity: float) -> None:
        """Check the share of weights to remove; N:M implies its own and ignores it.

        Raises:
            ValueError: The pattern is unstructured, and the sparsity is not in [0, 1).

        >>> Pattern().check_sparsity(50)
        Traceback (most recent call last):
        ValueError: the sparsity is 50: it must be at least 0 and less than 1
        """
        if self.is_unstructured and not 0 <= sparsity < 1:
            raise ValueError(f"the sparsity is {sparsity}: it must be at least 0 and less than 1")

    def removes_nothing(self, sparsity: float) -> bool:
        """True where all weights stay: a sparsity of 0, or N:M with N = M."""
        return sparsity == 0 if self.n is None else self.n == self.m

    def __str__(self) -> str:
        return "unstructured" if self.n is None else f"{self.n}:{self.m}"


def check_shape(pattern: Pattern, shape: tuple[int, int], name: str) -> None:
    """Check that `pattern` fits a linear of `shape` (out, in), before any work is done.

    Args:
        pattern: Which weights compete.
        shape: The shape of the weight.
        name: The name of the linear, for the message.

    Raises:
        ValueError: The weight is not a matrix with entries, or M does not divide its inputs.

    >>> check_shape(Pattern(2, 4), (8, 10), "q_proj")
    Traceback (most recent call last):
    ValueError: q_proj has 10 inputs, which is not a multiple of 4: the pattern 2:4 does not fit; \
leave this linear out or choose another pattern
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"{name} has the shape {tuple(shape)}: "
            "only matrices (out, in) with entries can be pruned"
        )
    if pattern.m is not None and shape[1] % pattern.m:
        raise ValueError(
            f"{name} has {shape[1]} inputs, which is not a multiple of {pattern.m}: "
            f"the pattern {pattern} does not fit; leave this linear out or choose another pattern"
        )


def keep_mask(score_OI: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask of the weights to keep: in every group of competitors the lowest scores are removed.

    Counts are exact. Of equal scores the one with the lower index is removed first. Within a group
    of N:M, torch.topk decides between equal scores, as in the original code; on one kind of device
    it always decides in the same way.

    Args:
        score_OI: Finite scores of any float dtype.
        pattern: Which weights compete.
        sparsity: The share to remove, in [0, 1). N:M ignores it, because it implies its own.

    Returns:
        bool (O, I), True where a weight is kept.

    Raises:
        ValueError: The pattern does not fit the shape, or the sparsity is out of range.

    >>> score_OI = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    >>> keep_mask(score_OI, Pattern(1, 2), 0.0)
    tensor([[False,  True,  True, False]])
    >>> keep_mask(score_OI, Pattern(), 0.75)
    tensor([[False,  True, False, False]])
    """
    rows, columns = score_OI.shape
    check_shape(pattern, (rows, columns), "the score")
    if pattern.n is not None and pattern.m is not None:
        return _keep_n_of_m(score_OI.reshape(-1, pattern.m), pattern.n).view(rows, columns)
    pattern.check_sparsity(sparsity)
    # In every case the competitors of a group become one row of a matrix.
    if pattern.group == "row":
        return _keep_highest(score_OI, int(columns * sparsity))
    if pattern.group == "column":
        return _keep_highest(score_OI.T, int(rows * sparsity)).T.contiguous()
    if pattern.group in ("block", "block-row"):
        alone = replace(pattern, group="layer" if pattern.group == "block" else "row")
        blocks = score_OI.split(pattern.block_size, dim=1)
        return torch.cat([keep_mask(block, alone, sparsity) for block in blocks], dim=1)
    rows_per_group = rows if pattern.group == "layer" else min(int(pattern.group), rows)
    # The rows of whole groups are one part, and the smaller last group is the other one.
    whole = rows - rows % rows_per_group
    parts = [
        score_OI[:whole].reshape(-1, rows_per_group * columns),
        score_OI[whole:].reshape(1, -1),
    ]
    masks = [_keep_highest(part, int(part.shape[1] * sparsity)) for part in parts if part.numel()]
    return torch.cat([part.view(-1, columns) for part in masks])


def keep_above_threshold(score_OI: Tensor, sparsity: float) -> Tensor:
    """The mask of the weights above one threshold for the whole matrix.

    Equal scores are treated equally. With k = `int(out * in * sparsity)`, the threshold is the
    score that k other scores lie below. It is removed as well, as in the original code: one
    weight more than k where no scores are equal.

    Why not the exact count: about 0.3 % of the weights of a 16-bit matrix have the magnitude of the
    threshold. Removing some of them by index would take most of them from the first rows. Where
    ties would remove more than 1 % of the matrix beyond the sparsity (coarsely quantised weights),
    the exact count of `keep_mask` is used.

    Args:
        score_OI: Finite scores of any float dtype.
        sparsity: The share to remove, in [0, 1).

    Returns:
        bool (O, I), True where a weight is kept.

    Raises:
        ValueError: The sparsity is out of range.

    >>> keep_above_threshold(torch.arange(1000.0).view(20, 50), 0.5).sum()
    tensor(499)
    """
    Pattern(group="layer").check_sparsity(sparsity)
    drop = int(score_OI.numel() * sparsity)
    if drop > 0:
        # Ranks count from 1, so `drop` other scores lie below this one.
        keep_OI = score_OI > _kth_lowest(score_OI.reshape(1, -1), drop + 1)
        if score_OI.numel() - int(keep_OI.sum()) - drop <= _MAX_SURPLUS * score_OI.numel():
            return keep_OI
    return keep_mask(score_OI, Pattern(group="layer"), sparsity)


def _in_parts(score_GC: Tensor, keep_GC: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs of groups, as views of both: as many as the device sorts well at a time."""
    on_cpu = score_GC.device.type == "cpu"
    at_a_time = _SCORES_AT_A_TIME if on_cpu else _SCORES_AT_A_TIME_ON_GPU
    groups = max(1, at_a_time // score_GC.shape[1])
    return zip(score_GC.split(groups), keep_GC.split(groups), strict=True)


def _keep_n_of_m(score_GC: Tensor, n: int) -> Tensor:
    """True for the `n` highest scores of each group."""
    keep_GC = torch.ones_like(score_GC, dtype=torch.bool, memory_format=torch.contiguous_format)
    drop = score_GC.shape[1] - n
    if drop == 0:
        return keep_GC
    for score, keep in _in_parts(score_GC, keep_GC):
        if score.device.type == "cpu" and score.shape[1] <= _MAX_COMPARED:
            # Comparing pairs decides almost all groups. topk decides the few with ties, so that
            # the result is always that of topk.
            tied_G = _keep_by_rank(score, keep, drop)
            keep[tied_G] = True
            lowest_GD = score[tied_G].topk(drop, dim=1, largest=False).indices
            keep[tied_G] = keep[tied_G].scatter_(1, lowest_GD, False)
        else:
            keep.scatter_(1, score.topk(drop, dim=1, largest=False).indices, False)
    return keep_GC


def _keep_by_rank(score_GC: Tensor, keep_GC: Tensor, drop: int) -> Tensor:
    """Fill `keep_GC` with True for all but the `drop` lowest scores of each group.

    Every pair of columns is compared. For the few columns of N:M this takes a fifth of the time of
    topk on a CPU. Returns the groups in which equal scores decide: their masks are not valid yet.
    """
    columns = [column.contiguous() for column in score_GC.unbind(dim=1)]
    # How many other scores of the group lie below each score.
    above_C = [torch.zeros(len(score_GC), dtype=torch.uint8) for _ in columns]
    is_above_G = torch.empty(len(score_GC), dtype=torch.bool)
    for right in range(len(columns)):
        for left in range(right):
            above_C[right] += torch.gt(columns[right], columns[left], out=is_above_G)
            above_C[left] += torch.gt(columns[left], columns[right], out=is_above_G)
    count_G = torch.zeros(len(score_GC), dtype=torch.uint8)
    for keep, above in zip(keep_GC.unbind(dim=1), above_C, strict=True):
        keep.copy_(torch.ge(above, drop, out=is_above_G))
        count_G += is_above_G
    # If the lowest kept and the highest dropped score are equal, neither has `drop` scores below
    # it, and too few are kept.
    return (count_G < len(columns) - drop).nonzero().flatten()


def _keep_highest(score_GC: Tensor, drop: int) -> Tensor:
    """True for all but exactly `drop` lowest scores of each group.

    Of equal scores those with lower indices are dropped first.
    """
    keep_GC = torch.ones(score_GC.shape, dtype=torch.bool, device=score_GC.device)
    if drop == 0:
        return keep_GC
    for score, keep in _in_parts(score_GC, keep_GC):
        threshold_G1 = _kth_lowest(score, drop)
        torch.gt(score, threshold_G1, out=keep)
        # Scores equal to the threshold are all dropped so far. Some of them may have to be kept.
        missing_G = score.shape[1] - drop - keep.sum(dim=1)
        tied_G = missing_G.nonzero().flatten()
        if tied_G.numel():
            _restore_last_ties(keep, score, threshold_G1, missing_G, tied_G)
    return keep_GC


def _restore_last_ties(
    keep_GC: Tensor, score_GC: Tensor, threshold_G1: Tensor, missing_G: Tensor, tied_G: Tensor
) -> None:
    """In the groups `tied_G`, keep the last `missing_G` of the scores that equal the threshold."""
    row_K, column_K = (score_GC[tied_G] == threshold_G1[tied_G]).nonzero(as_tuple=True)
    count_G = torch.bincount(row_K, minlength=len(tied_G))
    end_G = count_G.cumsum(dim=0)
    # Tied scores are listed group by group. The last ones of a group are kept.
    position_K = torch.arange(len(row_K), device=row_K.device)
    last_K = position_K >= (end_G - missing_G[tied_G])[row_K]
    keep_GC[tied_G[row_K[last_K]], column_K[last_K]] = True


def _kth_lowest(score_GC: Tensor, k: int) -> Tensor:
    """The k-th lowest score (k from 1) of each group, (G, 1)."""
    if score_GC.device.type != "cpu":
        if len(score_GC) < _MIN_GROUPS_TO_SELECT:
            return score_GC.sort(dim=1).values[:, k - 1 : k]
        return score_GC.kthvalue(k, dim=1, keepdim=True).values
    # On the CPU NumPy selects 2.5 times faster than torch.kthvalue, which also moves 64-bit
    # indices. NumPy has no bfloat16, but widening a float does not change the order.
    wide = score_GC if score_GC.dtype in (torch.float32, torch.float64) else score_GC.float()
    # The bits of non-negative floats, read as integers, have the order of the floats. Selecting
    # integers takes a fifth less time.
    as_bits = wide.dtype == torch.float32 and bool(wide.amin() >= 0)
    ordered = (wide.view(torch.int32) if as_bits else wide).numpy()
    lowest = torch.from_numpy(np.partition(ordered, k - 1, axis=1)[:, k - 1 : k].copy())
    return (lowest.view(torch.float32) if as_bits else lowest).to(score_GC.dtype)
