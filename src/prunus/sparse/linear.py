"""The modules of a packed model: a linear on a bitmap, and a dense linear that uses the kernels too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prunus.sparse.bitmap import PackedWeight, check, expand
from prunus.sparse.operators import bitmap_linear, dense_linear, run_bitmap, run_dense

__all__ = ["BitmapLinear", "DenseLinear", "use_dense_kernel"]

_PACKED = ("weight", "weight_mask", "weight_scales", "row_offsets")


class BitmapLinear(nn.Module):
    """Takes the place of an `nn.Linear` whose weight is packed.

    Its state is what `docs/bitmap-format.md` stores: `weight` holds the surviving values in one row,
    `weight_mask` and, for int8, `weight_scales` what is needed to place them. They are buffers: packed
    weights are not trained, but a gradient passes through to the inputs.

    Args:
        in_features, out_features: as in `nn.Linear`.
        kept: number of surviving weights.
        values: dtype of the stored values.
        bias: whether there is a bias, of dtype `dtype`.
        device: where to allocate; the content is undefined until a state is loaded and `prepare` called.
    """

    weight: torch.Tensor
    weight_mask: torch.Tensor
    weight_scales: torch.Tensor | None
    row_offsets: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept: int,
        values: torch.dtype,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.empty(kept, dtype=values, device=device))
        mask = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        self.register_buffer("weight_mask", mask)
        scales = (
            torch.empty(out_features, device=device, dtype=torch.float32) if values == torch.int8 else None
        )
        self.register_buffer("weight_scales", scales)
        offsets = torch.empty(out_features + 1, dtype=torch.int64, device=device)
        self.register_buffer("row_offsets", offsets, persistent=False)
        made = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)

    @classmethod
    def of(cls, packed: PackedWeight, bias: torch.Tensor | None = None) -> BitmapLinear:
        """A linear on the given weight, ready to run; see `bitmap.check` for the errors."""
        rows, columns = packed.shape
        made = cls(columns, rows, packed.values.shape[0], packed.values.dtype, device="meta")
        made.weight, made.weight_mask, made.weight_scales = packed.values, packed.mask, packed.scales
        made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        made.prepare()
        return made

    @property
    def packed(self) -> PackedWeight:
        """The weight as it is stored."""
        return PackedWeight(self.weight_mask, self.weight, self.weight_scales, self.in_features)

    def prepare(self) -> None:
        """Check a state that was loaded and count its rows; until then the module must not run.

        Raises:
            ValueError: mask, values and scales do not belong together.
        """
        self.row_offsets = check(self.packed)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight (out, in); by default in the stored dtype, bfloat16 for int8."""
        return expand(self.packed, dtype, self.row_offsets)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs of width {self.in_features}, got {tuple(x.shape)}")
        # Straight from the dicts: a module's attributes cost as much as a small product.
        stored: Any = self._buffers
        run = run_bitmap if _is_plain(x) else bitmap_linear
        return run(
            x,
            stored["weight"],
            stored["weight_mask"],
            stored["weight_scales"],
            stored["row_offsets"],
            self.bias,
        )

    def extra_repr(self) -> str:
        density = self.weight.shape[0] / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kept={density:.3f}, "
            f"values={self.weight.dtype}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Let `.to(device)` move everything, but `.half()` and the like change the bias alone."""
        stored = {id(self._buffers[name]) for name in _PACKED}

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return (
                tensor.to(result.device) if id(tensor) in stored and result.dtype != tensor.dtype else result
            )

        return super()._apply(moved, recurse)


class DenseLinear(nn.Linear):
    """An `nn.Linear` that multiplies a few bfloat16 tokens with the kernel instead of torch.

    It is one in every other respect: same parameters, same state, and it can be tied, trained and adapted.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        weight = self.weight
        plain = _is_plain(input) and not (weight.requires_grad and torch.is_grad_enabled())
        return (run_dense if plain else dense_linear)(input, weight, self.bias)


def use_dense_kernel(model: nn.Module) -> int:
    """Turn every `nn.Linear` of a model into a `DenseLinear` with the same parameters, in place; ties stay ties.

    Returns:
        How many there were.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, module in found:
        has_bias = module.bias is not None
        dense = DenseLinear(
            module.in_features, module.out_features, has_bias, device="meta", dtype=module.weight.dtype
        )
        dense.weight, dense.bias = module.weight, module.bias
        model.set_submodule(name, dense)
    return len(found)


def _is_plain(x: torch.Tensor) -> bool:
    """Whether the operator's dispatch can be skipped: no tracing, no gradient, a real tensor."""
    return (
        type(x) is torch.Tensor
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
    )
