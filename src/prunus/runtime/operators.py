"""The products of a packed model as torch operators.

`prunus::packed_linear` and `prunus::packed_embedding` have a real implementation for every device
and a fake one that gives shapes. They have no gradient: packed models do not train. torch.compile
and torch.export see each as one node. Eager code calls `run_packed` and `look_up` directly and
saves the dispatcher's time. `run_dense` is for eager code alone.

The kernels compute few tokens, and prompts where the machine multiplies bfloat16 matrices. Longer
inputs and other devices use the dense weight, which exists only during the call.

In shapes, O are the output features of a linear, and I its input features.
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

from prunus.hardware.numerics import linear
from prunus.runtime.forms import expand, expand_rows
from prunus.runtime.kernels import library as kernels
from prunus.runtime.weight import (
    Packed,
    PackedWeight,
    PlaneCode,
    from_tensors,
    layout_of,
    named_tensors,
)

#: Dtypes of activations that the kernels take.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Whether `reference_path` is active.
_reference = False
# Memory of each thread for `_expand_for_now`.
_workspace = threading.local()


@contextlib.contextmanager
def reference_path() -> Iterator[None]:
    """While active, packed weights are expanded and torch computes everything, on all threads.

    Logits are then bitwise those of the unpacked model. It is meant for tests and checks.
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
    opened = kernels.load()
    if opened is None:
        warnings.warn(
            "prunus has no kernels here, so packed models run slower than dense ones: "
            f"{kernels.why_not()}",
            RuntimeWarning,
            stacklevel=4,
        )
    return opened


@functools.cache
def warn_of_expansion(device: torch.device) -> None:
    """Say once per device that packed weights are expanded there."""
    warnings.warn(
        f"prunus has kernels for the CPU only. On {device} packed weights are expanded to dense "
        "ones, once, and both stay in memory: `prunus unpack` writes a checkpoint that takes less "
        "memory there, and a packed model is small and fast on the CPU",
        RuntimeWarning,
        stacklevel=4,
    )


def is_plain(x: Any) -> bool:
    """Whether a kernel may read this tensor's memory: a real tensor, no tracing, no gradient."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def fit_kernel(*tensors: Any) -> bool:
    """Whether a kernel for elements may compute with these tensors and in place of torch."""
    if _reference or not all(map(is_plain, tensors)):
        return False
    dtype = tensors[0].dtype
    return dtype in FLOATS and all(
        tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous() for tensor in tensors
    )


def run_packed(
    x: torch.Tensor, packed: Packed, prepared: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return `x · Wᵀ + bias` (..., O) in the dtype of `x`.

    Args:
        x: (..., I), on the device of the weight.
        packed: A weight that `forms.check` accepted.
        prepared: What `forms.check` returned.
        bias: (O,), or None.
    """
    compiled = loaded_kernels() if x.is_cpu else None
    if (
        compiled is None
        or _reference
        or x.dtype not in FLOATS
        or not 0 < x.numel() <= compiled.max_tokens(packed, x.dtype) * packed.shape[1]
        or (bias is not None and bias.dtype != x.dtype)
    ):
        product = functional.linear if _reference else linear
        return product(x, _expand_for_now(packed, x.dtype, prepared), bias)
    return compiled.linear(x if x.is_contiguous() else x.contiguous(), packed, prepared, bias)


def run_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x · weightᵀ + bias` for a dense weight (O, I).

    For a few bfloat16 tokens torch reaches about 60 % of the memory's bandwidth; this kernel
    reaches nearly all of it. All other inputs go to torch.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,), or None.
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
        or not compiled.has_bfloat16
    ):
        return functional.linear(x, weight, bias)
    dense = PackedWeight((weight.shape[0], in_features), weight.view(-1))
    return compiled.linear(x if x.is_contiguous() else x.contiguous(), dense, None, bias)


def _expand_for_now(
    packed: Packed, dtype: torch.dtype, prepared: torch.Tensor | None
) -> torch.Tensor:
    """Return the dense weight in memory that the next call on this thread reuses.

    Fresh memory for every linear of every forward pass would be mapped page by page, which costs
    more than the expansion. The memory that stays allocated has the size of the largest linear.
    """
    if packed[1].device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return expand(packed, dtype, prepared)
    size = math.prod(packed.shape)
    memory = getattr(_workspace, "memory", None)
    if memory is None or memory.numel() < size:
        memory = _workspace.memory = torch.empty(size, dtype=torch.int16)
    return expand(packed, dtype, prepared, out=memory[:size].view(dtype).view(packed.shape))


def look_up(
    ids: torch.Tensor, packed: Packed, prepared: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return rows of a packed embedding: (..., width) of `dtype`.

    Args:
        ids: Token ids (...).
        packed: A weight (vocabulary, width) that `forms.check` accepted.
        prepared: What `forms.check` returned.
        dtype: bfloat16, float16 or float32.

    Raises:
        IndexError: An id is out of range.
    """
    if ids.is_cpu:
        return expand_rows(packed, ids, prepared, dtype)
    return functional.embedding(ids, expand(packed, dtype, prepared))


def as_arguments(packed: Packed) -> tuple[list[int], str, list[torch.Tensor], list[int]]:
    """Return a weight in types that an operator takes.

    These are its shape, the names of its tensors, the tensors, and its layout: the rows per chunk,
    then of each code its raw bits, its layers, and -1. A bitmap has 0.

    >>> shape, names, tensors, numbers = as_arguments(PackedWeight((1, 2), torch.ones(2)))
    >>> shape, names, numbers
    ([1, 2], 'weight', [0])
    """
    parts = named_tensors("", packed)
    layout = layout_of(packed)
    numbers = [0]
    if layout is not None:
        codes, rows_per_chunk = layout
        numbers = [rows_per_chunk, *(n for raw, layers in codes for n in (raw, *layers, -1))]
    return list(packed.shape), " ".join(parts), list(parts.values()), numbers


def _from_arguments(
    shape: list[int], names: str, tensors: list[torch.Tensor], numbers: list[int]
) -> Packed:
    """Invert `as_arguments`."""
    layout = None
    if numbers[0]:
        codes, begin = [], 1
        for end in (index for index, number in enumerate(numbers) if number < 0):
            codes.append(PlaneCode(numbers[begin], tuple(numbers[begin + 1 : end])))
            begin = end + 1
        layout = tuple(codes), numbers[0]
    parts = dict(zip(names.split(), tensors, strict=True))
    return from_tensors((shape[0], shape[1]), parts, layout)


@torch.library.custom_op("prunus::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor,
    shape: list[int],
    names: str,
    tensors: list[torch.Tensor],
    numbers: list[int],
    prepared: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The operator form of `run_packed`; see `as_arguments`.

    Raises:
        ValueError: The inputs have another width.
    """
    if x.shape[-1] != shape[1]:
        raise ValueError(f"expected inputs of width {shape[1]}, got {tuple(x.shape)}")
    return run_packed(x, _from_arguments(shape, names, tensors, numbers), prepared, bias)


@torch.library.custom_op("prunus::packed_embedding", mutates_args=())
def packed_embedding(
    ids: torch.Tensor,
    shape: list[int],
    names: str,
    tensors: list[torch.Tensor],
    numbers: list[int],
    prepared: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The operator form of `look_up`; see `as_arguments`."""
    return look_up(ids, _from_arguments(shape, names, tensors, numbers), prepared, dtype)


@packed_linear.register_fake
def _(x: torch.Tensor, shape: list[int], *_weight: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@packed_embedding.register_fake
def _(ids: torch.Tensor, shape: list[int], *weight: Any) -> torch.Tensor:
    return ids.new_empty(*ids.shape, shape[1], dtype=weight[-1])
