"""Mode sparse-lora: a low-rank update of the surviving weights only, merged into them at the end.

    W' = W + M ⊙ (α/r · B A)      M the mask of W; B (out, r) begins as zero, A (r, in) is random

LoSA (arXiv 2405.18886) and SPP (arXiv 2405.16057) train pruned models in this spirit. The product
is masked during training, not only at the end. So merging loses nothing, adds no parameter, and
leaves every pruned weight at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from prunus.model.linears import Linear
from prunus.recovery.masks import mask_of
from prunus.recovery.trainable import Trainable

__all__ = ["check_rank", "merged_weights", "sparse_lora"]


class MaskedLowRank(nn.Module):
    """A parametrization of a weight (rows, columns): adds the masked product of two factors.

    Args:
        weight: the weight at the start; its zeros stay.
        rank: of the product.
        scale: of the product, alpha / rank.
        generator: for the random factor. It is drawn as peft draws that of LoRA: uniform within
            ±1/√columns.
    """

    mask: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = scale
        bound = columns**-0.5
        drawn = (torch.rand(rank, columns, generator=generator) * 2 - 1) * bound
        self.lora_A = nn.Parameter(drawn.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.register_buffer("mask", mask_of(weight))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with its update, in its dtype. The product is computed in float32."""
        with torch.autocast(weight.device.type, enabled=False):
            product = (self.lora_B * self.scale) @ self.lora_A
        return weight + (product * self.mask).to(weight.dtype)


def sparse_lora(
    model: Any, linears: Mapping[str, Linear], rank: int, alpha: float, seed: int
) -> Trainable:
    """Give each of these linears a masked low-rank update; nothing else is trained.

    Args:
        model: a causal LM, float32.
        linears: full name -> linear of the model.
        rank, alpha: the update is masked alpha / rank · B A.
        seed: of the random factors.

    Raises:
        ValueError: the rank is larger than a linear allows.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    for name, linear in linears.items():
        check_rank(rank, name, linear)
        update = MaskedLowRank(linear.parameter.detach(), rank, alpha / rank, generator)
        # Without `unsafe`, torch would run the update once more to compare shapes, which agree.
        parametrize.register_parametrization(linear.module, "weight", update, unsafe=True)
        parameters |= {f"{name}.lora_A": update.lora_A, f"{name}.lora_B": update.lora_B}
    return Trainable(model, parameters)


def check_rank(rank: int, name: str, linear: Linear) -> None:
    """Check that an update of this rank fits a linear.

    Raises:
        ValueError: it does not; the message names the linear.
    """
    if rank > min(linear.shape):
        raise ValueError(
            f"--rank {rank} is more than {name} of shape {linear.shape} can have: "
            f"give {min(linear.shape)} or less"
        )


def merged_weights(linears: Mapping[str, Linear]) -> dict[str, torch.Tensor]:
    """Return full parameter name -> weight with its update merged, in the module's orientation."""
    with torch.no_grad():
        return {f"{name}.weight": linear.parameter.detach() for name, linear in linears.items()}
