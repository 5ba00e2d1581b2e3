"""What a mode gives to the training loop: a model, the parameters to train, and where they must stay zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunus.model.linears import Linear
from prunus.recovery.masks import kept_size, mask_of

__all__ = ["Trainable", "masked"]


@dataclass(frozen=True)
class Trainable:
    """A model that is ready to be trained.

    Attributes:
        model: a causal LM; all else in it stays as it is.
        parameters: what is trained, float32, by names that tell them apart in a checkpoint.
        supports: name of a parameter -> bool of its shape, False where it is zero and stays so.
        added: how many parameters the model has that its checkpoint had not, and that stay.
        size: of the model's own weights where these are trained, see `supports.kept_size`; default rates go by it.
    """

    model: Any
    parameters: dict[str, nn.Parameter]
    supports: dict[str, torch.Tensor] = field(default_factory=dict)
    added: int = 0
    size: float = 1.0


def masked(model: Any, linears: dict[str, Linear]) -> Trainable:
    """Train everything: all parameters of a float32 model, but for the pruned weights of its pruned linears.

    Gradients of pruned weights are set to zero before the optimiser sees them. So their moments stay zero, and a
    step of Adam (0 / (√0 + ε)) and weight decay (0 · λ) leave an exact zero where it is; and what the norm of the
    gradient is clipped by is the gradient of what is trained.
    """
    model.requires_grad_(True)
    supports = {f"{name}.weight": mask_of(linear.parameter) for name, linear in linears.items()}
    return Trainable(model, dict(model.named_parameters()), supports, size=kept_size(linears))
