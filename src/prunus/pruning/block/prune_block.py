"""The block loop's body: hidden states before the first block, then one block after the other.

Knows weights, hidden states and walks; nothing of folders, manifests on disk, or where text comes from.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks, split_range
from prunus.hardware.numerics import count_zeros
from prunus.methods.statistics import Drift, InputStatistics, StatisticsSpec
from prunus.model.linears import Linear
from prunus.model.skeleton import Skeleton
from prunus.model.source import Source
from prunus.model.stream import Stream
from prunus.pruning.block.checks import check_same, checked_digest
from prunus.pruning.block.dense_stream import DenseStream, accumulate_both, held_out_batches
from prunus.pruning.block.expert_tokens import find_expert_counters, min_tokens
from prunus.pruning.block.hooks import Accumulate, accumulate_inputs
from prunus.pruning.block.linear import LinearSettings, prune_linear
from prunus.pruning.block.lockstep import lockstep
from prunus.pruning.block.permute import REFUSED, Fold, find_folds, fold, holds, inputs_permuted
from prunus.pruning.block.replay import replay
from prunus.pruning.block.two_pass import two_pass
from prunus.pruning.reconstruction.batches import step_ranks
from prunus.pruning.reconstruction.cached_suffix import CachedSuffix, find_suffix
from prunus.pruning.reconstruction.reconstruct_block import BlockReconstructor
from prunus.pruning.reconstruction.schedule import ReconstructionSettings, trained
from prunus.pruning.records import BlockRecord, LinearRecord, Walk

__all__ = ["BlockPruner"]

_WALKS: dict[Walk, Callable[..., list[Linear]]] = {
    "lockstep": lockstep,
    "replay": replay,
    "two_pass": two_pass,
}


@dataclass
class BlockPruner:
    """Takes all calibration windows through a model, one block at a time.

    Attributes:
        skeleton: the model without weights.
        source: its weights.
        linear_settings: what is done to each linear.
        device: where blocks and, between blocks, hidden states live.
        permute: look for a better order of each linear's inputs, where whoever writes them can follow; see `folding`.
        sparsities: by full name of a linear, where it is not the `linear_settings`'s.
        min_expert_tokens: an expert that fewer tokens choose is measured on all; see `expert_counter`.
        reconstruction: how each block is matched to the dense block once it is pruned, or None.
        ranks: who has windows of the same run.
        drift_stride: one batch in so many goes through the dense model too.
        aims: whether a linear with so many inputs is told what the dense model gives it.
    """

    skeleton: Skeleton
    source: Source
    linear_settings: LinearSettings
    device: torch.device
    reconstruction: ReconstructionSettings | None = None
    permute: bool = False
    sparsities: Mapping[str, float] = field(default_factory=dict)
    ranks: Ranks = SINGLE_PROCESS
    min_expert_tokens: int | None = None
    drift_stride: int = 1
    uses_dense_target: Callable[[int], bool] = lambda in_features: False
    stream: Stream = field(init=False)
    dense: DenseStream | None = field(init=False, default=None)
    #: Batches of every rank, this one's among them.
    _counts: list[int] = field(init=False, default_factory=list)
    #: Who takes the windows of a training step apart; see `step_batches`.
    _split: Ranks = field(init=False, default=SINGLE_PROCESS)

    def __post_init__(self) -> None:
        self.stream = Stream(self.skeleton, self.source, self.device)
        if self.linear_settings.method.needs_drift or self.reconstruction is not None:
            self.dense = DenseStream(self.skeleton, self.source, self.device, self.drift_stride)

    def embed(
        self, batches: Sequence[torch.Tensor], spill_to: Path | None, on_device: bool = True
    ) -> None:
        """Run what comes before the blocks on this rank's share of all `batches`; see `Stream.embed`."""
        self._counts = [len(part) for part in split_range(len(batches), self.ranks.size)]
        others: list[torch.Tensor] = []
        if self.reconstruction is not None:
            self._split = step_ranks(self.ranks, max(map(len, batches)), self.device)
            others = [ids[: len(self._split.own_range(len(ids)))] for ids in batches]
        batches = self.mine(batches)
        self.stream.embed(batches, spill_to, on_device, others)
        if self.dense is not None:
            self.dense.embed(batches, spill_to, on_device, self._before)

    def mine(self, batches: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Of all batches those of this rank."""
        share = self.ranks.own_range(len(batches))
        return batches[share.start : share.stop]

    @property
    def _before(self) -> int:
        """Batches of the ranks before this one: the number of its first among all."""
        return sum(self._counts[: self.ranks.rank])

    def propagate(self, index: int, stored: Mapping[str, torch.Tensor]) -> None:
        """Run a finished block (tensors by relative name) over all batches, as when it was pruned."""
        self.stream.propagate(index, stored)
        if self.dense is not None:
            self.dense.propagate(index)

    def prune(
        self, index: int, stored: Mapping[str, torch.Tensor], selected: Sequence[str], walk: Walk
    ) -> tuple[dict[str, torch.Tensor], BlockRecord]:
        """Prune one block and take all batches through it.

        Args:
            index: position of the block.
            stored: its tensors by relative name, in the checkpoint's dtypes.
            selected: relative names of the linears to prune.
            walk: how the batches go through; see `lockstep`.

        Returns:
            The pruned tensors by relative name, in dtype and orientation of `stored`; the record (its seconds are the
            caller's to fill in).

        Raises:
            ValueError: weights or activations that are not finite; names the tensor.
        """
        name = self.skeleton.block_name(index)
        digest = checked_digest(name, stored)
        self.ranks.set_location(name)
        block = self.skeleton.fill(index, stored, self.device)
        linears = [linear for linear in self.skeleton.linears(index) if linear.name in selected]
        changed: dict[str, torch.Tensor] = {}
        records: dict[str, LinearRecord] = {}
        orders: dict[str, torch.Tensor] = {}
        folds = self._folds(index, block, selected) if self.permute else {}
        minimum = min_tokens(self.linear_settings.method.needs, self.min_expert_tokens)
        expert_counters = find_expert_counters(block, (linear.name for linear in linears), minimum)

        def prune_one(linear: Linear, statistics: InputStatistics) -> None:
            key, full_name = f"{linear.name}.weight", f"{name}.{linear.name}"
            wanted = self.sparsities.get(full_name, self.linear_settings.sparsity)
            job = replace(self.linear_settings, sparsity=wanted)
            self.ranks.set_location(full_name)
            channels = folds[linear.name].channels if linear.name in folds else None
            changed[key], record, order_I = prune_linear(
                job, linear, full_name, stored[key], statistics, channels, self.ranks
            )
            records[linear.name] = record
            for expert_counter in expert_counters:
                if expert_counter.owns(linear.name):
                    record.notes |= expert_counter.notes(linear.name)
            if order_I is not None:
                orders[linear.name] = order_I
                put_in_order(linear, order_I)
            if self.permute:
                record.notes["permuted"] = (
                    "with " + ", ".join(p.name for p in folds[linear.name].producers)
                    if order_I is not None
                    else REFUSED
                )

        unreached, match, tail = linears, None, None
        job = self.reconstruction
        reconstruction = job if job is not None and job.takes(index, len(self.skeleton)) else None
        # Of several ranks each would keep what all have.
        keeps = reconstruction is not None and walk == "lockstep" and self.ranks.size == 1
        names = trained(
            [linear.name for linear in linears], self.linear_settings.method.updates_weights
        )
        count, with_windows = len(self.stream), sum(self._counts) > 0
        held_out = frozenset(batch - self._before for batch in held_out_batches(sum(self._counts)))
        # What is trained keeps the order in which it was pruned until then; what is not can go on as it will be stored.
        settled = [
            linear
            for linear in linears
            if reconstruction is not None and linear.name in folds and linear.name not in names
        ]
        with contextlib.ExitStack() as outer, contextlib.ExitStack() as stack:
            feed: Accumulate = accumulate_inputs
            if self.dense is not None:
                told = [
                    linear.name for linear in linears if self.uses_dense_target(linear.shape[1])
                ]
                dense_inputs = stack.enter_context(
                    self.dense.beside(index, stored, told, walk == "lockstep")
                )
                if self.linear_settings.method.needs_drift:
                    feed = accumulate_both(dense_inputs, held_out)
            # Once the dense block is copied, which must not follow.
            put_in_order = outer.enter_context(inputs_permuted(settled))
            if with_windows:
                forward, put = self.stream.forward(index, block), self.stream.states.put
                if keeps:
                    tail = find_suffix(block, names, forward, 0)
                if tail is not None:
                    forward = stack.enter_context(tail.recording())
                finish = put if reconstruction is None and not self.permute else _forget
                unreached = _WALKS[walk](
                    linears,
                    count,
                    forward,
                    finish,
                    self._new_statistics,
                    prune_one,
                    feed,
                    self.ranks,
                    expert_counters,
                )
            for linear in unreached:
                nothing = self._new_statistics(linear)
                nothing.complete(self.ranks)
                prune_one(linear, nothing)
            stack.close()  # the dense block's outputs are where its inputs were
            if reconstruction is not None and changed:
                assert self.dense is not None
                matcher = BlockReconstructor(
                    reconstruction,
                    self.stream,
                    self.dense.stream,
                    list(self.dense.along),
                    self.dense.counts_per_rank(self._counts),
                    self.ranks,
                    self._split,
                )
                learnt, match = matcher.match(index, block, stored, changed, names, tail, keeps)
                changed |= learnt
                for linear in linears:
                    _count_zeros(records[linear.name], changed[f"{linear.name}.weight"])
        by_name = {linear.name: linear for linear in self.skeleton.linears(index)}
        for relative, order_I in orders.items():
            changed |= fold({**stored, **changed}, folds[relative], order_I, by_name)
        if reconstruction is not None or self.permute:
            self._advance(index, {**stored, **changed}, tail, reordered=bool(orders))
        self.skeleton.release(index)
        check_same(self.ranks, name, changed)
        ordered = {linear.name: records[linear.name] for linear in linears}
        return changed, BlockRecord(
            name=name,
            input_sha256=digest,
            walk=walk,
            ranks=self.ranks.size,
            linears=ordered,
            reconstruction=match,
        )

    def _advance(
        self,
        index: int,
        finished: Mapping[str, torch.Tensor],
        tail: CachedSuffix | None,
        reordered: bool,
    ) -> None:
        """Take all batches through the finished block, as when a run is resumed behind it; by its tail, if it can be."""
        if not len(self.stream):
            return
        whole = self.stream.forward(index, self.skeleton.fill(index, finished, self.device))
        # What reaches the tail came from values in another order, which most attentions do not notice.
        same = tail is not None and (not reordered or torch.equal(tail(0), whole(0)))
        self.stream.advance(tail if tail is not None and same else whole)

    def _new_statistics(self, linear: Linear) -> InputStatistics:
        method = self.linear_settings.method
        drift: Drift = "some" if self.drift_stride > 1 else "all"
        spec = StatisticsSpec(
            needs=method.needs,
            means=method.needs_means,
            drift=drift if self.uses_dense_target(linear.shape[1]) else "none",
            hold_out=method.needs_held_out,
            low_precision=method.adds_ridge,
            reference_order=self.linear_settings.options.reference_order,
            distributed=self.ranks.size > 1,
        )
        return InputStatistics(linear.shape[1], spec, self.device)

    def _folds(
        self, index: int, block: torch.nn.Module, selected: Sequence[str]
    ) -> dict[str, Fold]:
        """By relative name of a linear, the order of whose inputs is free: what follows it. Tried on the first batch.

        One rank alone has that batch, and tells the others which guess held.
        """
        linears = {linear.name: linear for linear in self.skeleton.linears(index)}
        heads = getattr(self.source.config.get_text_config(), "num_attention_heads", None)
        pattern = self.linear_settings.pattern
        assert pattern.m is not None
        found = find_folds(list(linears.values()), heads, pattern.m)
        guessed = {name: guesses for name, guesses in found.items() if name in selected}
        held: dict[str, int] = {}
        if self._before == 0 and len(self.stream):
            forward = self.stream.forward(index, block)
            for name, guesses in guessed.items():
                works = (
                    i
                    for i, guess in enumerate(guesses)
                    if holds(guess, linears, lambda: forward(0))
                )
                if (chosen := next(works, None)) is not None:
                    held[name] = chosen
        told = [json.loads(text) for text in self.ranks.gather_text(json.dumps(held))]
        return {name: guessed[name][chosen] for each in told for name, chosen in each.items()}

    def prune_head(
        self, batches: Sequence[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], LinearRecord]:
        """Prune the output head on what the final norm gives after the last block.

        Returns:
            The pruned tensor by its name in the model, in its stored dtype, and the record.
        """
        head = self.skeleton.head()
        key = f"{head.name}.weight"
        with self.skeleton.outside_blocks(self.source.outer, self.device, with_head=True):
            self.ranks.set_location(head.name)
            statistics = self._new_statistics(head)
            for position, ids in enumerate(self.mine(batches)):
                x = self.skeleton.head_input(ids.to(self.device), self.stream.states.get(position))
                statistics.add(x.reshape(-1, x.shape[-1]))
            statistics.complete(self.ranks)
            stored = self.source.outer([key], self.skeleton.model)[key]
            pruned, record, _ = prune_linear(
                self.linear_settings, head, head.name, stored, statistics, ranks=self.ranks
            )
        check_same(self.ranks, head.name, {key: pruned})
        return {key: pruned}, record

    def close(self) -> None:
        """Release hidden states."""
        self.stream.close()
        if self.dense is not None:
            self.dense.close()


def _forget(_batch: int, _output: torch.Tensor) -> None:
    """Outputs of a block that will be trained are not its last."""


def _count_zeros(record: LinearRecord, weight: torch.Tensor) -> None:
    record.zeros = count_zeros(weight)
    record.sparsity = record.zeros / weight.numel()
