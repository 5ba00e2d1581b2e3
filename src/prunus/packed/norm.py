"""RMS norms of a few tokens in one kernel call instead of half a dozen small torch operations.

A norm keeps its class, its weight and its name; only the function that runs for a few plain CPU
vectors changes. Families differ in whether the weight counts from 0 or from 1 and in where they
round. A name does not tell the form of a norm, so a trial on random vectors decides.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import nn

from prunus.packed.kernels import library as kernels
from prunus.packed.operators import fit_kernel, loaded_kernels

_FORMS = range(3)  # as `prunus_rms_norm` numbers them
_EPS = ("variance_epsilon", "eps")
#: Inputs of more numbers than this are left to torch, which uses several threads.
_MAX_NUMBERS = 1 << 14


def use_decode_norms(model: nn.Module) -> int:
    """Let the RMS norms of a model use the kernel, in place.

    Modules that compute anything else stay as they are.

    Returns:
        The number of norms that did not use the kernel before; 0 where there are no kernels.
    """
    compiled, count = kernels.load(), 0
    if compiled is None:
        return 0
    for module in model.modules():
        eps = _name_of_eps(module)
        if eps is not None and (form := _form(module, eps, compiled)) is not None:
            # A partial is copied with its module, so that a copy of the model is bound to itself.
            module.forward = functools.partial(_forward, module, eps, form)
            count += 1
    return count


def _forward(module: nn.Module, eps: str, form: int, *inputs: Any, **named: Any) -> Any:
    """Compute the norm (..., width) with the kernel, or by the class for unusual inputs."""
    x: Any = inputs[0] if len(inputs) == 1 and not named else None
    weight: Any = module._parameters.get("weight")
    if (
        not fit_kernel(x, weight)
        or not 0 < x.numel() <= _MAX_NUMBERS
        or x.shape[-1] != weight.shape[0]
        or (compiled := loaded_kernels()) is None
    ):
        return type(module).forward(module, *inputs, **named)
    return compiled.rms_norm(x, weight, getattr(module, eps), form)


def _name_of_eps(module: nn.Module) -> str | None:
    """Return the name of the epsilon attribute of a module that could be a norm, else None."""
    own, names = vars(module), list(module._parameters)
    if "forward" in own or module._buffers or module._modules or names != ["weight"]:
        return None
    weight = module._parameters["weight"]
    found = [name for name in _EPS if isinstance(own.get(name), float)]
    if weight is None or weight.dim() != 1 or weight.numel() == 0 or len(found) != 1:
        return None
    return found[0] if len(inspect.signature(module.forward).parameters) == 1 else None


@torch.no_grad()
def _form(module: nn.Module, eps: str, compiled: kernels.Kernels) -> int | None:
    """Return the form of the kernel that gives what the module gives; None if no form does.

    The trial uses random vectors and weights. Half of the vectors are so small that the epsilon
    counts.
    """
    probe: Any = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    width = probe.weight.shape[0]
    x = torch.randn(4 + 2048 // width, width, generator=generator)
    x[::2] *= max(getattr(module, eps), 1e-12) ** 0.5  # small enough for the epsilon to count
    weight = torch.randn(width, generator=generator)
    left = list(_FORMS)
    for dtype in (torch.float32, torch.bfloat16):
        probe.weight = nn.Parameter(weight.to(dtype))
        try:
            expected = probe.forward(x.to(dtype))
        except Exception:  # it takes other inputs, so it is no such norm
            return None
        inputs = (x.to(dtype), probe.weight, getattr(module, eps))
        left = [form for form in left if _agree(compiled.rms_norm(*inputs, form), expected)]
    return left[0] if left else None


def _agree(found: torch.Tensor, expected: Any) -> bool:
    """Whether two results are equal up to the rounding that forms may differ in.

    In float32 they must agree to the last digits. In bfloat16 forms differ by single roundings, so
    nearly all numbers must agree exactly.
    """
    if not isinstance(expected, torch.Tensor):
        return False
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    if found.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=1e-5, atol=0)
    return bool((found == expected).float().mean() > 0.99)
