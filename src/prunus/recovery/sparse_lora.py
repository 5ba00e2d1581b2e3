"""Sparse LoRA: a low-rank update that reaches surviving weights only, and goes into the weights in the end.

    W' = W + S ⊙ (α/r · B A)      S the support of W, B (out, r) begins as zero, A (r, in) random

in the spirit of LoSA (arXiv 2405.18886) and SPP (arXiv 2405.16057). The product is masked while it is trained,
so merging it loses nothing: no parameter is added, and every pruned weight is still zero.
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

__all__ = ["merged_weights", "sparse_lora"]


class MaskedLowRank(nn.Module):
    """A parametrisation of a weight (rows, columns): adds the masked product of two trained factors.

    Args:
        weight: as it begins; its zeros stay.
        rank: of the product.
        scale: of the product, alpha / rank.
        generator: for the random factor, drawn as peft draws LoRA's: uniform within ±1/√columns.
    """

    support: torch.Tensor

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
        self.register_buffer("support", mask_of(weight))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the update, in its dtype; the product is taken in float32."""
        with torch.autocast(weight.device.type, enabled=False):
            product = (self.lora_B * self.scale) @ self.lora_A
        return weight + (product * self.support).to(weight.dtype)


def sparse_lora(
    model: Any, linears: Mapping[str, Linear], rank: int, alpha: float, seed: int
) -> Trainable:
    """Give each of these linears (by full name) a masked low-rank update; nothing else is trained.

    Raises:
        ValueError: the rank is larger than a linear allows.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    for name, linear in linears.items():
        check_rank(rank, name, linear)
        update = MaskedLowRank(linear.parameter.detach(), rank, alpha / rank, generator)
        # unsafe: torch would otherwise call the update once more to see that shapes agree, which they do.
        parametrize.register_parametrization(linear.module, "weight", update, unsafe=True)
        parameters |= {f"{name}.lora_A": update.lora_A, f"{name}.lora_B": update.lora_B}
    return Trainable(model, parameters)


def check_rank(rank: int, name: str, linear: Linear) -> None:
    """See that a low-rank update of this rank is one.

    Raises:
        ValueError: names the linear.
    """
    if rank > min(linear.shape):
        raise ValueError(
            f"--rank {rank} is more than {name} of shape {linear.shape} can have: give {min(linear.shape)} or less"
        )


def merged_weights(linears: Mapping[str, Linear]) -> dict[str, torch.Tensor]:
    """Full parameter name -> weight with its update merged, in the module's orientation."""
    with torch.no_grad():
        return {f"{name}.weight": linear.parameter.detach() for name, linear in linears.items()}
