"""What a mode hands to the training loop: a model, the trained parameters, and their masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunus.model.linears import Linear
from prunus.recovery.masks import kept_rms, mask_of

__all__ = ["Trainable", "full", "masked"]


@dataclass(frozen=True)
class Trainable:
    """A model that is ready to be trained.

    Attributes:
        model: a causal LM. Everything in it but `parameters` stays as it is.
        parameters: what is trained, float32. The names identify them in a checkpoint.
        masks: name of a parameter -> bool of its shape, False where it must stay zero.
        added: number of parameters that the result has and the pruned checkpoint has not.
        weight_rms: root mean square of the model's own kept weights if these are trained. The
            default learning rate is relative to it. 1 for low-rank factors.
        rates: name of a parameter -> its learning rate, as a multiple of that of the others.
    """

    model: Any
    parameters: dict[str, nn.Parameter]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    added: int = 0
    weight_rms: float = 1.0
    rates: dict[str, float] = field(default_factory=dict)


def masked(model: Any, linears: dict[str, Linear]) -> Trainable:
    """Mode masked: train all parameters of a float32 model except its pruned weights.

    Gradients of pruned weights are set to zero before the optimizer sees them. Their moments then
    stay zero. So a step of Adam (0 / (√0 + ε)) and weight decay (0 · λ) leave an exact zero in
    place. Gradient clipping sees only the gradients of what is trained.

    Args:
        model: a causal LM, float32.
        linears: its pruned linears by full name.
    """
    model.requires_grad_(True)
    masks = {f"{name}.weight": mask_of(linear.parameter) for name, linear in linears.items()}
    return Trainable(model, dict(model.named_parameters()), masks, weight_rms=kept_rms(linears))


def full(model: Any, linears: dict[str, Linear]) -> Trainable:
    """Mode full: train all parameters of a float32 model that has no pruned weights.

    Args:
        model: a causal LM, float32.
        linears: the linears of its blocks by full name.
    """
    model.requires_grad_(True)
    return Trainable(model, dict(model.named_parameters()), weight_rms=kept_rms(linears))
