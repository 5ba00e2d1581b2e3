"""The rotary embedding of one new token in one kernel call instead of a dozen torch operations.

Every family applies it with a function of its modeling file, `apply_rotary_pos_emb`, which
attention modules look up when they run. This file replaces that function by one that leaves
everything but a plain CPU token to the original. Other models of the family in the same process use
it too. They get the same numbers to the bit: a function is replaced only if the kernel reproduces
it exactly.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prunus.packed.kernels import library as kernels
from prunus.packed.operators import FLOATS, fit_kernel, loaded_kernels

_NAME = "apply_rotary_pos_emb"
_MARK = "_prunus_rotary"


def use_decode_rotary(model: nn.Module) -> int:
    """Let the families in a model use the kernel for one token; others stay as they are.

    Returns:
        The number of families that did not use it before; 0 where there are no kernels.
    """
    compiled, count = kernels.load(), 0
    if compiled is None:
        return 0
    for name in {type(module).__module__ for module in model.modules()}:
        home = sys.modules.get(name)
        original: Any = getattr(home, _NAME, None)
        if not hasattr(original, _MARK) and _is_half_split(original, compiled):
            setattr(home, _NAME, _with_kernel(original))
            count += 1
    return count


def _with_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def rotate(*inputs: Any, **named: Any) -> Any:
        if len(inputs) != 4 or named or not _fit(*inputs) or (compiled := loaded_kernels()) is None:
            return original(*inputs, **named)
        return compiled.rotate(*inputs)

    setattr(rotate, _MARK, True)
    return rotate


def _fit(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether these are plain tensors of one token: (1, heads, 1, D) twice and (1, 1, D) twice."""
    if not fit_kernel(query, key, cos, sin) or query.dim() != 4 or key.dim() != 4:
        return False
    batch, heads, tokens, dim = query.shape
    if batch != 1 or tokens != 1 or heads == 0 or dim == 0 or dim % 2 or key.shape[1] == 0:
        return False
    return key.shape == (1, key.shape[1], 1, dim) and cos.shape == sin.shape == (1, 1, dim)


@torch.no_grad()
def _is_half_split(original: Any, compiled: kernels.Kernels) -> bool:
    """Whether a function equals the kernel to the bit, on random numbers of every dtype."""
    names = ["q", "k", "cos", "sin"]
    if not callable(original) or list(inspect.signature(original).parameters)[:4] != names:
        return False
    generator = torch.Generator().manual_seed(0)
    for dtype in FLOATS:
        for dim in (6, 64):
            shapes = ((1, 3, 1, dim), (1, 2, 1, dim), (1, 1, dim), (1, 1, dim))
            inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
            found = compiled.rotate(*inputs)
            try:
                expected = original(*inputs)
                same = len(expected) == 2 and all(map(torch.equal, found, expected))
            except Exception:  # it takes other inputs
                return False
            if not same or any(each.dtype != dtype for each in expected):
                return False
    return True
