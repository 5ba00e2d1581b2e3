"""What a mode trains: the model, the trained parameters, and which of their weights stay zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunus.model.linears import Linear
from prunus.recovery.masks import kept_rms, mask_of


@dataclass(frozen=True)
class Trainable:
    """A model that is ready to be trained.

    Attributes:
        model: A causal LM. Everything in it but `parameters` stays as it is.
        parameters: What is trained, float32. The names identify them in a checkpoint.
        pruned: Full name -> pruned linear, in mode masked. Its zeros stay zero.
        masks: Name of a parameter -> bool of its shape, False where it must stay zero.
        added: Number of parameters that the result has and the pruned checkpoint has not.
        weight_rms: Root mean square of the model's own kept weights if these are trained. The
            default learning rate is relative to it. 1 for low-rank factors.
        rates: Name of a parameter -> its learning rate, as a multiple of that of the others.
    """

    model: Any
    parameters: dict[str, nn.Parameter]
    pruned: Mapping[str, Linear] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    added: int = 0
    weight_rms: float = 1.0
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """How many numbers are trained. Pruned weights are not."""
        zeros = sum(m.numel() - int(torch.count_nonzero(m)) for m in self.masks.values())
        return sum(p.numel() for p in self.parameters.values()) - zeros


def masked(model: Any, linears: Mapping[str, Linear]) -> Trainable:
    """Mode masked: train all parameters of a float32 model except its pruned weights.

    Gradients of pruned weights are set to zero before the optimizer sees them. Their moments then
    stay zero. So a step of Adam (0 / (√0 + ε)) and weight decay (0 · λ) leave an exact zero in
    place. Gradient clipping sees only the gradients of what is trained.
    """
    masks = {f"{name}.weight": mask_of(linear.parameter) for name, linear in linears.items()}
    return Trainable(model, _all(model), linears, masks, weight_rms=kept_rms(linears))


def full(model: Any, linears: Mapping[str, Linear]) -> Trainable:
    """Mode full: train all parameters of a float32 model that has no pruned weights."""
    return Trainable(model, _all(model), weight_rms=kept_rms(linears))


def _all(model: nn.Module) -> dict[str, nn.Parameter]:
    model.requires_grad_(True)
    return dict(model.named_parameters())
