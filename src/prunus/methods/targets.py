"""Targets from the dense model: weights that give, on the pruned model's inputs, what the dense ones gave on theirs.

Once earlier linears are pruned, a linear gets inputs X̂ in place of the dense model's X. Pruning W₀ for X̂ alone keeps the
outputs that are wrong already; aiming at X W₀ᵀ repairs them as far as X̂ allows, and learns noise where tokens are few. In
between,

    minimise over W   ‖X̂Wᵀ − (αX + (1 − α)X̂)W₀ᵀ‖² + λ‖(W − W₀)D‖²

with the ridge λ and the scales D of `lsq.py`. For dense W the solution is W* = W₀ + α·W₀(X − X̂)ᵀX̂ · (X̂ᵀX̂ + λD²)⁻¹, and
the error of any other W exceeds it by tr (W − W*)(X̂ᵀX̂ + λD²)(W − W*)ᵀ: what every method that works on a Gram matrix
minimises, once it is handed W* in place of W₀.

Shape suffixes: O outputs (rows), I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.methods.lsq import scaled_gram
from prunus.statistics import InputStatistics

__all__ = ["MIX", "dense_target"]

#: α where the user gives none; see docs/pruning-better.md for how it was found.
MIX = 0.25


def dense_target(
    weight_OI: Tensor, statistics: InputStatistics, mix: float | None, damping: float | None
) -> Tensor:
    """W*, float32 (O, I); the weight itself where nothing has drifted or the dense inputs are not known.

    Args:
        weight_OI: float32, the trained weights.
        statistics: with Gram and drift.
        mix: α, or None for `MIX`.
        damping: λ, or None for `lsq.ridge`.
    """
    if not statistics.has_drift:
        return weight_OI
    scaled = scaled_gram(statistics, damping)

    def compute() -> Tensor:
        drift_II = statistics.drift_II
        assert drift_II is not None
        # D⁻¹(X − X̂)ᵀX̂D⁻¹ · (A + λI)⁻¹, by way of its transpose; A + λI is symmetric.
        lower_II, failed = torch.linalg.cholesky_ex(scaled.gram_II)
        if int(failed) or not bool(drift_II.isfinite().all()):
            raise ValueError("the inputs of the dense model cannot be matched: are they finite?")
        scaled_II = (drift_II / scaled.scale_I[:, None]).div_(scaled.scale_I)
        return torch.cholesky_solve(scaled_II.T, lower_II).T.contiguous()

    shift_II = statistics.derived(("dense_target", scaled.damping), compute)
    change_OI = (weight_OI * scaled.scale_I) @ shift_II
    return weight_OI + change_OI.div_(scaled.scale_I).mul_(MIX if mix is None else mix)
