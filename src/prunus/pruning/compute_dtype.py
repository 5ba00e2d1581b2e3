"""Which dtype the forward passes compute in when the user leaves it open.

Scores, norms and updates are float32 whatever is decided here; it is about the block's own arithmetic.
On a CPU bfloat16 is taken when three things hold: the weights are stored in it (so nothing is rounded on
the way in), the processor multiplies it natively (about 2.5 times float32's rate), and a trial through the
first block shows that its output moves by less than `HARMLESS`. Methods that invert a Gram matrix with a small
fixed damping always get float32 inputs on a CPU: their updates amplify what is small.
"""

from __future__ import annotations

import math

import torch

from prunus.hardware.numerics import native_bfloat16
from prunus.methods.statistics import Needs
from prunus.model.calls import hidden_of
from prunus.model.dtypes import DTYPES
from prunus.model.skeleton import Skeleton
from prunus.model.source import Source

__all__ = ["HARMLESS", "decide_dtype", "native_bfloat16"]

#: Largest relative change of the first block's output that counts as harmless.
HARMLESS = 0.02
_TRIAL_TOKENS = 256


def decide_dtype(
    requested: str,
    source: Source,
    device: torch.device,
    needs: Needs,
    trust_remote_code: bool = False,
    adds_ridge: bool = False,
) -> tuple[torch.dtype, str]:
    """The dtype of the computation and the reason in words.

    Args:
        requested: auto, float32, bfloat16 or float16.
        source: the model's weights; blocks are read only where a trial is needed.
        device: where the blocks will run.
        needs: the statistics that the method asks for.
        trust_remote_code: passed on to transformers.
        ridged: see `Method`.
    """
    if requested != "auto":
        return DTYPES[requested], "asked for"
    stored = source.stored_dtype
    if device.type == "cuda":
        if stored in (torch.bfloat16, torch.float16):
            return stored, "the checkpoint's own, native on this device"
        return torch.float32, "the checkpoint's own"
    if stored is not torch.bfloat16:
        return torch.float32, f"the checkpoint is stored in {str(stored).removeprefix('torch.')}"
    if needs == "gram" and not adds_ridge:
        return torch.float32, "the method inverts Gram matrices of little damping"
    if not native_bfloat16():
        return torch.float32, "this processor has no native bfloat16"
    change = _trial(source, trust_remote_code)
    if change < HARMLESS:
        return torch.bfloat16, f"native, and changes the first block's output by {change:.2%} only"
    return torch.float32, f"bfloat16 would change the first block's output by {change:.2%}"


@torch.no_grad()
def _trial(source: Source, trust_remote_code: bool) -> float:
    """‖bfloat16 − float32‖ / ‖float32‖ of what the first block adds to the hidden states, on spread-out token ids."""
    outputs = []
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        skeleton = Skeleton(source.config, dtype, trust_remote_code)
        source.bind(skeleton)
        with skeleton.outside_blocks(source.outer, cpu):
            hidden, calls = skeleton.record(skeleton.trial_batch(_TRIAL_TOKENS))
        block = skeleton.fill(0, source.block(0), cpu)
        output = hidden_of(block(hidden, *calls[0].args, **calls[0].kwargs))
        outputs.append((output - hidden).float())
        skeleton.release(0)
    exact, rounded = outputs
    change = float(
        (rounded - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
    )
    return change if math.isfinite(change) else float("inf")
