"""Block matching as the last step of pruning a block: its surviving weights and biases learn the dense outputs.

Masks stay as they are. `matching.py` trains; this file says what is trained, on which batches, and what is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.pruning.reconstruction.cached_suffix import after_attention
from prunus.pruning.reconstruction.kl_loss import LOGIT_STRIDE, OutputLoss
from prunus.pruning.reconstruction.train import TrainOptions, train_block
from prunus.pruning.records import ReconstructionRecord

__all__ = [
    "VALIDATION_STRIDE",
    "ReconstructionSchedule",
    "ReconstructionSettings",
    "default_schedule",
    "reconstruct",
    "trained",
]

#: One batch in so many is not trained on, and says which pass was the best.
VALIDATION_STRIDE = 16

# Many small steps win more than few large ones of the same tokens: a step looks at so many of its batch's tokens where it
# can choose, and at more where passes would not see them all.
_TOKENS_A_STEP = 256
_MOST_PASSES, _LEAST_PASSES = 7, 3
# Of the size of the weights, and the hidden size at which that was measured.
_RATE, _RATE_WIDTH = 7e-3, 576
# By logits a token takes ten times as long, so that a step looks at one of `LOGIT_STRIDE` of these: gradients are noisier. So
# many steps are enough, and no more passes than show half of the tokens: of 32 windows of 1024 tokens those are 240, and
# with half as many of either, perplexity was a per cent higher.
_STEPS_BY_LOGITS, _RATE_BY_LOGITS = 240, 2e-3


@dataclass(frozen=True)
class ReconstructionSchedule:
    """Passes over the calibration windows, of which a step runs what is trained on one token in so many, and Adam's peak
    rate, in units of the size of the weights; see `TrainOptions.relative`. Of the tokens that were run one in so many is
    given to the head, where it judges."""

    passes: int
    token_stride: int
    learning_rate: float
    logit_stride: int = 1


def default_schedule(
    tokens: int, hidden: int, by_token: bool, batches: int, by_logits: bool = False
) -> ReconstructionSchedule:
    """What is done where nothing else is asked for. A pass costs `1 / token_stride` of one over all tokens.

    The rate falls with the root of the width: 7 thousandths of the size of the weights are best in SmolLM2-135M, whose
    hidden size is 576, about 3 in Qwen2.5-Coder-1.5B, whose is 1536; both are flat within a factor of 1.5.

    Args:
        tokens: of a batch.
        hidden: size of the block's hidden states.
        by_token: what is trained can be run on some tokens of a batch.
        batches: how many there are.
        by_logits: the block is judged by what the head makes of its outputs.
    """
    fewer = LOGIT_STRIDE if by_logits else 1
    stride = min(fewer * _MOST_PASSES, max(1, fewer * tokens // _TOKENS_A_STEP)) if by_token else 1
    narrower = min(1.0, (_RATE_WIDTH / hidden) ** 0.5)
    if not by_logits:
        passes = min(_MOST_PASSES, max(_LEAST_PASSES, 2 * stride))
        return ReconstructionSchedule(passes, stride, _RATE * narrower)
    enough = round(_STEPS_BY_LOGITS / max(1, batches - held_out(batches)))
    passes = max(1, min(max(_LEAST_PASSES, stride // 2), enough))
    return ReconstructionSchedule(
        passes, stride, _RATE_BY_LOGITS * narrower, 1 if by_token else LOGIT_STRIDE
    )


def held_out(batches: int) -> int:
    """How many of `batches`, the last ones, are not trained on."""
    return max(1, batches // VALIDATION_STRIDE)


def trained(linears: Sequence[str], updated: bool) -> list[str]:
    """Which of a block's pruned linears are trained, by relative name in the order in which they run.

    Those behind the attention, for half the time and nearly all of the gain; all where the method has not `updated` any
    weights, since nothing has made up then for what attention lost.
    """
    return after_attention(linears) if updated else list(linears)


@dataclass(frozen=True)
class ReconstructionSettings:
    """How blocks are matched: passes over the calibration windows and Adam's peak rate, the same for all tensors, or
    None for those of `default_schedule`; dtype of the products; whether it is the last block alone."""

    passes: int | None
    learning_rate: float | None
    dtype: torch.dtype
    last_alone: bool = False

    def takes(self, index: int, blocks: int) -> bool:
        """Whether block `index` of so many `blocks` is matched."""
        return not self.last_alone or index == blocks - 1


def reconstruct(
    job: ReconstructionSettings,
    name: str,
    block: nn.Module,
    stored: Mapping[str, torch.Tensor],
    pruned: Mapping[str, torch.Tensor],
    forward: Callable[[int, slice], torch.Tensor],
    target: Callable[[int], torch.Tensor],
    count: int,
    schedule: ReconstructionSchedule,
    compare: OutputLoss | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[dict[str, torch.Tensor], ReconstructionRecord]:
    """Train a pruned block towards the dense block's outputs; `block` ends with the weights it began with.

    Args:
        job: how.
        name: of the block, for messages.
        block: with the pruned weights in place.
        stored: the block's tensors by relative name, as stored; biases are taken from here.
        pruned: the pruned weights that are trained, by relative name, as stored, the biases of their linears with them.
            What is 0 in them stays 0.
        forward: batch and some of its tokens -> output of `block` in the pruned model, of these tokens; others than all
            are asked for only where `schedule` says so.
        target: batch -> output of the dense block in the dense model.
        count: number of batches, on all ranks, at least 2.
        schedule: where `job` leaves it open.
        compare: by what outputs are judged where it is not the squared error per token; see `kl_divergence`.
        ranks: who shares the windows of every batch; see `train_block`.

    Returns:
        All that was trained, by relative name, in dtype and orientation of `stored`; the record.

    Raises:
        ValueError: outputs that are not finite; names the block.
    """
    started = time.perf_counter()
    device = next(block.parameters()).device
    supports = {key: (weight != 0).to(device) for key, weight in pruned.items()}
    for key, parameter in block.named_parameters():
        # Not norms: what they scale, the weights next to them can.
        if (
            key.endswith(".bias")
            and f"{key.removesuffix('.bias')}.weight" in pruned
            and key in stored
        ):
            supports[key] = torch.ones(parameter.shape, dtype=torch.bool, device=device)
    learnt_from = count - held_out(count)
    options = TrainOptions(
        learning_rate=job.learning_rate or schedule.learning_rate,
        relative=job.learning_rate is None,
        passes=job.passes or schedule.passes,
        token_stride=schedule.token_stride,
        dtype=job.dtype,
        per_token=True,
    )

    try:
        match = train_block(
            block,
            forward,
            target,
            range(learnt_from),
            range(learnt_from, count),
            supports,
            options,
            compare,
            ranks,
        )
    except ValueError as fault:
        raise ValueError(f"{name}: {fault}") from fault
    learnt = {
        key: weight.to(stored[key].dtype).to(stored[key].device)
        for key, weight in match.weights.items()
    }
    record = ReconstructionRecord(
        error_before=match.error_before,
        error_after=match.error_after,
        measure="outputs" if compare is None else "logits",
        steps=match.steps,
        stopped=match.stopped,
        dtype=str(job.dtype).removeprefix("torch."),
        seconds=round(time.perf_counter() - started, 3),
    )
    return learnt, record
