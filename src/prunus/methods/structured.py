"""What structured pruning removes, and how the rest compensates for it.

Channels and heads. A channel of an MLP is a row of the linears that write it and a column of the
linear that reads it (`down`). A head is a run of rows and columns in the same way. What the model
loses shows at the output of the reader, so its columns and the Gram matrix of its inputs decide
alone. With H = XᵀX + λ diag(XᵀX) and C = H⁻¹, removing the columns S of W raises the error by

    tr W_S (C_SS)⁻¹ W_Sᵀ          if the columns that remain change by          −W_S (C_SS)⁻¹ C_S:

(optimal brain surgeon, Hassibi and Stork 1993; for whole structures in ZipLM, arXiv 2302.04089).
Afterwards C loses S as well, so the units that are left are scored anew. At the end the columns
that remain are the least-squares fit W' = W H_:K (H_KK)⁻¹, centred on the trained weights. The
ridge λ grows with columns per token, as in every least-squares fit here: see `least_squares.ridge`.
Where the linear has a bias, it is one more column, whose input is always 1 and which always stays.

Experts. The saliency of an expert in REAP (Lasby et al. 2025, arXiv 2510.13999) is

    S_e = mean over the tokens t that chose expert e of  g_e(t) · ‖f_e(t)‖

where g is the weight that the router gives to the expert, and f its output. A removed expert leaves
an error of about this size in the output of the layer for each of these tokens. The contribution of
an expert is the sum of the same terms, which is the error over the whole text.

Blocks. What the model loses without a block is measured by the KL divergence of its next tokens:
Σ_v p_v (log p_v − log q_v), where p are those of the dense model and q those of the model without
some blocks.

Shape suffixes: O outputs, I inputs, U units (runs of equally many columns), S columns of one unit,
K columns that stay; E experts, T tokens (for an expert, those that chose it), H hidden size, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.distributed import Ranks
from prunus.methods.solvers.least_squares import inner_product, is_data_limited

#: Units are removed in this many rounds. Within one round scores are not updated.
_ROUNDS = 16


@dataclass(frozen=True)
class Reader:
    """A linear that reads channels or heads, and the Gram matrix of its inputs.

    Attributes:
        weight_OI: float32, the trained weights; with a bias as the last column.
        gram_II: float32, XᵀX of the inputs; with the input 1 of a bias.
        damping: λ, a share of each diagonal entry of the Gram matrix.

    >>> reader = Reader(torch.tensor([[1.0, 2.0, 0.1, 0.1]]), torch.eye(4), damping=0.01)
    >>> reader.keep(units=2, width=2, keep=1)
    [0]
    """

    weight_OI: Tensor
    gram_II: Tensor
    damping: float

    def with_bias(self, bias_O: Tensor, sum_I: Tensor, tokens: int) -> Reader:
        """The linear with a bias as its last column, whose input is 1.

        Args:
            bias_O: float32, the bias.
            sum_I: Σ_t x of the inputs over the tokens of the Gram matrix.
            tokens: The number of these tokens.

        >>> reader = Reader(torch.ones(2, 1), torch.tensor([[5.0]]), damping=0.0)
        >>> reader.with_bias(torch.zeros(2), torch.tensor([3.0]), 2).gram_II
        tensor([[5., 3.],
                [3., 2.]])
        """
        column_I1 = sum_I.to(self.gram_II.dtype)[:, None]
        count_11 = torch.full((1, 1), float(tokens), dtype=self.gram_II.dtype)
        rows = [torch.cat([self.gram_II, column_I1], 1), torch.cat([column_I1.T, count_11], 1)]
        weight_OI = torch.cat([self.weight_OI, bias_O[:, None]], 1)
        return Reader(weight_OI, torch.cat(rows, 0), self.damping)

    def only(self, columns: list[int]) -> Reader:
        """The linear that has lost all columns but these, which are fitted to the outputs of all.

        Its columns are in the order of `columns`.
        """
        index = torch.tensor(columns)
        gram_KK = self.gram_II[index][:, index]
        return Reader(self.fit(columns)[:, index], gram_KK, self.damping)

    def keep(self, units: int, width: int, keep: int, groups: int = 1) -> list[int]:
        """The numbers of the units that stay, rising: as many in each group.

        Args:
            units: The number of units now. Columns after them, such as a bias, always stay.
            width: The number of columns of a unit.
            keep: The number of units that stay.
            groups: The number of groups, which are runs of equally many units. It divides `units`
                and `keep`.

        Raises:
            torch.linalg.LinAlgError: The damped Gram matrix is not positive definite.
        """
        per_group = units // groups
        remove = (units - keep) // groups
        left = torch.ones(units, dtype=torch.bool)
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(self._damped()))
        changed_OI = self.weight_OI.to(inverse_II.dtype, copy=True)
        rounds = min(_ROUNDS, remove)
        # How many units each group has lost.
        done = 0
        for number in range(rounds):
            now = remove * (number + 1) // rounds - done
            done += now
            score_U = _scores(changed_OI, inverse_II, units, width, left)
            removed = _lowest(score_U, now, per_group)
            left[removed] = False
            _remove(changed_OI, inverse_II, columns_of(removed.tolist(), width))
        return left.nonzero().flatten().tolist()

    def fit(self, columns: list[int]) -> Tensor:
        """The least-squares fit of some columns to the outputs of all.

        Args:
            columns: The numbers of the columns that stay.

        Returns:
            W', float32 (O, I), which is 0 in all other columns.

        Raises:
            torch.linalg.LinAlgError: The damped Gram matrix is not positive definite.

        >>> gram = torch.tensor([[4.0, 4.0], [4.0, 4.0]])  # both inputs are always equal
        >>> Reader(torch.tensor([[1.0, 2.0]]), gram, damping=0.0).fit([0]).round(decimals=1)
        tensor([[3., 0.]])
        """
        damped_II = self._damped()
        index = torch.tensor(columns)
        right_KO = damped_II[index] @ self.weight_OI.to(damped_II.dtype).T
        factor_KK = torch.linalg.cholesky(damped_II[index][:, index])
        fitted_OI = torch.zeros_like(self.weight_OI)
        fitted_OI[:, index] = torch.cholesky_solve(right_KO, factor_KK).T.float()
        return fitted_OI

    def error(self, changed_OI: Tensor) -> float:
        """‖X(W − W')ᵀ‖² / ‖XWᵀ‖², the relative squared error of the outputs with other weights W'.

        It is 0 where the linear has no outputs but 0.

        >>> reader = Reader(torch.tensor([[1.0, 0.0]]), torch.eye(2), damping=0.0)
        >>> reader.error(torch.tensor([[0.5, 0.0]]))
        0.25
        """
        whole = self._power(self.weight_OI)
        return self._power(self.weight_OI - changed_OI) / whole if whole > 0 else 0.0

    def _power(self, weight_OI: Tensor) -> float:
        """‖XWᵀ‖² = tr W XᵀX Wᵀ: products in float32, their sum in float64."""
        gram_II = self.gram_II
        used = weight_OI.any(0).nonzero().flatten()
        # Columns of zeros add nothing, so they are left out of the products.
        if len(used) < len(gram_II):
            weight_OI = weight_OI[:, used]
            gram_II = gram_II[used][:, used]
        return inner_product(weight_OI @ gram_II, weight_OI)

    def _damped(self) -> Tensor:
        """H. Inputs that are always 0 count as uncorrelated with all others.

        It is float64, but float32 where the linear is data-limited. Scaled to a diagonal of 1 + λ,
        H has no eigenvalue below λ and none above I + λ, so there its condition number is at most
        2I + 1.
        """
        wide = is_data_limited(len(self.gram_II), self.damping)
        damped_II = self.gram_II.to(torch.float32 if wide else torch.float64, copy=True)
        diagonal_I = damped_II.diagonal()
        diagonal_I.mul_(1 + self.damping).masked_fill_(diagonal_I == 0, 1.0)
        return damped_II


def columns_of(units: list[int], width: int) -> list[int]:
    """The numbers of the columns of some units of `width` columns, unit by unit.

    >>> columns_of([0, 2], width=2)
    [0, 1, 4, 5]
    """
    return [column for unit in units for column in range(unit * width, (unit + 1) * width)]


def _lowest(score_U: Tensor, count: int, per_group: int) -> Tensor:
    """The numbers of the `count` units of the lowest score in each group of `per_group` units.

    Of units with equal scores the lower numbers are chosen.
    """
    by_group = score_U.reshape(-1, per_group)
    chosen = by_group.sort(dim=1, stable=True).indices[:, :count]
    return (chosen + torch.arange(len(by_group))[:, None] * per_group).flatten()


def _scores(weight_OI: Tensor, inverse_II: Tensor, units: int, width: int, left: Tensor) -> Tensor:
    """tr W_S (C_SS)⁻¹ W_Sᵀ of every unit that is `left`, bool (U,); infinity for the others."""
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
    """Remove columns of the weights and of C (to identity) in place; the other ones compensate."""
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
    inverse_II[index] = 0
    inverse_II[:, index] = 0
    inverse_II[index, index] = 1


class ExpertSums:
    """Sums over the tokens that chose each expert of one layer.

    Args:
        count: E, the number of experts.

    Attributes:
        tokens_E: int64, how many tokens chose each expert.

    >>> sums = ExpertSums(2)
    >>> sums.add(1, torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
    >>> sums.reap_E.tolist(), sums.tokens_E.tolist()
    ([0.0, 2.5], [0, 1])
    >>> sums.contribution_E.tolist()
    [0.0, 1.0]
    """

    def __init__(self, count: int) -> None:
        self.tokens_E = torch.zeros(count, dtype=torch.int64)
        self._weighted_E = torch.zeros(count, dtype=torch.float64)

    def add(self, expert: int, output_TH: Tensor, weight_T: Tensor) -> None:
        """Add tokens that chose an expert.

        Args:
            expert: The number of the expert.
            output_TH: Its outputs for these tokens, before the router's weight; any float dtype.
            weight_T: The weights that the router gives to it; any float dtype.
        """
        norm_T = output_TH.float().norm(dim=-1)
        self._weighted_E[expert] += float(
            (weight_T.float().abs() * norm_T).sum(dtype=torch.float64)
        )
        self.tokens_E[expert] += len(weight_T)

    def complete(self, ranks: Ranks) -> None:
        """Make these the sums over the tokens of all ranks. All ranks call it at the same layer."""
        self.tokens_E = torch.tensor(ranks.gather_ints(self.tokens_E.tolist())).sum(dim=0)
        self._weighted_E = torch.tensor(
            ranks.sum_floats(self._weighted_E.tolist()), dtype=torch.float64
        )

    @property
    def reap_E(self) -> Tensor:
        """The saliency of REAP, float64 (E,); 0 for an expert that no token chose."""
        return self._weighted_E / self.tokens_E.clamp(min=1)

    @property
    def contribution_E(self) -> Tensor:
        """The share of each expert in the sum of all contributions, float64 (E,).

        All are 0 where the sum is 0.
        """
        total = self._weighted_E.sum()
        return self._weighted_E / total if total > 0 else self._weighted_E


def kept_experts(saliency_E: Tensor, keep: int, groups: int = 1) -> list[int]:
    """The experts that stay: those of the highest saliency, in rising order of their numbers.

    The router chooses among groups of neighbouring experts of one size, so every group keeps the
    same number.

    Args:
        saliency_E: One number for each expert.
        keep: How many experts stay in the layer; a multiple of `groups`.
        groups: How many groups the router has; 1 for none.

    >>> kept_experts(torch.tensor([0.1, 0.9, 0.5, 0.6]), keep=2)
    [1, 3]
    >>> kept_experts(torch.tensor([0.1, 0.2, 0.5, 0.6]), keep=2, groups=2)
    [1, 3]
    """
    # The highest are those whose negative is lowest. Of equal experts the lower number stays.
    chosen = _lowest(-saliency_E, keep // groups, len(saliency_E) // groups)
    return sorted(chosen.tolist())


def divergence_sum(dense_TV: Tensor, logits_TV: Tensor) -> float:
    """The sum over tokens of the KL divergence from the dense model, in nats.

    Args:
        dense_TV: float32, the log probabilities of the dense model.
        logits_TV: The logits of the other model, in any float dtype.

    >>> half = torch.tensor([[0.5, 0.5]]).log()
    >>> round(divergence_sum(half, torch.tensor([[0.0, 2.0]])), 4)
    0.4338
    """
    other_TV = logits_TV.float().log_softmax(dim=-1)
    return inner_product(dense_TV.exp(), dense_TV - other_TV)
