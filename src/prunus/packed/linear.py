"""The linears of a packed model: packed ones, and dense ones that use a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prunus.packed.forms import check, expand
from prunus.packed.operators import (
    as_arguments,
    dense_linear,
    is_plain,
    packed_linear,
    run_dense,
    run_packed,
    warn_of_expansion,
)
from prunus.packed.weight import Packed, from_tensors, layout_of, named_tensors


class PackedLinear(nn.Module):
    """Replaces an `nn.Linear` whose weight is packed, as a bitmap or quantised.

    Its state is what `docs/reference/packed-format.md` describes: the tensors of the weight under
    their names there. They are buffers and not parameters: packed weights are not trained, but a
    gradient passes through to the inputs.

    Args:
        packed: the weight. Its tensors may be on the meta device, to be filled from a loaded state;
            then `prepare` must be called before the module runs.
        bias: (O,), or None.
        stored: the declared number of stored entries of a bitmap; see `forms.check`.

    Attributes:
        layout: codes and rows per chunk of a quantised weight; None for a bitmap.

    Raises:
        ValueError: the parts of the weight do not belong together.
    """

    weight: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self, packed: Packed, bias: torch.Tensor | None = None, stored: int | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.layout = layout_of(packed)
        self._stored = stored
        parts = named_tensors("", packed)
        self._names = tuple(parts)
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)
        self.register_buffer("offsets", None, persistent=False)
        # The dense weight on a device that has no kernels; see `dense_on_device`.
        self._kept: torch.Tensor | None = None
        made = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", made)
        if self.weight.device.type != "meta":
            self.prepare()

    @property
    def packed(self) -> Packed:
        """The weight as it is stored."""
        # The buffers are read straight from their dict: the attribute lookup of a module costs as
        # much as a small product.
        return from_tensors((self.out_features, self.in_features), self._buffers, self.layout)

    def prepare(self) -> None:
        """Check a state that was loaded and find where its rows or layers begin.

        The module must not run before this call.

        Raises:
            ValueError: the parts of the weight do not belong together.
        """
        self.offsets = check(self.packed, self._stored)
        self._kept = None

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dense weight (O, I), by default in the dtype of its values, or in bfloat16
        where these are integers.
        """
        return expand(self.packed, dtype, self.offsets)

    def dense_on_device(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight on a device without kernels, which is expanded only once.

        Both weights stay in the memory of the device until the module moves.
        """
        warn_of_expansion(self.weight.device)
        if self._kept is None or self._kept.dtype != dtype:
            with torch.no_grad():
                self._kept = self.dense(dtype)
        return self._kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs of width {self.in_features}, got {tuple(x.shape)}")
        offsets, bias = self._buffers["offsets"], self._parameters["bias"]
        if x.is_cuda and not torch.compiler.is_compiling():
            return nn.functional.linear(x, self.dense_on_device(x.dtype), bias)
        # A kernel records no gradient, so a bias in training takes the operator.
        if is_plain(x) and (bias is None or not (bias.requires_grad and torch.is_grad_enabled())):
            return run_packed(x, self.packed, offsets, bias)
        return packed_linear(x, *as_arguments(self.packed), offsets, bias)

    def extra_repr(self) -> str:
        packed = self.packed
        share = packed.nbytes / (2 * self.in_features * self.out_features)
        told = f"in_features={self.in_features}, out_features={self.out_features}"
        told += f", of_bfloat16={share:.3f}, bias={self.bias is not None}"
        if self.layout is None:
            return f"{told}, parts={', '.join(self._names)}"
        return f"{told}, codes={[[raw, list(layers)] for raw, layers in self.layout[0]]}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Let `.to(device)` move everything, but `.half()` and the like change the bias alone."""
        stored = {id(self._buffers[name]) for name in self._names}
        self._kept = None

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return (
                tensor.to(result.device)
                if id(tensor) in stored and result.dtype != tensor.dtype
                else result
            )

        return super()._apply(moved, recurse)


class DenseLinear(nn.Linear):
    """An `nn.Linear` that multiplies a few bfloat16 tokens with the kernel instead of torch.

    It is an `nn.Linear` in every other respect: the same parameters and state, and it can be tied,
    trained and adapted.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        weight = self.weight
        plain = is_plain(input) and not (weight.requires_grad and torch.is_grad_enabled())
        return (run_dense if plain else dense_linear)(input, weight, self.bias)


def plain_linear(
    weight_OI: torch.Tensor, bias: torch.Tensor | None, kind: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """Return a linear with this weight and bias. Parameters stay the same objects.

    A weight that is not a parameter becomes one that is not trained.
    """
    rows, columns = weight_OI.shape
    linear = kind(columns, rows, bias=False, device="meta")
    is_parameter = isinstance(weight_OI, nn.Parameter)
    linear.weight = weight_OI if is_parameter else nn.Parameter(weight_OI, requires_grad=False)
    linear.register_parameter("bias", bias)  # type: ignore[arg-type]
    return linear


def use_dense_kernel(model: nn.Module) -> int:
    """Turn every `nn.Linear` of a model into a `DenseLinear` with the same parameters, in place.

    Tied weights stay tied.

    Returns:
        The number of linears that were turned.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, module in found:
        model.set_submodule(name, plain_linear(module.weight, module.bias, DenseLinear))
    return len(found)
