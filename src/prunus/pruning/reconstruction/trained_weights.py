"""The weights of a block while it is trained: parameters, float32 masters, masks and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from prunus.distributed import Ranks


class TrainedWeights:
    """The trained parameters of a block, and the float32 masters that Adam updates.

    A float32 parameter is its own master. In bfloat16, a parameter is its master rounded. The
    masters are needed there because most steps are smaller than the spacing of bfloat16 numbers:
    added to a bfloat16 weight they would be rounded away, in the master they add up.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.parameters, self.masks = parameters, masks
        # On a CPU a product takes a quarter of the time if both factors have the same dtype.
        self._kept = {name: masks[name].to(p.dtype) for name, p in parameters.items()}
        # Where the training began: the block gets these values back at the end, and interpolations
        # start from them.
        self.start = {name: p.detach().clone() for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in parameters.items()
        }

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: master.detach().clone() for name, master in self.masters.items()}

    def interpolate(
        self, end: Mapping[str, torch.Tensor], fraction: float
    ) -> dict[str, torch.Tensor]:
        """Return start + fraction · (end − start), float32."""
        return {name: self.start[name].float().lerp(last, fraction) for name, last in end.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            if values[name] is not parameter:
                parameter.copy_(values[name])

    def take_gradients(self, ranks: Ranks) -> dict[str, torch.Tensor]:
        """Take the gradients from the parameters, sum them over ranks, and mask them; float32.

        A parameter without a gradient on any rank is left out, such as an expert that no token
        reached.
        """
        present = ranks.gather_ints([p.grad is not None for p in self.parameters.values()])
        anywhere = dict(zip(self.parameters, map(any, zip(*present, strict=True)), strict=True))
        found = {}
        for name, parameter in self.parameters.items():
            if anywhere[name]:
                if parameter.grad is not None:
                    # A pruned weight gets a zero gradient, so Adam's update of it is exactly zero.
                    # On a CPU, the product takes a tenth of the time of masked_fill.
                    found[name] = parameter.grad.mul_(self._kept[name]).float()
                else:
                    # Another rank may have the gradient, so this one joins the sum with zeros.
                    found[name] = torch.zeros_like(parameter, dtype=torch.float32)
                ranks.all_reduce(found[name])
            parameter.grad = None
        return found


@contextlib.contextmanager
def trainable(block: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[TrainedWeights]:
    """While active, the parameters in `masks` require gradients; then they are as they were."""
    parameters = {name: block.get_parameter(name) for name in masks}
    weights = TrainedWeights(parameters, masks)
    try:
        yield weights
    finally:
        for name, parameter in parameters.items():
            # The caller stores the result itself; its block must not change under it.
            parameter.requires_grad_(False).copy_(weights.start[name])
            parameter.grad = None


@contextlib.contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """While active, all parameters of the block are float32."""
    before = {
        parameter: parameter.dtype
        for parameter in block.parameters()
        if parameter.is_floating_point()
    }
    for parameter in before:
        # Assigning `data` keeps the parameter object, which other code refers to.
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)


def kept_rms(
    weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """The root mean square of the kept weights of each parameter.

    A bias takes that of the weight of its linear: biases are often zero at the start, and a rate
    relative to zero would never move them.
    """
    found = {
        name: float((weight.detach() * masks[name]).norm() / masks[name].sum().clamp_min(1).sqrt())
        for name, weight in weights.items()
    }
    return {
        name: found.get(f"{name.removesuffix('.bias')}.weight", rms) for name, rms in found.items()
    }
