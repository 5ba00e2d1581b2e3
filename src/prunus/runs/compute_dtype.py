"""Which dtype the forward passes compute in if the user leaves it open.

The choice concerns the blocks' own arithmetic only: scores, norms and updates are always float32.
On a CPU the choice is bfloat16 if three conditions hold:

- The weights are stored in bfloat16, so reading them rounds nothing.
- The processor multiplies bfloat16 natively, which is about 2.5 times as fast as float32.
- In a trial, bfloat16 changes the output of the first block by less than `MAX_CHANGE`.

Methods that invert a Gram matrix with a small fixed damping always get float32 inputs on a CPU,
because their weight updates amplify small errors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from prunus.hardware.numerics import native_bfloat16
from prunus.methods.statistics import Needs
from prunus.model.calls import hidden_of
from prunus.model.device import DTYPES
from prunus.model.skeleton import Skeleton
from prunus.model.source import Source

#: Largest relative change of the first block's output at which bfloat16 counts as harmless.
MAX_CHANGE = 0.02
_TRIAL_TOKENS = 256


class ComputeDtype(NamedTuple):
    """The dtype of the forward passes, and the reason for it in words."""

    dtype: torch.dtype
    reason: str


def decide_dtype(
    requested: str,
    source: Source,
    skeleton: Skeleton,
    device: torch.device,
    needs: Needs,
    trust_remote_code: bool = False,
    adds_ridge: bool = False,
) -> ComputeDtype:
    """Choose the dtype of the forward passes.

    Args:
        requested: auto, float32, bfloat16 or float16.
        skeleton: The model in the dtype that is stored, which the source is bound to.
        adds_ridge: Whether the method adds a ridge to a Gram matrix; see `prunus.methods.Method`.
    """
    if requested != "auto":
        return ComputeDtype(DTYPES[requested], "requested")
    stored = source.stored_dtype
    if device.type == "cuda":
        if stored in (torch.bfloat16, torch.float16):
            return ComputeDtype(stored, "the checkpoint's own, native on this device")
        return ComputeDtype(torch.float32, "the checkpoint's own")
    if stored is not torch.bfloat16:
        name = str(stored).removeprefix("torch.")
        return ComputeDtype(torch.float32, f"the checkpoint is stored in {name}")
    if needs == "gram" and not adds_ridge:
        return ComputeDtype(torch.float32, "the method inverts Gram matrices of little damping")
    if not native_bfloat16():
        return ComputeDtype(torch.float32, "this processor has no native bfloat16")
    change = _trial(source, skeleton, trust_remote_code)
    if change < MAX_CHANGE:
        return ComputeDtype(
            torch.bfloat16, f"native, and changes the first block's output by {change:.2%} only"
        )
    return ComputeDtype(
        torch.float32, f"bfloat16 would change the first block's output by {change:.2%}"
    )


@torch.no_grad()
def _trial(source: Source, stored: Skeleton, trust_remote_code: bool) -> float:
    """How much bfloat16 changes what the first block adds to the hidden states.

    Returns:
        ‖bfloat16 − float32‖ / ‖float32‖ on token ids spread over the vocabulary; infinity if either
        output is not finite.
    """
    outputs = []
    cpu = torch.device("cpu")
    for skeleton in (Skeleton(source.config, torch.float32, trust_remote_code), stored):
        with skeleton.outside_blocks(source.read_outside, cpu):
            hidden, calls = skeleton.record(skeleton.trial_batch(_TRIAL_TOKENS))
        block = skeleton.fill(0, source.block(0), cpu)
        output = hidden_of(block(hidden, *calls[0].args, **calls[0].kwargs))
        # The residual is left out: it is large and would hide the change.
        outputs.append((output - hidden).float())
        skeleton.release(0)
    exact, rounded = outputs
    change = float(
        (rounded - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
    )
    return change if math.isfinite(change) else float("inf")
