"""Which weights compete with each other, and from a score to a mask.

A pattern knows nothing of models, statistics or methods: it takes a score for every weight and decides which
weights stay. The lowest scores go.

Shape suffixes: O outputs (rows), I inputs (columns); G groups of weights that compete, C competitors in one,
K places of tied scores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GROUPS = ("row", "layer", "column")

# Groups are ranked about this many scores at a time: the temporaries stay small, and in the cache.
_SCORES_AT_A_TIME = 2**19
# Up to so many weights in a group are compared with each other, pair by pair.
_MOST_COMPARED = 16
# Fraction of a matrix that may go on top of the sparsity because scores are equal.
_MOST_SURPLUS = 0.01


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which weights of a linear compete for the places that the sparsity leaves.

    With `n` and `m` the pattern is N:M: at most `n` of every `m` consecutive inputs of a row are kept, which is
    the meaning hardware uses. (The original code of Wanda and SparseGPT counts the zeros; 2:4 and 4:8 agree.)
    Without them it is unstructured, and `group` says who competes:

    - "row": the weights of one output feature; exactly `int(in * sparsity)` of each row go
    - "layer": the whole matrix; `int(out * in * sparsity)` go
    - "column": the weights of one input feature; `int(out * sparsity)` of each column go
    - an integer k: k consecutive rows together; `int(k * in * sparsity)` go; the last group may be smaller

    Raises:
        ValueError: an n without an m, an n outside 0..m, or a group that is none of the above.
    """

    n: int | None = None
    m: int | None = None
    group: str | int = "row"

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
                "give row, layer, column, or how many rows compete together"
            )

    @classmethod
    def parse(cls, text: str, group: str | int = "row") -> Pattern:
        """Read "2:4" (any N:M) or "unstructured"; `group` may be the text of a number.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(group, str) and group.isascii() and group.isdigit():
            group = int(group)
        if text == "unstructured":
            return cls(group=group)
        found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
        if found is None:
            raise ValueError(
                f"the pattern {text!r} is unknown: give N:M, such as 2:4, or unstructured"
            )
        return cls(int(found[1]), int(found[2]), group)

    @property
    def is_unstructured(self) -> bool:
        """True where the sparsity says how many weights go, False for N:M."""
        return self.n is None

    @property
    def sparsity(self) -> float:
        """The fraction of weights that N:M removes, `1 - n/m`.

        Raises:
            ValueError: the pattern is unstructured; its sparsity is chosen, not implied.
        """
        if self.n is None or self.m is None:
            raise ValueError("an unstructured pattern implies no sparsity: it must be given")
        return 1 - self.n / self.m

    def removes_nothing(self, sparsity: float) -> bool:
        """True where no weight has to go: sparsity 0, or N:M with N = M."""
        return sparsity == 0 if self.n is None else self.n == self.m

    def __str__(self) -> str:
        return "unstructured" if self.n is None else f"{self.n}:{self.m}"


def check_shape(pattern: Pattern, shape: tuple[int, int], name: str) -> None:
    """See that `pattern` fits a linear of `shape` (out, in), before any work is done.

    Raises:
        ValueError: names the linear and says why the pattern does not fit.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"{name} has the shape {tuple(shape)}: only matrices (out, in) with entries can be pruned"
        )
    if pattern.m is not None and shape[1] % pattern.m:
        raise ValueError(
            f"{name} has {shape[1]} inputs, which is no multiple of {pattern.m}: "
            f"the pattern {pattern} does not fit; leave this linear out or choose another pattern"
        )


def keep_mask(score_OI: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The weights to keep, True in a bool (O, I): in every group of competitors the lowest scores go.

    Counts are exact. Of equal scores the one with the lower index goes first; within the M of an N:M group it
    is torch.topk that decides, as in the original code (always in the same way on one kind of device).

    Args:
        score_OI: finite scores, any float dtype.
        sparsity: fraction to remove in [0, 1); ignored by N:M patterns, which imply theirs.

    Raises:
        ValueError: the pattern does not fit the shape, or the sparsity is out of range.
    """
    rows, width = score_OI.shape
    check_shape(pattern, (rows, width), "the score")
    if pattern.n is not None and pattern.m is not None:
        return _keep_n_of_m(score_OI.reshape(-1, pattern.m), pattern.n).view(rows, width)
    _check_sparsity(sparsity)
    if pattern.group == "row":
        return _keep_highest(score_OI, int(width * sparsity))
    if pattern.group == "column":
        return _keep_highest(score_OI.T, int(rows * sparsity)).T.contiguous()
    together = rows if pattern.group == "layer" else min(int(pattern.group), rows)
    whole = rows - rows % together
    parts = [score_OI[:whole].reshape(-1, together * width), score_OI[whole:].reshape(1, -1)]
    kept = [_keep_highest(part, int(part.shape[1] * sparsity)) for part in parts if part.numel()]
    return torch.cat([part.view(-1, width) for part in kept])


def keep_above_threshold(score_OI: Tensor, sparsity: float) -> Tensor:
    """The weights over one threshold for the whole matrix, True in a bool (O, I); equal scores share their fate.

    With k = `int(out * in * sparsity)` the threshold is the score that k others stand below, and goes itself, as
    in the original code: one weight more than k where no scores are equal. Some 0.3 % of the weights of a 16-bit
    matrix share the magnitude at the threshold, and by index the first rows would lose most of them. Where ties
    would take over 1 % of the matrix on top (coarsely quantised weights), the exact count of `keep_mask` holds.
    """
    _check_sparsity(sparsity)
    drop = int(score_OI.numel() * sparsity)
    if drop > 0:
        kept_OI = score_OI > _kth_lowest(score_OI.reshape(1, -1), drop + 1)
        if score_OI.numel() - int(kept_OI.sum()) - drop <= _MOST_SURPLUS * score_OI.numel():
            return kept_OI
    return keep_mask(score_OI, Pattern(group="layer"), sparsity)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity is {sparsity}: it must be at least 0 and less than 1")


def _keep_n_of_m(score_GC: Tensor, n: int) -> Tensor:
    kept_GC = torch.ones_like(score_GC, dtype=torch.bool, memory_format=torch.contiguous_format)
    drop = score_GC.shape[1] - n
    if drop == 0:
        return kept_GC
    groups = max(1, _SCORES_AT_A_TIME // score_GC.shape[1])
    for score, kept in zip(score_GC.split(groups), kept_GC.split(groups), strict=True):
        if score.device.type == "cpu" and score.shape[1] <= _MOST_COMPARED:
            undecided_G = _keep_by_rank(score, kept, drop)
            score, kept[undecided_G] = score[undecided_G], True
            lowest_GD = score.topk(drop, dim=1, largest=False).indices
            kept[undecided_G] = kept[undecided_G].scatter_(1, lowest_GD, False)
        else:
            kept.scatter_(1, score.topk(drop, dim=1, largest=False).indices, False)
    return kept_GC


def _keep_by_rank(score_GC: Tensor, kept_GC: Tensor, drop: int) -> Tensor:
    """Fill `kept_GC` with True for all but the `drop` lowest of each row; returns the rows where equal scores decide.

    Every pair of columns is compared. For the few columns of N:M that takes a fifth of topk's time on a CPU.
    """
    columns = [column.contiguous() for column in score_GC.unbind(dim=1)]
    above_C = [torch.zeros(len(score_GC), dtype=torch.uint8) for _ in columns]
    is_above_G = torch.empty(len(score_GC), dtype=torch.bool)
    for right in range(len(columns)):
        for left in range(right):
            above_C[right] += torch.gt(columns[right], columns[left], out=is_above_G)
            above_C[left] += torch.gt(columns[left], columns[right], out=is_above_G)
    count_G = torch.zeros(len(score_GC), dtype=torch.uint8)
    for kept, above in zip(kept_GC.unbind(dim=1), above_C, strict=True):
        kept.copy_(torch.ge(above, drop, out=is_above_G))
        count_G += is_above_G
    # Where the last to be kept and the first to go are equal, neither has `drop` scores below it.
    return (count_G < len(columns) - drop).nonzero().flatten()


def _keep_highest(score_GC: Tensor, drop: int) -> Tensor:
    """True for all but the `drop` lowest scores of each row of (G, C), exactly; lower indices go first."""
    kept_GC = torch.ones(score_GC.shape, dtype=torch.bool, device=score_GC.device)
    if drop == 0:
        return kept_GC
    groups = max(1, _SCORES_AT_A_TIME // score_GC.shape[1])
    for score, kept in zip(score_GC.split(groups), kept_GC.split(groups), strict=True):
        threshold_G1 = _kth_lowest(score, drop)
        torch.gt(score, threshold_G1, out=kept)
        missing_G = score.shape[1] - drop - kept.sum(dim=1)
        tied_G = missing_G.nonzero().flatten()
        if tied_G.numel():
            _restore_last_ties(kept, score, threshold_G1, missing_G, tied_G)
    return kept_GC


def _restore_last_ties(
    kept_GC: Tensor, score_GC: Tensor, threshold_G1: Tensor, missing_G: Tensor, tied_G: Tensor
) -> None:
    """In the rows `tied_G`, keep the last `missing_G` of the scores that equal the threshold."""
    row_K, column_K = (score_GC[tied_G] == threshold_G1[tied_G]).nonzero(as_tuple=True)
    count_G = torch.bincount(row_K, minlength=len(tied_G))
    end_G = count_G.cumsum(dim=0)
    place_K = torch.arange(len(row_K), device=row_K.device)
    last_K = place_K >= (end_G - missing_G[tied_G])[row_K]
    kept_GC[tied_G[row_K[last_K]], column_K[last_K]] = True


def _kth_lowest(score_GC: Tensor, k: int) -> Tensor:
    """The k-th lowest score (k from 1) of each row, (G, 1)."""
    if score_GC.device.type != "cpu":
        return score_GC.kthvalue(k, dim=1, keepdim=True).values
    # On the CPU NumPy selects 2.5 times faster than torch.kthvalue, which also carries 64-bit indices along.
    # NumPy has no bfloat16; to widen a float changes no order.
    wide = score_GC if score_GC.dtype in (torch.float32, torch.float64) else score_GC.float()
    # The bits of floats from 0 on are in their order, and integers take a fifth less time.
    as_bits = wide.dtype == torch.float32 and bool(wide.amin() >= 0)
    ordered = (wide.view(torch.int32) if as_bits else wide).numpy()
    lowest = torch.from_numpy(np.partition(ordered, k - 1, axis=1)[:, k - 1 : k].copy())
    return (lowest.view(torch.float32) if as_bits else lowest).to(score_GC.dtype)
