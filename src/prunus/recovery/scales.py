"""Mode scales: train everything continuous in a compressed model; its integers stay.

    W_ij = scale_i · exp(α_i) · step_j · exp(β_j) · level_ij

The logarithms α (O,) and β (I,) begin at 0, so all of them share one learning rate, whatever the
size of the weights. Norm weights and biases are trained as they are, with rates relative to their
root mean squares. AQLM (arXiv 2401.06118) and QuIP# (arXiv 2402.04396) also train the continuous
parameters of a quantised model towards its dense model and keep the integers.

Shape suffixes: O output features (rows), I input features (columns).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prunus.packed.embedding import PackedEmbedding, unpack_module
from prunus.packed.linear import DenseLinear, PackedLinear, plain_linear
from prunus.packed.planes import decode_levels
from prunus.packed.weight import QuantizedWeight
from prunus.recovery.trainable import Trainable


class ScaledLinear(nn.Module):
    """A quantised linear in training: its integers are fixed, its scales and steps are trained.

    The forward pass uses scales and steps as they would be stored, rounded to bfloat16. So the
    held-out loss is that of the result. The gradient passes through the rounding unchanged.

    Args:
        dtype: Of the matrix product, and of the integers in memory. bfloat16 holds them exactly.
    """

    levels_OI: torch.Tensor
    scales_O: torch.Tensor
    steps_I: torch.Tensor

    def __init__(self, linear: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        packed = linear.packed
        assert isinstance(packed, QuantizedWeight)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("levels_OI", decode_levels(packed, linear.offsets).to(dtype))
        self.register_buffer("scales_O", packed.scales.float())
        self.register_buffer("steps_I", packed.steps.float())
        # α (O,) and β (I,)
        self.log_scales = nn.Parameter(torch.zeros_like(self.scales_O))
        self.log_steps = nn.Parameter(torch.zeros_like(self.steps_I))
        self.bias = linear.bias

    def scales(self) -> torch.Tensor:
        """Return the current scales (O,), rounded to bfloat16, in float32."""
        return _rounded(self.scales_O * self.log_scales.exp())

    def steps(self) -> torch.Tensor:
        """Return the current steps (I,), rounded to bfloat16, in float32."""
        return _rounded(self.steps_I * self.log_steps.exp())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O) in the dtype of the integers."""
        dtype = self.levels_OI.dtype
        with torch.autocast(x.device.type, enabled=False):
            scaled = x.to(dtype) * self.steps().to(dtype)
            y = functional.linear(scaled, self.levels_OI) * self.scales().to(dtype)
            return y if self.bias is None else y + self.bias.to(dtype)


def scales(model: Any, dtype: torch.dtype) -> Trainable:
    """Turn a loaded compressed model into one whose scales, steps, norms and biases are trained.

    A quantised embedding stays as it is, and so does the head that is tied to it. A weight that is
    packed but not trained is expanded, so that a step does not decode it again.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedEmbedding):
            unpack_module(model, name, dtype)
        elif isinstance(module, PackedLinear) and module.layout is not None:
            model.set_submodule(name, ScaledLinear(module, dtype))
        elif isinstance(module, PackedLinear):
            model.set_submodule(name, plain_linear(module.dense(dtype), module.bias))
        elif isinstance(module, DenseLinear):
            # The kernel of a `DenseLinear` does not know autocast.
            model.set_submodule(name, plain_linear(module.weight, module.bias))
    parameters, rates = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
            parameters[name] = parameter.requires_grad_(True)
            if not name.endswith((".log_scales", ".log_steps")):
                rates[name] = float(parameter.detach().square().mean().sqrt())
    return Trainable(model, parameters, rates=rates)


def trained_tensors(trainable: Trainable) -> dict[str, torch.Tensor]:
    """Return what a packed checkpoint stores of the trained parameters, by names in the model."""
    found = {
        name: parameter.detach()
        for name, parameter in trainable.parameters.items()
        if not name.endswith((".log_scales", ".log_steps"))
    }
    with torch.no_grad():
        for name, module in trainable.model.named_modules():
            if isinstance(module, ScaledLinear):
                found[f"{name}.weight_scales"] = module.scales()
                found[f"{name}.weight_steps"] = module.steps()
    return found


def dense_size(model: nn.Module) -> int:
    """Return the number of parameters that a packed model would have as a dense one."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    inside = sum(module.in_features * module.out_features for module in packed)
    return inside + sum(parameter.numel() for parameter in model.parameters())


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to bfloat16; the gradient passes through unchanged.

    The difference is exact in float32, and so is the sum.
    """
    exact = x.detach()
    return x + (exact.bfloat16().float() - exact)
