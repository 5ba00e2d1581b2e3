"""The two products of a packed model as torch operators.

`prunus::bitmap_linear` and `prunus::dense_linear` have a real implementation for every device, a
fake one that gives shapes, and a gradient for the activations (never for packed weights).
torch.compile and torch.export see each as one node. `run_bitmap` and `run_dense` are the
implementations themselves; eager code calls them directly and saves the time of the dispatcher.

Few tokens go through the kernels, and so do prompts where the machine multiplies bfloat16 matrices.
Longer inputs and other devices use the dense weight, which exists only during the call.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from prunus.packed.bitmap import expand
from prunus.packed.kernels import library as kernels
from prunus.packed.weight import Coding, PackedWeight

__all__ = [
    "FLOATS",
    "as_packed_weight",
    "bitmap_linear",
    "dense_linear",
    "is_plain",
    "loaded_kernels",
    "on_reference_path",
    "reference_path",
    "run_bitmap",
    "run_dense",
]

#: Dtypes of activations that the kernels take.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_reference = False
_workspace = threading.local()


@contextlib.contextmanager
def reference_path() -> Iterator[None]:
    """While active, no kernel multiplies: packed weights are expanded and torch computes
    everything.

    Logits are then bitwise those of the unpacked model. It is meant for tests and checks, and it
    holds for all threads.
    """
    global _reference  # noqa: PLW0603
    before, _reference = _reference, True
    try:
        yield
    finally:
        _reference = before


def on_reference_path() -> bool:
    """Whether `reference_path` is active."""
    return _reference


@functools.cache
def loaded_kernels() -> kernels.Kernels | None:
    """Return the kernels, or None where there are none, with a warning the first time."""
    found = kernels.load()
    if found is None:
        warnings.warn(
            "prunus has no kernels here, so packed models run slower than dense ones: "
            f"{kernels.why_not()}",
            RuntimeWarning,
            stacklevel=4,
        )
    return found


def is_plain(x: torch.Tensor) -> bool:
    """Whether a kernel may read this tensor's memory: a real tensor, no tracing, no gradient."""
    return (
        type(x) is torch.Tensor
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def run_bitmap(
    x: torch.Tensor, packed: PackedWeight, offsets: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return `x · Wᵀ + bias` for a packed W (O, I).

    Args:
        x: (..., I).
        packed: a weight that `bitmap.check` accepted.
        offsets: what `bitmap.check` returned.
        bias: (O,), or None.

    Returns:
        (..., O) in the dtype of `x`.
    """
    in_features = packed.shape[1]
    compiled = loaded_kernels() if x.is_cpu else None
    if (
        compiled is None
        or _reference
        or x.dtype not in FLOATS
        or not 0 < x.numel() <= compiled.max_tokens(packed.dtype, x.dtype) * in_features
        or (bias is not None and bias.dtype != x.dtype)
    ):
        return functional.linear(x, _expand_for_now(packed, x.dtype, offsets), bias)
    return compiled.linear(x if x.is_contiguous() else x.contiguous(), packed, offsets, bias)


def run_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x · weightᵀ + bias` for a dense weight (O, I).

    For a few bfloat16 tokens torch reaches about 60 % of the memory's bandwidth; this kernel
    reaches nearly all of it. See `run_bitmap` for the arguments.
    """
    in_features = x.shape[-1]
    if (
        _reference
        or not 0 < x.numel() <= kernels.MAX_TOKENS * in_features
        or not x.is_cpu
        or x.dtype != torch.bfloat16
        or weight.dtype != torch.bfloat16
        or weight.shape[1] != in_features
        or not weight.is_contiguous()
        or (bias is not None and bias.dtype != torch.bfloat16)
        or (compiled := loaded_kernels()) is None
        or not compiled.has_dense
    ):
        return functional.linear(x, weight, bias)
    return compiled.dense_linear(x if x.is_contiguous() else x.contiguous(), weight, bias)


def _expand_for_now(
    packed: PackedWeight, dtype: torch.dtype, offsets: torch.Tensor | None
) -> torch.Tensor:
    """Return the dense weight in memory that the next call on this thread reuses.

    Fresh memory for every linear of every forward pass would be mapped page by page, which costs
    more than the expansion. What stays allocated has the size of the largest linear.
    """
    if packed.values.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return expand(packed, dtype, offsets)
    size = math.prod(packed.shape)
    memory = getattr(_workspace, "memory", None)
    if memory is None or memory.numel() < size:
        memory = _workspace.memory = torch.empty(size, dtype=torch.int16)
    return expand(packed, dtype, offsets, out=memory[:size].view(dtype).view(packed.shape))


@torch.library.custom_op("prunus::bitmap_linear", mutates_args=())
def bitmap_linear(
    x: torch.Tensor,
    out_features: int,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scales: torch.Tensor | None,
    coding: list[torch.Tensor],
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The operator form of `run_bitmap`. `coding` is empty where values are not coded."""
    shape = (out_features, x.shape[-1])
    return run_bitmap(x, as_packed_weight(shape, values, mask, scales, coding), offsets, bias)


def as_packed_weight(
    shape: tuple[int, int],
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scales: torch.Tensor | None,
    coding: list[torch.Tensor],
) -> PackedWeight:
    """Build a weight from the parts that an operator takes: tensors and lists of tensors."""
    if mask is not None and mask.shape != (shape[0], (shape[1] + 7) // 8):
        raise ValueError(
            f"inputs of width {shape[1]} do not fit a mask of {mask.shape[1]} bytes a row"
        )
    return PackedWeight(shape, values, mask, scales, Coding(*coding) if coding else None)


@torch.library.custom_op("prunus::dense_linear", mutates_args=())
def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The operator form of `run_dense`."""
    return run_dense(x, weight, bias)


@bitmap_linear.register_fake
def _(x: torch.Tensor, out_features: int, *_weight: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@dense_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, out_features, values, mask, scales, coding, offsets, _bias = inputs
    ctx.shape = (out_features, x.shape[-1])
    ctx.save_for_backward(values, mask, scales, offsets, *coding)


def _bitmap_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    values, mask, scales, offsets, *coding = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        packed = as_packed_weight(ctx.shape, values, mask, scales, coding)
        grad_x = gradient @ expand(packed, gradient.dtype, offsets)
    if ctx.needs_input_grad[7]:
        grad_bias = gradient.flatten(0, -2).sum(0)
    return grad_x, None, None, None, None, [None] * len(coding), None, grad_bias


bitmap_linear.register_autograd(_bitmap_gradient, setup_context=_keep_packed)


def _keep_dense(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _bias = inputs
    ctx.save_for_backward(x, weight)


def _dense_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    flat = gradient.flatten(0, -2)
    grad_x = gradient @ weight if ctx.needs_input_grad[0] else None
    grad_weight = flat.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
    return grad_x, grad_weight, grad_bias


dense_linear.register_autograd(_dense_gradient, setup_context=_keep_dense)
