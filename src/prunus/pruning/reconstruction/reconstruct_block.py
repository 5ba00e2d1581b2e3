"""Matches pruned blocks to the dense model's while both models' hidden states stand before and behind them.

`retouch.py` says how; this file knows where inputs and targets are, whose they are, and what of a block is trained.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.model.kinds import CAUSAL
from prunus.model.skeleton import Skeleton
from prunus.model.stream import Stream
from prunus.pruning.reconstruction.batches import ReconstructionBatches
from prunus.pruning.reconstruction.cached_suffix import CachedSuffix, find_suffix, suffix_module
from prunus.pruning.reconstruction.kl_loss import OutputLoss, kl_divergence
from prunus.pruning.reconstruction.schedule import (
    ReconstructionSchedule,
    ReconstructionSettings,
    default_schedule,
    reconstruct,
)
from prunus.pruning.records import ReconstructionRecord

__all__ = ["BlockReconstructor", "in_front_of_head"]


@dataclass(frozen=True)
class BlockReconstructor:
    """What is needed to match any block.

    Attributes:
        job: how.
        stream: the pruned model's hidden states, before the block.
        dense: the dense model's, behind it, of some batches.
        along: numbers of these in `stream`.
        counts: how many they are of every rank.
        ranks: of the run.
        split: who takes the windows of a step apart; see `step_batches`.
    """

    job: ReconstructionSettings
    stream: Stream
    dense: Stream
    along: Sequence[int]
    counts: Sequence[int]
    ranks: Ranks
    split: Ranks

    def match(
        self,
        index: int,
        block: nn.Module,
        stored: Mapping[str, torch.Tensor],
        pruned: Mapping[str, torch.Tensor],
        names: Sequence[str],
        tail: CachedSuffix | None,
        looked: bool,
    ) -> tuple[dict[str, torch.Tensor], ReconstructionRecord]:
        """Train linears of a pruned block; it ends with the weights it began with.

        Args:
            index: position of the block.
            block: with the pruned weights in place.
            stored: its trained tensors by relative name.
            pruned: the pruned weights by relative name.
            names: of the linears that are trained.
            tail: the part of the block that holds them, where what reaches it was kept.
            looked: the block was tried for such a part, whatever came of it.

        Returns:
            What was trained, by relative name; the record.
        """
        self.ranks.set_location(f"{self.stream.skeleton.block_name(index)}, matching")
        inputs, wanted = (
            ReconstructionBatches(
                stream.states, chosen, self.counts, self.ranks, self.split, self.stream.device
            )
            for stream, chosen in ((self.stream, self.along), (self.dense, range(len(self.along))))
        )
        run = self.stream.call(index, block)

        def forward(batch: int) -> torch.Tensor:
            return run(x) if len(x := inputs.get(batch)) else x

        numbers = self.along  # a tail that was kept knows all batches
        if not looked:
            tail, numbers = self._suffix(block, names, run, inputs, forward), range(len(inputs))

        def outputs(batch: int, tokens: slice) -> torch.Tensor:
            return forward(batch) if tail is None else tail(numbers[batch], tokens)

        by_token = tail is not None and tail.by_token
        by_logits = in_front_of_head(self.stream.skeleton, index)
        schedule = _default_schedule(inputs, by_token, by_logits)
        with (
            self._compare(schedule.logit_stride)
            if by_logits
            else contextlib.nullcontext() as compare
        ):
            return reconstruct(
                self.job,
                self.stream.skeleton.block_name(index),
                block,
                stored,
                {f"{linear}.weight": pruned[f"{linear}.weight"] for linear in names},
                outputs,
                wanted.get,
                len(inputs),
                schedule,
                compare,
                self.split,
            )

    def _suffix(
        self,
        block: nn.Module,
        names: Sequence[str],
        run: Callable[[torch.Tensor], torch.Tensor],
        inputs: ReconstructionBatches,
        forward: Callable[[int], torch.Tensor],
    ) -> CachedSuffix | None:
        """The part that holds `names`, of which nothing is kept. All ranks take it or none; some may have no windows."""
        module = suffix_module(block, names)
        if module is None:
            return None
        x = inputs.get(0)
        found = find_suffix(block, names, lambda _batch: run(x), 0, keep=False) if len(x) else None
        mine = [len(x) > 0, found is not None, found is not None and found.by_token]
        votes = [vote for vote in self.ranks.gather_ints(mine) if vote[0]]
        if not all(vote[1] for vote in votes):
            return None
        return CachedSuffix(module, forward, keep=False, by_token=all(vote[2] for vote in votes))

    @contextlib.contextmanager
    def _compare(self, logit_stride: int) -> Iterator[OutputLoss]:
        """The divergence, with the head in place."""
        skeleton, device = self.stream.skeleton, self.stream.device

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            ids = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
            return skeleton.logits(ids, hidden.to(skeleton.dtype))

        with skeleton.outside_blocks(
            self.stream.source.outer, device, with_head=True, with_embedding=False
        ):
            yield kl_divergence(
                logits, self.ranks if self.split is SINGLE_PROCESS else SINGLE_PROCESS, logit_stride
            )


def in_front_of_head(skeleton: Skeleton, index: int) -> bool:
    """Whether nothing but what makes logits follows on block `index`, so that it is matched by these."""
    return index == len(skeleton) - 1 and skeleton.kind is CAUSAL


def _default_schedule(
    inputs: ReconstructionBatches, by_token: bool, by_logits: bool
) -> ReconstructionSchedule:
    """For batches of hidden states (windows, tokens, hidden), or of images as grids (images, channels, height, width)."""
    shape = inputs.shape(0)
    hidden = shape[-1] if len(shape) == 3 else shape[1]
    return default_schedule(math.prod(shape) // hidden, hidden, by_token, len(inputs), by_logits)
