"""Numbers by which blocks are removed: the cosine rule, and the KL divergence at the logits.

ShortGPT (Men et al. 2024, arXiv 2403.03853) removes the blocks that turn the hidden states least:

    influence = 1 − mean over tokens of  cos(h before the block, h after it)

The KL divergence is measured instead of guessed: Σ_v p_v (log p_v − log q_v), where p are the next
tokens of the dense model and q those of the model without some blocks.

Shape suffixes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
