"""The modules of a packed model: a linear on a bitmap, and a dense linear that uses the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prunus.packed.bitmap import check, expand
from prunus.packed.operators import bitmap_linear, dense_linear, is_plain, run_bitmap, run_dense
from prunus.packed.weight import Coding, PackedWeight

__all__ = ["BitmapLinear", "DenseLinear", "use_dense_kernel"]

_CODING = ("weight_codes", "weight_high_bytes", "weight_rare_at", "weight_rare")
_PACKED = ("weight", "weight_mask", "weight_scales", *_CODING, "row_offsets")


class BitmapLinear(nn.Module):
    """Replaces an `nn.Linear` whose weight is packed.

    Its state is what `docs/reference/bitmap-format.md` describes. `weight` holds the stored values
    in one row; the other buffers hold what is needed to place and to decode them, where the form of
    the weight has it. They are buffers and not parameters: packed weights are not trained, but a
    gradient passes through to the inputs.

    Args:
        packed: the weight. Its tensors may be on the meta device, to be filled from a loaded state;
            then `prepare` must be called before the module runs.
        bias: (O,), or None.
    """

    weight: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        parts = (
            packed.values,
            packed.mask,
            packed.scales,
            *(packed.coding or [None] * len(_CODING)),
        )
        for name, part in zip(_PACKED, parts, strict=False):
            self.register_buffer(name, part)
        self.register_buffer("row_offsets", None, persistent=False)
        made = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", made)
        if packed.values.device.type != "meta":
            self.prepare()

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

    def prepare(self, stored: int | None = None) -> None:
        """Check a state that was loaded and count the entries of every row.

        The module must not run before this call.

        Args:
            stored: the declared number of stored entries; see `bitmap.check`.

        Raises:
            ValueError: mask, values, scales and coding do not belong together.
        """
        self.row_offsets = check(self.packed, stored)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dense weight (out, in), by default in the stored dtype, bfloat16 for int8."""
        return expand(self.packed, dtype, self.row_offsets)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs of width {self.in_features}, got {tuple(x.shape)}")
        packed, offsets, bias = self.packed, self._buffers["row_offsets"], self._parameters["bias"]
        if is_plain(x):
            return run_bitmap(x, packed, offsets, bias)
        coding = list(packed.coding or ())
        return bitmap_linear(x, self.out_features, *packed[1:4], coding, offsets, bias)

    def extra_repr(self) -> str:
        packed = self.packed
        share = packed.nbytes / (2 * self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"values={packed.dtype}, coded={packed.coding is not None}, "
            f"masked={packed.mask is not None}, of_bfloat16={share:.3f}, "
            f"bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Let `.to(device)` move everything, but `.half()` and the like change the bias alone."""
        stored = {id(self._buffers[name]) for name in _PACKED if self._buffers[name] is not None}

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
