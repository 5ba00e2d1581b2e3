"""The products of a packed model as torch operators.

`prunus::bitmap_linear`, `prunus::quantized_linear` and `prunus::dense_linear` have a real
implementation for every device, a fake one that gives shapes, and a gradient for the activations
(never for packed weights). torch.compile and torch.export see each as one node. `run_packed` and
`run_dense` are the implementations themselves; eager code calls them directly and saves the time of
the dispatcher.

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

from prunus.packed.forms import Packed, expand
from prunus.packed.kernels import library as kernels
from prunus.packed.weight import Coding, PackedWeight, PlaneCode, QuantizedWeight

__all__ = [
    "FLOATS",
    "as_packed_weight",
    "as_quantized_weight",
    "bitmap_linear",
    "codes_as_numbers",
    "dense_linear",
    "is_plain",
    "loaded_kernels",
    "on_reference_path",
    "quantized_linear",
    "reference_path",
    "run_dense",
    "run_packed",
    "warn_of_expansion",
]

#: Dtypes of activations that the kernels take.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Up to this many tokens the product from bit planes is faster than expanding the weight and
# multiplying in bfloat16 (1536 x 1536 at 2.8 bits, one core of an AMD EPYC, Zen 4).
_MAX_PLANE_TOKENS = 256
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


@functools.cache
def warn_of_expansion(device: torch.device) -> None:
    """Say once per device that packed weights are expanded there."""
    warnings.warn(
        f"prunus has kernels for the CPU only. On {device} packed weights are expanded to dense "
        "ones, once, and both stay in memory: `prunus unpack` writes a checkpoint that takes less "
        "memory there, and `--device cpu` is where a packed model is small and fast",
        RuntimeWarning,
        stacklevel=4,
    )


def is_plain(x: torch.Tensor) -> bool:
    """Whether a kernel may read this tensor's memory: a real tensor, no tracing, no gradient."""
    return (
        type(x) is torch.Tensor
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def run_packed(
    x: torch.Tensor, packed: Packed, offsets: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return `x · Wᵀ + bias` for a packed W (O, I).

    Args:
        x: (..., I).
        packed: a weight that `forms.check` accepted.
        offsets: what `forms.check` returned.
        bias: (O,), or None.

    Returns:
        (..., O) in the dtype of `x`.
    """
    compiled = loaded_kernels() if x.is_cpu else None
    if (
        compiled is None
        or _reference
        or x.dtype not in FLOATS
        or not 0 < x.numel() <= _max_tokens(compiled, packed, x) * packed.shape[1]
        or (bias is not None and bias.dtype != x.dtype)
    ):
        return functional.linear(x, _expand_for_now(packed, x.dtype, offsets), bias)
    inputs = x if x.is_contiguous() else x.contiguous()
    if isinstance(packed, QuantizedWeight):
        assert offsets is not None
        return compiled.plane_linear(inputs, packed, offsets, bias)
    return compiled.linear(inputs, packed, offsets, bias)


def _max_tokens(compiled: kernels.Kernels, packed: Packed, x: torch.Tensor) -> int:
    """Return the number of tokens up to which the kernel is the fastest way."""
    if isinstance(packed, QuantizedWeight):
        return _MAX_PLANE_TOKENS
    return compiled.max_tokens(packed.dtype, x.dtype)


def run_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x · weightᵀ + bias` for a dense weight (O, I).

    For a few bfloat16 tokens torch reaches about 60 % of the memory's bandwidth; this kernel
    reaches nearly all of it. See `run_packed` for the arguments.
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
    packed: Packed, dtype: torch.dtype, offsets: torch.Tensor | None
) -> torch.Tensor:
    """Return the dense weight in memory that the next call on this thread reuses.

    Fresh memory for every linear of every forward pass would be mapped page by page, which costs
    more than the expansion. What stays allocated has the size of the largest linear.
    """
    if packed[1].device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
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
    """The operator form of `run_packed`. `coding` is empty where values are not coded."""
    shape = (out_features, x.shape[-1])
    return run_packed(x, as_packed_weight(shape, values, mask, scales, coding), offsets, bias)


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


@torch.library.custom_op("prunus::quantized_linear", mutates_args=())
def quantized_linear(
    x: torch.Tensor,
    out_features: int,
    data: torch.Tensor,
    classes: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    codes: list[int],
    rows_per_chunk: int,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The operator form of `run_packed` for quantised weights; see `codes_as_numbers`."""
    shape = (out_features, x.shape[-1])
    weight = as_quantized_weight(shape, data, classes, steps, scales, codes, rows_per_chunk)
    return run_packed(x, weight, offsets, bias)


def codes_as_numbers(codes: tuple[PlaneCode, ...]) -> list[int]:
    """Write codes in the form that an operator takes: per code its raw bits, layers, and -1.

    >>> codes_as_numbers((PlaneCode(0, (2, 1)), PlaneCode(1, (3,))))
    [0, 2, 1, -1, 1, 3, -1]
    """
    return [number for raw, layers in codes for number in (raw, *layers, -1)]


def as_quantized_weight(
    shape: tuple[int, int],
    data: torch.Tensor,
    classes: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    codes: list[int],
    rows_per_chunk: int,
) -> QuantizedWeight:
    """Build a weight from the parts that an operator takes; see `codes_as_numbers`."""
    if classes.shape[0] != shape[1]:
        raise ValueError(
            f"inputs of width {shape[1]} do not fit a weight of {classes.shape[0]} columns"
        )
    parsed, begin = [], 0
    for end in (place for place, number in enumerate(codes) if number < 0):
        parsed.append(PlaneCode(codes[begin], tuple(codes[begin + 1 : end])))
        begin = end + 1
    return QuantizedWeight(shape, data, classes, steps, scales, tuple(parsed), rows_per_chunk)


@torch.library.custom_op("prunus::dense_linear", mutates_args=())
def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The operator form of `run_dense`."""
    return run_dense(x, weight, bias)


@bitmap_linear.register_fake
@quantized_linear.register_fake
def _(x: torch.Tensor, out_features: int, *_weight: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@dense_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep_bitmap(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, out_features, values, mask, scales, coding, offsets, _bias = inputs
    ctx.shape = (out_features, x.shape[-1])
    ctx.save_for_backward(values, mask, scales, offsets, *coding)


def _bitmap_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    values, mask, scales, offsets, *coding = ctx.saved_tensors
    packed = as_packed_weight(ctx.shape, values, mask, scales, coding)
    grad_x, grad_bias = _input_gradients(ctx, gradient, packed, offsets)
    return grad_x, None, None, None, None, [None] * len(coding), None, grad_bias


def _keep_quantized(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, out_features, data, classes, steps, scales, codes, rows_per_chunk, offsets, _bias = inputs
    ctx.shape, ctx.codes = (out_features, x.shape[-1]), (codes, rows_per_chunk)
    ctx.save_for_backward(data, classes, steps, scales, offsets)


def _quantized_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    *parts, offsets = ctx.saved_tensors
    packed = as_quantized_weight(ctx.shape, *parts, *ctx.codes)
    grad_x, grad_bias = _input_gradients(ctx, gradient, packed, offsets)
    return grad_x, *[None] * 8, grad_bias


def _input_gradients(
    ctx: Any, gradient: torch.Tensor, packed: Packed, offsets: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of a packed linear's first input, `x`, and its last, `bias`."""
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[-1]
    grad_x = gradient @ expand(packed, gradient.dtype, offsets) if wants_x else None
    return grad_x, gradient.flatten(0, -2).sum(0) if wants_bias else None


bitmap_linear.register_autograd(_bitmap_gradient, setup_context=_keep_bitmap)
quantized_linear.register_autograd(_quantized_gradient, setup_context=_keep_quantized)


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
