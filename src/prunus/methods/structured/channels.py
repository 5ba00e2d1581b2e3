"""Which input columns of a linear go together, and what the remaining ones compensate for.

A channel of an MLP is a row of the linears that write it and a column of the linear that reads it
(`down`). A head is a run of rows and columns in the same way. What the model loses shows at the
output of the reader, so its columns and the Gram matrix of its inputs decide alone.

With H = XᵀX + λ diag(XᵀX) and C = H⁻¹, removing the columns S of W raises the output error by

    tr W_S (C_SS)⁻¹ W_Sᵀ          if the columns that remain change by          −W_S (C_SS)⁻¹ C_S:

(optimal brain surgeon, Hassibi and Stork 1993; for whole structures in ZipLM, arXiv 2302.04089).
Afterwards C loses S as well, so the units that are left are scored anew. At the end the columns
that remain are the least-squares fit W' = W H_:K (H_KK)⁻¹, centred on the trained weights. The
ridge λ grows with columns per token, as in every least-squares fit here: see `solvers.ridge`.

Where the linear has a bias, it is one more column, whose input is always 1 and which always stays.

Shape suffixes: O outputs, I inputs, U units (runs of equally many columns), S columns of one unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.methods.solvers.least_squares import inner_product, is_data_limited

__all__ = ["Kept", "fit_columns", "keep_units", "output_power", "with_bias"]

#: Rounds in which units go. Within one round scores are not updated.
_ROUNDS = 16


@dataclass(frozen=True)
class Kept:
    """The units that stay.

    Attributes:
        units: their numbers, rising.
        columns: the columns of these units, rising.
    """

    units: list[int]
    columns: list[int]


def with_bias(
    weight_OI: Tensor, bias_O: Tensor | None, gram_II: Tensor, sum_I: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """A linear whose bias is its last column, and the Gram matrix with the input 1 that belongs.

    >>> weight, gram = with_bias(
    ...     torch.ones(2, 1), torch.zeros(2), torch.tensor([[5.0]]), torch.tensor([3.0]), 2
    ... )
    >>> gram
    tensor([[5., 3.],
            [3., 2.]])

    Args:
        weight_OI, bias_O: of the linear; without a bias nothing changes.
        gram_II: XᵀX.
        sum_I: the sum of the inputs over all tokens.
        tokens: their number.
    """
    if bias_O is None:
        return weight_OI, gram_II
    count = torch.full((1,), float(tokens), dtype=gram_II.dtype)
    column_I1 = sum_I.to(gram_II.dtype)[:, None]
    rows = [torch.cat([gram_II, column_I1], 1), torch.cat([column_I1.T, count[None]], 1)]
    return torch.cat([weight_OI, bias_O[:, None]], 1), torch.cat(rows, 0)


def _damped(gram_II: Tensor, damping: float) -> Tensor:
    """H. Inputs that are always 0 count as uncorrelated with all others.

    It is float64, but float32 where the linear is data-limited. Scaled to a diagonal of 1 + λ, H
    has no eigenvalue below λ and none above I + λ, so there its condition number is at most 2I + 1.
    """
    wide = is_data_limited(len(gram_II), damping)
    damped_II = gram_II.to(torch.float32 if wide else torch.float64, copy=True)
    diagonal_I = damped_II.diagonal()
    diagonal_I.mul_(1 + damping).masked_fill_(diagonal_I == 0, 1.0)
    return damped_II


def keep_units(
    weight_OI: Tensor,
    gram_II: Tensor,
    units: int,
    width: int,
    keep: int,
    damping: float,
    groups: int = 1,
) -> Kept:
    """Choose the units of columns that stay.

    Args:
        weight_OI: float32, of the linear that reads the columns; with a bias as its last column.
        gram_II: float32, XᵀX of its inputs.
        units: how many there are. Columns after the last unit always stay.
        width: columns per unit.
        keep: units that stay.
        damping: λ.
        groups: units form this many groups of neighbours, each of which keeps the same number.

    >>> weight, gram = torch.tensor([[1.0, 2.0, 0.1, 0.1]]), torch.eye(4)
    >>> keep_units(weight, gram, units=2, width=2, keep=1, damping=0.01).columns
    [0, 1]
    """
    per_group, go = units // groups, (units - keep) // groups
    left = torch.ones(units, dtype=torch.bool)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(_damped(gram_II, damping)))
    changed_OI = weight_OI.to(inverse_II.dtype, copy=True)
    rounds = min(_ROUNDS, go)
    done = 0
    for number in range(rounds):
        now = go * (number + 1) // rounds - done
        done += now
        score_U = _scores(changed_OI, inverse_II, units, width, left)
        gone = _lowest(score_U, now, per_group)
        left[gone] = False
        _remove(changed_OI, inverse_II, _columns(gone.tolist(), width))
    kept = left.nonzero().flatten().tolist()
    return Kept(kept, _columns(kept, width))


def _columns(units: list[int], width: int) -> list[int]:
    return [column for unit in units for column in range(unit * width, (unit + 1) * width)]


def _lowest(score_U: Tensor, count: int, per_group: int) -> Tensor:
    """The `count` units of the lowest score in each group."""
    by_group = score_U.reshape(-1, per_group)
    chosen = by_group.sort(dim=1, stable=True).indices[:, :count]
    return (chosen + torch.arange(len(by_group))[:, None] * per_group).flatten()


def _scores(weight_OI: Tensor, inverse_II: Tensor, units: int, width: int, left: Tensor) -> Tensor:
    """tr W_S (C_SS)⁻¹ W_Sᵀ of every unit that is left, infinity for the others."""
    end = units * width
    if width == 1:
        score_U = weight_OI[:, :end].square().sum(0) / inverse_II.diagonal()[:end]
    else:
        score_U = torch.zeros(units, dtype=torch.float64)
        for unit in left.nonzero().flatten().tolist():
            span = slice(unit * width, (unit + 1) * width)
            part_OS = weight_OI[:, span]
            solved_SO = torch.linalg.solve(inverse_II[span, span], part_OS.T)
            score_U[unit] = (part_OS.T * solved_SO).sum()
    return score_U.masked_fill_(~left, torch.inf)


def _remove(weight_OI: Tensor, inverse_II: Tensor, columns: list[int]) -> None:
    """Remove columns from the weights and from C, both in place; the others compensate for them.

    The removed rows and columns of C become those of the identity.
    """
    index = torch.tensor(columns)
    rows_SI = inverse_II[index]
    factor_SS = torch.linalg.cholesky(rows_SI[:, index])
    # With C_SS = LLᵀ, C loses YᵀY, where Y = L⁻¹C_S. Both products are taken in place: matrices of
    # this size take as long to allocate as to compute.
    solved_SI = torch.linalg.solve_triangular(factor_SS, rows_SI, upper=False)
    part_SO = torch.linalg.solve_triangular(factor_SS, weight_OI[:, index].T, upper=False)
    weight_OI.addmm_(part_SO.T, solved_SI, alpha=-1)
    inverse_II.addmm_(solved_SI.T, solved_SI, alpha=-1)
    weight_OI[:, index] = 0
    inverse_II[index], inverse_II[:, index] = 0, 0
    inverse_II[index, index] = 1


def fit_columns(weight_OI: Tensor, gram_II: Tensor, columns: list[int], damping: float) -> Tensor:
    """The least-squares fit of some columns to the outputs of all: (O, I), 0 outside of them.

    Args:
        weight_OI: float32, the trained weights.
        gram_II: float32, XᵀX.
        columns: those that stay.
        damping: λ.

    >>> gram = torch.tensor([[4.0, 4.0], [4.0, 4.0]])  # both inputs are always equal
    >>> fit_columns(torch.tensor([[1.0, 2.0]]), gram, [0], 0.0).round(decimals=1)
    tensor([[3., 0.]])
    """
    damped_II, index = _damped(gram_II, damping), torch.tensor(columns)
    right_KO = damped_II[index] @ weight_OI.to(damped_II.dtype).T
    factor_KK = torch.linalg.cholesky(damped_II[index][:, index])
    fitted_OI = torch.zeros_like(weight_OI)
    fitted_OI[:, index] = torch.cholesky_solve(right_KO, factor_KK).T.float()
    return fitted_OI


def output_power(weight_OI: Tensor, gram_II: Tensor) -> float:
    """‖XWᵀ‖², the squared norm of what a linear returns: tr W XᵀX Wᵀ.

    Products are float32 and their sum is float64. Columns that are 0 in all rows take no time.

    Args:
        weight_OI: float32, its weights, or a change of them.
        gram_II: float32, XᵀX.

    >>> output_power(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 1.0], [1.0, 9.0]]))
    4.0
    """
    used = weight_OI.any(0).nonzero().flatten()
    if len(used) < len(gram_II):
        weight_OI, gram_II = weight_OI[:, used], gram_II[used][:, used]
    return inner_product(weight_OI @ gram_II, weight_OI)
