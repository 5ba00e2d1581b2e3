"""Root mean square norms of a few tokens in one call instead of half a dozen small operations of torch.

A norm keeps its class, its weight and its name; only what runs for a few plain CPU vectors is another function. Which
modules are such norms is tried, not read off their names: families differ in whether the weight counts from one and
where they round.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import nn

from prunus.packed.kernels import library as kernels
from prunus.packed.operators import FLOATS, is_plain, loaded_kernels, on_reference_path

__all__ = ["use_decode_norms"]

_FORMS = range(3)  # as `prunus_rms_norm` numbers them
_EPS = ("variance_epsilon", "eps")
#: Longer inputs, in numbers, are left to torch, which has several threads.
_MOST = 1 << 14


def use_decode_norms(model: nn.Module) -> int:
    """Let a model's RMS norms use the kernel, in place; modules that compute anything else are left as they are.

    Returns:
        How many there were that did not use it yet; 0 where there are no kernels.
    """
    compiled, count = kernels.load(), 0
    if compiled is None:
        return 0
    for module in model.modules():
        eps = _name_of_eps(module)
        if eps is not None and (form := _form(module, eps, compiled)) is not None:
            # Bound through a partial: copied or pickled with its module, it is bound to the copy.
            module.forward = functools.partial(_forward, module, eps, form)
            count += 1
    return count


def _forward(module: nn.Module, eps: str, form: int, *inputs: Any, **named: Any) -> Any:
    """(..., width) -> (..., width), in place of the class's own `forward`, which gets everything unusual."""
    x: Any = inputs[0] if len(inputs) == 1 and not named else None
    weight = module._parameters.get("weight")
    if (
        x is None
        or not is_plain(x)
        or type(weight) is not nn.Parameter
        or (weight.requires_grad and torch.is_grad_enabled())
        or on_reference_path()
        or not x.is_cpu
        or not weight.is_cpu
        or x.dtype is not weight.dtype
        or x.dtype not in FLOATS
        or not 0 < x.numel() <= _MOST
        or x.shape[-1] != weight.shape[0]
        or not x.is_contiguous()
        or not weight.is_contiguous()
        or (compiled := loaded_kernels()) is None
    ):
        return type(module).forward(module, *inputs, **named)
    return compiled.rms_norm(x, weight, getattr(module, eps), form)


def _name_of_eps(module: nn.Module) -> str | None:
    """What a module that could be a norm calls its epsilon; None if it is built in another way."""
    own = vars(module)
    if (
        "forward" in own
        or module._buffers
        or module._modules
        or list(module._parameters) != ["weight"]
    ):
        return None
    weight, names = (
        module._parameters["weight"],
        [name for name in _EPS if isinstance(own.get(name), float)],
    )
    if weight is None or weight.dim() != 1 or weight.numel() == 0 or len(names) != 1:
        return None
    return names[0] if len(inspect.signature(module.forward).parameters) == 1 else None


@torch.no_grad()
def _form(module: nn.Module, eps: str, compiled: kernels.Kernels) -> int | None:
    """The form of the kernel that gives what the module gives, on random vectors and weights; None if none does."""
    probe: Any = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    width = probe.weight.shape[0]
    x = torch.randn(4 + 2048 // width, width, generator=generator)
    x[::2] *= max(getattr(module, eps), 1e-12) ** 0.5  # so small that the epsilon counts
    weight = torch.randn(width, generator=generator)
    left = list(_FORMS)
    for dtype in (torch.float32, torch.bfloat16):
        probe.weight = nn.Parameter(weight.to(dtype))
        try:
            expected = probe.forward(x.to(dtype))
        except Exception:  # whatever it wants for an input, it is not such a norm
            return None
        left = [
            form
            for form in left
            if _agree(
                compiled.rms_norm(x.to(dtype), probe.weight, getattr(module, eps), form), expected
            )
        ]
    return left[0] if left else None


def _agree(found: torch.Tensor, expected: Any) -> bool:
    """In float32 to the last digits; in bfloat16, where forms differ by roundings, in nearly all numbers exactly."""
    if (
        not isinstance(expected, torch.Tensor)
        or expected.dtype != found.dtype
        or expected.shape != found.shape
    ):
        return False
    if found.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=1e-5, atol=0)
    return bool((found == expected).float().mean() > 0.99)
