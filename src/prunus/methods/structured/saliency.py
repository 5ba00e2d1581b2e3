"""Numbers by which experts and blocks are removed, and the choice of the experts that stay.

The saliency of an expert in REAP (Lasby et al. 2025, arXiv 2510.13999) is

    S_e = mean over the tokens t that chose expert e of  g_e(t) · ‖f_e(t)‖

where g is the weight that the router gives to the expert, and f its output. A removed expert leaves
an error of about this size in the output of the layer for each of these tokens. The contribution of
an expert is the sum of the same terms, which is the error over the whole text.

ShortGPT (Men et al. 2024, arXiv 2403.03853) removes the blocks that turn the hidden states least:

    influence = 1 − mean over tokens of  cos(h before the block, h after it)

The KL divergence is measured instead of guessed: Σ_v p_v (log p_v − log q_v), where p are the next
tokens of the dense model and q those of the model without some blocks.

Shape suffixes: E experts, T tokens (for an expert, those that chose it), H hidden size, V
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.distributed import Ranks


class ExpertSums:
    """Sums over the tokens that chose each expert of one layer.

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
            output_TH: what the expert returns for these tokens, before the router's weight.
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
        """The share of each expert in the sum of all contributions, float64 (E,)."""
        total = self._weighted_E.sum()
        return self._weighted_E / total if total > 0 else self._weighted_E


def kept_experts(saliency_E: Tensor, keep: int, groups: int = 1) -> list[int]:
    """The experts that stay: those of the highest saliency, in rising order of their numbers.

    Args:
        saliency_E: one number per expert (E,).
        groups: the router chooses among groups of neighbouring experts of one size, so every group
            keeps the same number.

    >>> kept_experts(torch.tensor([0.1, 0.9, 0.5, 0.6]), keep=2)
    [1, 3]
    >>> kept_experts(torch.tensor([0.1, 0.2, 0.5, 0.6]), keep=2, groups=2)
    [1, 3]
    """
    by_group = saliency_E.reshape(groups, -1)
    # A stable sort: of equal experts the one with the lower number stays.
    order = by_group.sort(dim=1, descending=True, stable=True).indices[:, : keep // groups]
    first = torch.arange(groups)[:, None] * by_group.shape[1]
    return sorted((order + first).flatten().tolist())


def cosine_sum(before_TH: Tensor, after_TH: Tensor) -> float:
    """The sum over tokens of the cosine between two hidden states.

    >>> cosine_sum(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    1.0
    """
    cosine_T = torch.nn.functional.cosine_similarity(before_TH.float(), after_TH.float(), dim=-1)
    return float(cosine_T.sum(dtype=torch.float64))


def divergence_sum(dense_TV: Tensor, logits_TV: Tensor) -> float:
    """The sum over tokens of the KL divergence in nats.

    Args:
        dense_TV: log probabilities of the dense model, float32.

    >>> half = torch.tensor([[0.5, 0.5]]).log()
    >>> round(divergence_sum(half, torch.tensor([[0.0, 2.0]])), 4)
    0.4338
    """
    other_TV = logits_TV.float().log_softmax(dim=-1)
    divergence_T = torch.linalg.vecdot(dense_TV.exp(), dense_TV - other_TV)
    return float(divergence_T.sum(dtype=torch.float64))
