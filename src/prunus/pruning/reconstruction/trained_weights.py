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

    Args:
        parameters: The trained parameters of the block, by relative name; float32 or bfloat16. They
            begin to require gradients. `trainable` undoes that.
        masks: Bool of each parameter's shape, True for weights that survive.

    Attributes:
        parameters: As given.
        masks: As given.
        start: A copy of the parameters' values from before the training, in their dtypes.
        masters: Float32 leaf tensors that Adam updates, by relative name.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.parameters = parameters
        self.masks = masks
        # The masks as numbers 0 and 1. On a CPU a product takes a quarter of the time if both
        # factors have the same dtype.
        self._factors = {name: masks[name].to(p.dtype) for name, p in parameters.items()}
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
        """Copies of the masters, float32."""
        return {name: master.detach().clone() for name, master in self.masters.items()}

    def interpolate(
        self, end: Mapping[str, torch.Tensor], fraction: float
    ) -> dict[str, torch.Tensor]:
        """start + fraction · (end − start), float32, where `end` has values by relative name."""
        return {name: self.start[name].float().lerp(last, fraction) for name, last in end.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put values, by relative name, into the block's parameters, rounded to their dtypes."""
        for name, parameter in self.parameters.items():
            if values[name] is not parameter:
                parameter.copy_(values[name])

    def take_gradients(self, ranks: Ranks) -> dict[str, torch.Tensor]:
        """Take the gradients from the parameters, sum them over ranks, and mask them.

        All ranks call it at once.

        Returns:
            Relative name -> gradient, float32. A parameter that has no gradient on any rank is left
            out, such as an expert that no token reached.
        """
        # Per rank, which parameters have a gradient; then, which have one on any rank.
        present = ranks.gather_ints([p.grad is not None for p in self.parameters.values()])
        anywhere = dict(zip(self.parameters, map(any, zip(*present, strict=True)), strict=True))
        gradients = {}
        for name, parameter in self.parameters.items():
            if anywhere[name]:
                if parameter.grad is not None:
                    # A pruned weight gets a zero gradient, so Adam's update of it is exactly zero.
                    # On a CPU, the product takes a tenth of the time of masked_fill.
                    gradients[name] = parameter.grad.mul_(self._factors[name]).float()
                else:
                    # Another rank has the gradient, so this one joins the sum with zeros.
                    gradients[name] = torch.zeros_like(parameter, dtype=torch.float32)
                ranks.all_reduce(gradients[name])
            parameter.grad = None
        return gradients


@contextlib.contextmanager
def trainable(block: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[TrainedWeights]:
    """Yield the parameters of `block` that `masks` names, ready to be trained.

    At the end they have the values of the beginning, and require no gradients.
    """
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
    """While active, all floating-point parameters of the block are float32.

    Afterwards they are rounded to the dtypes that they had.
    """
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
    """The root mean square of the weights of each parameter that its mask lets survive.

    A bias takes that of the weight of its linear: biases are often zero at the start, and a rate
    relative to zero would never move them.

    >>> weights = {"up.weight": torch.tensor([3.0, 5.0, 9.0]), "up.bias": torch.zeros(1)}
    >>> masks = {"up.weight": torch.tensor([True, True, False]), "up.bias": torch.tensor([True])}
    >>> {name: round(rms, 3) for name, rms in kept_rms(weights, masks).items()}
    {'up.weight': 4.123, 'up.bias': 4.123}
    """
    rms_by_name = {
        name: float((weight.detach() * masks[name]).norm() / masks[name].sum().clamp_min(1).sqrt())
        for name, weight in weights.items()
    }
    return {
        name: rms_by_name.get(f"{name.removesuffix('.bias')}.weight", rms)
        for name, rms in rms_by_name.items()
    }
