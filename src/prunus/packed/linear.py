"""The linears of a packed model: on bitmaps, on quantised weights, and dense ones with kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prunus.packed.forms import Packed, check, expand, named_tensors
from prunus.packed.operators import (
    bitmap_linear,
    codes_as_numbers,
    dense_linear,
    is_plain,
    quantized_linear,
    run_dense,
    run_packed,
    warn_of_expansion,
)
from prunus.packed.weight import Coding, PackedWeight, QuantizedWeight

__all__ = [
    "BitmapLinear",
    "DenseLinear",
    "PackedLinear",
    "QuantizedLinear",
    "packed_linear",
    "use_dense_kernel",
]

_CODING = ("weight_codes", "weight_high_bytes", "weight_rare_at", "weight_rare")


class PackedLinear(nn.Module):
    """Replaces an `nn.Linear` whose weight is packed; `BitmapLinear` and `QuantizedLinear` are two.

    Its state is what `docs/reference/packed-format.md` describes: the tensors of the weight under
    their names there. They are buffers and not parameters: packed weights are not trained, but a
    gradient passes through to the inputs.

    Args:
        packed: the weight. Its tensors may be on the meta device, to be filled from a loaded state;
            then `prepare` must be called before the module runs.
        bias: (O,), or None.
    """

    #: Names of the buffers that hold the weight.
    STATE: tuple[str, ...] = ()

    weight: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: Packed, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        parts = named_tensors("", packed)
        for name in self.STATE:
            self.register_buffer(name, parts.get(f".{name}"))
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
        raise NotImplementedError

    def prepare(self, stored: int | None = None) -> None:
        """Check a state that was loaded and find where its rows or layers begin.

        The module must not run before this call.

        Args:
            stored: the declared number of stored entries; see `forms.check`.

        Raises:
            ValueError: the parts of the weight do not belong together.
        """
        self.offsets = check(self.packed, stored)
        self._kept = None

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dense weight (out, in), by default in the stored dtype, bfloat16 for
        integers.
        """
        return expand(self.packed, dtype, self.offsets)

    def dense_on_device(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight on a device without kernels, which is expanded only once.

        It stays in the memory of the device beside the packed one until the module moves.
        """
        warn_of_expansion(self.weight.device)
        if self._kept is None or self._kept.dtype != dtype:
            with torch.no_grad():
                self._kept = self.dense(dtype)
        return self._kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs of width {self.in_features}, got {tuple(x.shape)}")
        offsets, bias = self._buffers["offsets"], self._parameters["bias"]
        if x.is_cuda and not torch.compiler.is_compiling():
            return nn.functional.linear(x, self.dense_on_device(x.dtype), bias)
        # A kernel records no gradient, so a bias in training takes the operator.
        if is_plain(x) and (bias is None or not (bias.requires_grad and torch.is_grad_enabled())):
            return run_packed(x, self.packed, offsets, bias)
        return self._operator(x)

    def _operator(self, x: torch.Tensor) -> torch.Tensor:
        """Do the same as a torch operator."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        packed = self.packed
        share = packed.nbytes / (2 * self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"of_bfloat16={share:.3f}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Let `.to(device)` move everything, but `.half()` and the like change the bias alone."""
        stored = {id(part) for name in self.STATE if (part := self._buffers[name]) is not None}
        self._kept = None

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return (
                tensor.to(result.device)
                if id(tensor) in stored and result.dtype != tensor.dtype
                else result
            )

        return super()._apply(moved, recurse)


class BitmapLinear(PackedLinear):
    """A linear whose weight is a bitmap.

    `weight` holds the stored values in one row; the other buffers hold what is needed to place and
    to decode them, where the form of the weight has it.
    """

    STATE = ("weight", "weight_mask", "weight_scales", *_CODING)

    @property
    def packed(self) -> PackedWeight:
        """The weight as it is stored."""
        # Read straight from the dict: the attribute lookup of a module costs as much as a small
        # product.
        stored: Any = self._buffers
        codes = stored["weight_codes"]
        coding = None if codes is None else Coding(codes, *(stored[name] for name in _CODING[1:]))
        values, mask, scales = stored["weight"], stored["weight_mask"], stored["weight_scales"]
        return PackedWeight((self.out_features, self.in_features), values, mask, scales, coding)

    def _operator(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed
        coding = list(packed.coding or ())
        return bitmap_linear(x, self.out_features, *packed[1:4], coding, self.offsets, self.bias)

    def extra_repr(self) -> str:
        packed = self.packed
        return (
            f"{super().extra_repr()}, values={packed.dtype}, coded={packed.coding is not None}, "
            f"masked={packed.mask is not None}"
        )


class QuantizedLinear(PackedLinear):
    """A linear whose weight is quantised.

    `weight` holds the bit planes of the integers; the other buffers hold the class and the step of
    every column and the scale of every row.
    """

    STATE = ("weight", "weight_classes", "weight_steps", "weight_scales")

    def __init__(self, packed: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
        # nn.Module allows plain attributes before its own initialisation.
        self.codes, self.rows_per_chunk = packed.codes, packed.rows_per_chunk
        super().__init__(packed, bias)

    @property
    def packed(self) -> QuantizedWeight:
        """The weight as it is stored."""
        stored: Any = self._buffers
        shape = (self.out_features, self.in_features)
        return QuantizedWeight(
            shape,
            stored["weight"],
            stored["weight_classes"],
            stored["weight_steps"],
            stored["weight_scales"],
            self.codes,
            self.rows_per_chunk,
        )

    def _operator(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed
        codes = codes_as_numbers(packed.codes)
        step, offsets, bias = packed.rows_per_chunk, self.offsets, self.bias
        return quantized_linear(x, self.out_features, *packed[1:5], codes, step, offsets, bias)

    def extra_repr(self) -> str:
        codes = [[raw, list(layers)] for raw, layers in self.codes]
        return f"{super().extra_repr()}, codes={codes}"


def packed_linear(packed: Packed, bias: torch.Tensor | None = None) -> PackedLinear:
    """Return the module that computes with a packed weight; see `PackedLinear`."""
    if isinstance(packed, QuantizedWeight):
        return QuantizedLinear(packed, bias)
    return BitmapLinear(packed, bias)


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


def use_dense_kernel(model: nn.Module) -> int:
    """Turn every `nn.Linear` of a model into a `DenseLinear` with the same parameters, in place.

    Tied weights stay tied.

    Returns:
        The number of linears that were turned.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, module in found:
        has_bias = module.bias is not None
        dense = DenseLinear(
            module.in_features,
            module.out_features,
            has_bias,
            device="meta",
            dtype=module.weight.dtype,
        )
        dense.weight, dense.bias = module.weight, module.bias
        model.set_submodule(name, dense)
    return len(found)
