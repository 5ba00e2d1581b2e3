"""Block matching as the last step of pruning a block: its surviving weights, norms and biases learn the dense outputs.

Masks stay as they are. `correction.py` solves for the linear that writes the block's output, `matching.py` trains them
all from there; this file says what is trained, on which batches, and what is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunus.engine.correction import adds_to_output, corrected
from prunus.engine.matching import MatchOptions, held_out_error, match_block
from prunus.manifest import MatchRecord
from prunus.model.linears import Linear

__all__ = ["LEARNING_RATE", "PASSES", "RetouchJob", "retouch"]

# One batch in so many is not trained on, and says which pass was the best.
_ONE_HELD_OUT_IN = 8

#: What is taken where nothing else is asked for.
PASSES, LEARNING_RATE = 2, 7e-4


@dataclass(frozen=True)
class RetouchJob:
    """How blocks are matched: passes over the calibration windows, Adam's peak rate, dtype of the products."""

    passes: int
    learning_rate: float
    dtype: torch.dtype


def retouch(
    job: RetouchJob,
    name: str,
    block: nn.Module,
    linears: Sequence[Linear],
    stored: Mapping[str, torch.Tensor],
    pruned: Mapping[str, torch.Tensor],
    forward: Callable[[int], torch.Tensor],
    target: Callable[[int], torch.Tensor],
    count: int,
) -> tuple[dict[str, torch.Tensor], MatchRecord]:
    """Bring a pruned block nearer to the dense block's outputs; what `block` itself ends with does not count.

    Args:
        job: how.
        name: of the block, for messages.
        block: with the pruned weights in place.
        linears: those that were pruned, in it.
        stored: the block's tensors by relative name, as stored; norms and biases are taken from here.
        pruned: the pruned weights by relative name, as stored. What is 0 in them stays 0.
        forward: batch -> output of `block` in the pruned model.
        target: batch -> output of the dense block in the dense model.
        count: number of batches, at least 2.

    Returns:
        All that was trained, by relative name, in dtype and orientation of `stored`; the record.

    Raises:
        ValueError: outputs that are not finite; names the block.
    """
    started = time.perf_counter()
    device = next(block.parameters()).device
    supports = {key: (weight != 0).to(device) for key, weight in pruned.items()}
    for key, parameter in block.named_parameters():
        if parameter.dim() == 1 and key in stored and stored[key].is_floating_point():
            supports[key] = torch.ones(parameter.shape, dtype=torch.bool, device=device)
    held_out = max(1, count // _ONE_HELD_OUT_IN)
    train, judges = range(count - held_out), range(count - held_out, count)
    options = MatchOptions(job.learning_rate, job.passes, None, job.dtype, per_token=True)
    begin = best = held_out_error(block, forward, target, judges, options)
    shares: dict[str, float] = {}
    for linear in linears:
        if adds_to_output(linear, lambda: forward(0)):
            keep, weight_OI = supports[f"{linear.name}.weight"], linear.weight_OI.clone()
            keep_OI = keep.T if linear.transposed else keep
            corrected_OI, share = corrected(linear, keep_OI, forward, target, train, judges)
            linear.assign(corrected_OI)
            error = held_out_error(block, forward, target, judges, options)
            if error < best:
                best, shares[linear.name] = error, round(share, 4)
            else:  # what rounding leaves of it is not worth having
                linear.assign(weight_OI)
                shares[linear.name] = 0.0
    try:
        match = match_block(block, forward, target, train, judges, supports, options)
    except ValueError as fault:
        raise ValueError(f"{name}: {fault}") from fault
    trained = {
        key: weight.to(stored[key].dtype).to(stored[key].device) for key, weight in match.weights.items()
    }
    record = MatchRecord(
        error_before=begin,
        error_after=match.error_after,
        corrected=shares,
        steps=match.steps,
        stopped=match.stopped,
        dtype=str(job.dtype).removeprefix("torch."),
        seconds=round(time.perf_counter() - started, 3),
    )
    return trained, record
