"""Which whole parts of a model structured pruning removes.

Experts. The saliency of an expert in REAP (Lasby et al. 2025, arXiv 2510.13999) is

    S_e = mean over the tokens t that chose expert e of  g_e(t) · ‖f_e(t)‖

where g is the weight that the router gives to the expert, and f its output. A removed expert leaves
an error of about this size in the output of the layer for each of these tokens. The contribution of
an expert is the sum of the same terms, which is the error over the whole text.

Blocks. What the model loses without a block is measured by the KL divergence of its next tokens
from those of the dense model; see `divergence.py`.

Shape suffixes: E experts, T tokens (for an expert, those that chose it), H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.distributed import sum_floats, sum_ints


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

    def complete(self) -> None:
        """Make these the sums over the tokens of all processes, which call it at the same layer."""
        self.tokens_E = torch.tensor(sum_ints(self.tokens_E.tolist()))
        weighted = sum_floats(self._weighted_E.tolist())
        self._weighted_E = torch.tensor(weighted, dtype=torch.float64)

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
    by_group = saliency_E.reshape(groups, -1)
    # Of equal experts the lower number stays.
    chosen = by_group.sort(dim=1, descending=True, stable=True).indices[:, : keep // groups]
    return sorted((chosen + torch.arange(groups)[:, None] * by_group.shape[1]).flatten().tolist())
