"""How far the outputs of a block are from their targets: the interface of a loss, and the default
one.

Legend: W windows, T tokens per window, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

#: (output_WTH, target_WTH) -> (loss summed over tokens, what to divide that sum by), two scalars.
#: The first is differentiable in the output. They stay apart because several batches, and several
#: ranks, add up both before they divide.
OutputLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def relative_error(output_WTH: Tensor, target_WTH: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ_t ‖output_t − target_t‖² / ‖target_t‖² and the number of tokens, both float32.

    Tokens whose target is exactly zero do not count.

    Why each token is measured against its own target: most language models have a few tokens with
    enormous hidden states. In a plain squared error these few would outweigh all others.

    Example:
        A large and a small token that are both 10 % off count equally.

        >>> import torch
        >>> target = torch.tensor([[[1000.0, 0.0], [0.0, 1.0]]])
        >>> total, tokens = relative_error(1.1 * target, target)
        >>> round(float(total / tokens), 4)
        0.01
    """
    target_WTH = target_WTH.float()
    error_WT = (output_WTH.float() - target_WTH).square().sum(dim=-1)
    size_WT = target_WTH.square().sum(dim=-1)
    known_WT = size_WT > 0
    return (error_WT[known_WT] / size_WT[known_WT]).sum(), known_WT.float().sum()
