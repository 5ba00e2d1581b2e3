"""2:4 on a GPU: linears on torch's semi-structured tensors, where these are faster than dense.

The gain depends on the device, the shape and the number of tokens. So every linear is checked and
measured, and keeps the faster of its two forms. Nothing is written to disk.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

# torch's kernels take 16-bit weights whose rows and columns are multiples of these numbers.
_ROWS, _COLUMNS = 32, 64
_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class SemiStructuredChoice:
    """Whether one linear of the model now runs on 2:4, and why or why not.

    `speedup` is the time of the dense product over that of the 2:4 product, where it is measured.
    """

    name: str
    converted: bool
    reason: str
    speedup: float | None = None


@torch.no_grad()
def to_semi_structured(model: nn.Module, tokens: int = 1) -> list[SemiStructuredChoice]:
    """Run the 2:4 linears of a loaded model on sparse tensor cores, in place, where that is faster.

    Args:
        model: on a CUDA device, float16 or bfloat16.
        tokens: number of tokens of the measured product. The best choice for decoding (1 token) is
            not the best for prompts.

    Returns:
        One choice per linear, in the order of the model.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "2:4 runs on sparse tensor cores, and this machine has no CUDA device. On a CPU, "
            "`prunus pack` makes a pruned model smaller and faster"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError(
            f"{torch.cuda.get_device_name()} has no sparse tensor cores: 2:4 needs compute "
            "capability 8.0 or more"
        )
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if any(module.weight.device.type != "cuda" for module in linears.values()):
        raise ValueError("the model is not on the CUDA device: call model.to('cuda') first")
    return [_choose(name, linear, tokens) for name, linear in linears.items()]


def _choose(name: str, linear: nn.Linear, tokens: int) -> SemiStructuredChoice:
    from torch.sparse import to_sparse_semi_structured

    why_not = unsuitable(linear.weight)
    if why_not is not None:
        return SemiStructuredChoice(name, False, why_not)
    dense = linear.weight
    x = torch.randn(tokens, linear.in_features, dtype=dense.dtype, device=dense.device)
    before = _seconds(lambda: nn.functional.linear(x, dense, linear.bias))
    try:
        sparse = to_sparse_semi_structured(dense.detach())
        after = _seconds(lambda: nn.functional.linear(x, sparse, linear.bias))
    except (RuntimeError, NotImplementedError) as fault:
        # torch's kernels know some devices and some shapes only.
        reason = f"torch's 2:4 kernel refuses this device or shape: {str(fault).splitlines()[0]}"
        return SemiStructuredChoice(name, False, reason)
    if after >= before:
        return SemiStructuredChoice(name, False, "dense is as fast here", before / after)
    linear.weight = nn.Parameter(sparse, requires_grad=False)
    return SemiStructuredChoice(name, True, "faster than dense here", before / after)


def unsuitable(weight_OI: torch.Tensor) -> str | None:
    """Return why a weight cannot run as 2:4, or None; every group of four is checked."""
    rows, columns = weight_OI.shape
    if weight_OI.dtype not in (torch.float16, torch.bfloat16):
        name = str(weight_OI.dtype).removeprefix("torch.")
        return f"{name} weights: 2:4 is for float16 and bfloat16"
    if rows % _ROWS or columns % _COLUMNS:
        return f"{rows} x {columns} is no multiple of {_ROWS} x {_COLUMNS}"
    if bool((weight_OI.reshape(-1, 4).count_nonzero(dim=1) > 2).any()):
        return "not 2:4: a group of four keeps more than two weights"
    return None


def _seconds(run: Callable[[], object]) -> float:
    """Return the median seconds of one call on the device."""
    for _ in range(3):
        run()
    times = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
