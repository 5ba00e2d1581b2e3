"""Prunes the blocks of a model one after the other, with all calibration windows in step.

The steps of one block, as `BlockPruner.make` takes them:

    load         weights into the block; a copy of the dense block where its inputs are needed
    walk         all windows through the block; every linear is pruned when its statistics are known
    reconstruct  train the surviving weights towards the outputs of the dense block
    advance      the hidden states to the outputs of the finished block

This file knows weights, hidden states and walks. It knows nothing of folders, manifests on disk or
where text is read.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from prunus.distributed import SINGLE_PROCESS, Ranks, own_part, split_range
from prunus.hardware.numerics import count_zeros
from prunus.methods.statistics import Drift, InputStatistics, StatisticsSpec
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.pruning.block.dense_stream import (
    DenseBlockInputs,
    DenseStream,
    accumulate_with_drift,
    held_out_batches,
)
from prunus.pruning.block.hooks import ExpertCounter, find_expert_counters
from prunus.pruning.block.linear import SPARSE, LinearFinish, Stored, prune_linear
from prunus.pruning.block.lockstep import lockstep
from prunus.pruning.block.replay import replay
from prunus.pruning.block.two_pass import two_pass
from prunus.pruning.block.walk import Accumulate, BlockWalk, accumulate_inputs
from prunus.pruning.job import PruningJob
from prunus.pruning.manifest import BlockRecord, LinearRecord, ReconstructionRecord
from prunus.pruning.reconstruction.reconstruct_block import (
    BlockReconstruction,
    BlockReconstructor,
    step_parts,
    step_ranks,
)
from prunus.pruning.reconstruction.schedule import linears_to_train
from prunus.runs.loop import Made, StoredBlock, check_same
from prunus.runs.record import Walk

_WALKS: dict[Walk, Callable[[BlockWalk], list[Linear]]] = {
    "lockstep": lockstep,
    "replay": replay,
    "two_pass": two_pass,
}


@dataclass
class BlockPruner:
    """Takes all windows through a model: `embed`, `make` or `take` per block in order, `close`."""

    job: PruningJob
    walks: Sequence[Walk]
    sparsities: Mapping[str, float] = field(default_factory=dict)
    finish: LinearFinish | None = None
    stream: Stream = field(init=False)
    dense: DenseStream | None = field(init=False, default=None)
    #: Per rank, its number of batches.
    _counts: list[int] = field(init=False, default_factory=list)
    _reconstructor: BlockReconstructor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        job = self.job
        self.ranks, self.skeleton = job.ranks, job.skeleton
        self.stream = Stream(job.skeleton, job.source, job.device)
        if job.runs_dense_stream:
            self.dense = DenseStream(job.skeleton, job.source, job.device, job.drift_stride)

    def embed(
        self, batches: Sequence[torch.Tensor], spill_to: Path | None, on_device: bool = True
    ) -> None:
        """Run what precedes the blocks on this rank's share of the batches."""
        reconstruction = self.job.reconstruction
        self._counts = [len(part) for part in split_range(len(batches), self.ranks.size)]
        split: Ranks = SINGLE_PROCESS
        partial: list[torch.Tensor] = []
        if reconstruction is not None:
            split = step_ranks(self.ranks, max(map(len, batches)), self.job.device)
            partial = step_parts(batches, split)
        own = own_part(self.ranks, batches)
        self.stream.embed(own, spill_to, on_device, partial)
        if self.dense is not None:
            self.dense.embed(own, spill_to, on_device, self._first_batch)
        if self.dense is not None and reconstruction is not None:
            self._reconstructor = BlockReconstructor(
                settings=reconstruction,
                stream=self.stream,
                dense=self.dense.stream,
                numbers=list(self.dense.dense_number),
                counts=self.dense.counts_per_rank(self._counts),
                ranks=self.ranks,
                split=split,
            )

    @property
    def _first_batch(self) -> int:
        """Number of this rank's first batch among those of all ranks."""
        return sum(self._counts[: self.ranks.rank])

    def take(self, place: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take all batches through a block that an earlier run has finished, as `make` does."""
        self.stream.propagate(place, tensors)
        if self.dense is not None:
            self.dense.propagate(place)

    def make(self, place: int, stored: StoredBlock) -> Made:
        started = time.perf_counter()
        state = self._load(place, stored)
        self._note_zeros(state)
        self._walk(state)
        self._reconstruct(state)
        self._advance(state)
        self.skeleton.release(place)
        check_same(self.ranks, state.name, state.changed)
        record = state.record(self.ranks.size)
        record.seconds = round(time.perf_counter() - started, 3)
        message = f"{self.job.RECORD.DONE} in {record.seconds:.2f} s"
        if record.walk == "replay":
            message += ", with one batch in flight: paused windows do not fit in the memory budget"
        return Made(state.finished, record, message, state.packed)

    def _load(self, index: int, stored: StoredBlock) -> BlockState:
        """Put the weights into the block, and prepare all that its walk needs."""
        job, name = self.job, self.skeleton.block_name(index)
        selected, walk = job.selected[index], self.walks[index]
        method = job.linear_settings.method
        self.ranks.set_location(name)
        module = self.skeleton.fill(index, stored.tensors, job.device)
        linears = [linear for linear in self.skeleton.linears(index) if linear.name in selected]
        names = [linear.name for linear in linears]
        least = job.recipe.min_expert_tokens
        counters = find_expert_counters(module, names, method.needs, least)
        # Copied before anything changes in the block: neither weights nor wrapped forwards follow.
        dense_inputs = None
        if self.dense is not None:
            aimed = [x.name for x in linears if job.uses_dense_target(x.shape[1])]
            dense_inputs = self.dense.copy_block(
                index, stored.tensors, aimed, cache=walk == "lockstep"
            )
        reconstruction = None
        if self._reconstructor is not None and names:
            trained_names = linears_to_train(names, method.updates_weights)
            reconstruction = self._reconstructor.begin(index, module, trained_names, walk)
        return BlockState(
            index=index,
            name=name,
            stored=stored.tensors,
            digest=stored.digest,
            module=module,
            linears=linears,
            walk=walk,
            expert_counters=counters,
            dense_inputs=dense_inputs,
            reconstruction=reconstruction,
        )

    def _note_zeros(self, state: BlockState) -> None:
        """Say before the first block that the model is sparse already."""
        weights = [state.stored[f"{linear.name}.weight"] for linear in state.linears]
        count = sum(weight.numel() for weight in weights)
        zeros = sum(map(count_zeros, weights)) if state.index == 0 else 0
        if zeros > SPARSE * count:
            self.job.options.tell(
                f"the model has zeros already: {zeros / count:.1%} of the weights to prune in "
                f"{state.name}; the sparsity that you ask for includes them"
            )

    def _walk(self, state: BlockState) -> None:
        """Take all batches through the block and prune its linears on the way."""
        prune = functools.partial(self._prune_linear, state)
        unreached = state.linears
        if sum(self._counts):
            forward = self.stream.forward(state.index, state.module)
            # A block that is trained gets its outputs later, in `_advance`.
            is_final = state.reconstruction is None
            with contextlib.ExitStack() as stack:
                if state.reconstruction is not None:
                    forward = stack.enter_context(state.reconstruction.recording(forward))
                walk = BlockWalk(
                    linears=state.linears,
                    count=len(self.stream),
                    forward=forward,
                    finish=self.stream.states.put if is_final else lambda *_: None,
                    new_statistics=self._new_statistics,
                    prune=prune,
                    accumulate=self._accumulate(state),
                    ranks=self.ranks,
                    expert_counters=state.expert_counters,
                )
                unreached = _WALKS[state.walk](walk)
        # Linears that no token reached are pruned too, by their weights alone.
        for linear in unreached:
            empty = self._new_statistics(linear)
            empty.complete(self.ranks)
            prune(linear, empty)
        if state.dense_inputs is not None:
            state.dense_inputs.finish()
            state.dense_inputs = None  # releases the copy of the dense block

    def _prune_linear(self, state: BlockState, linear: Linear, statistics: InputStatistics) -> None:
        key, full_name = f"{linear.name}.weight", f"{state.name}.{linear.name}"
        self.ranks.set_location(full_name)
        settings = self.job.linear_settings
        sparsity = self.sparsities.get(full_name, settings.work.sparsity)
        finished = prune_linear(
            replace(settings, work=replace(settings.work, sparsity=sparsity)),
            linear,
            full_name,
            state.stored[key],
            statistics,
            self.ranks,
            self.finish,
        )
        record = finished.record
        state.changed[key], state.records[linear.name] = finished.weight, record
        if finished.packed is not None:
            state.packed[linear.name] = finished.packed
        for counter in state.expert_counters:
            if counter.owns(linear.name):
                record.notes |= counter.notes(linear.name)

    def _reconstruct(self, state: BlockState) -> None:
        if state.reconstruction is None:
            return
        trained_tensors, state.reconstructed = state.reconstruction.run(state.stored, state.changed)
        state.changed |= trained_tensors
        for linear in state.linears:
            # Training may round a small weight to zero.
            record, weight = state.records[linear.name], state.changed[f"{linear.name}.weight"]
            record.zeros = count_zeros(weight)
            record.sparsity = record.zeros / weight.numel()

    def _advance(self, state: BlockState) -> None:
        """Replace the hidden states by the outputs of the trained block; else the walk has."""
        if state.reconstruction is None or not len(self.stream):
            return
        module = self.skeleton.fill(state.index, state.finished, self.job.device)
        # The cached inputs of the suffix save running the attention again.
        suffix = state.reconstruction.suffix
        self.stream.advance(suffix or self.stream.forward(state.index, module))

    def _accumulate(self, state: BlockState) -> Accumulate:
        """How a linear's inputs are added to its statistics."""
        if state.dense_inputs is None or not self.job.linear_settings.method.needs_drift:
            return accumulate_inputs
        held_out = held_out_batches(sum(self._counts))
        own = frozenset(batch - self._first_batch for batch in held_out)
        return accumulate_with_drift(state.dense_inputs, own)

    def _new_statistics(self, linear: Linear) -> InputStatistics:
        job, in_features = self.job, linear.shape[1]
        method = job.linear_settings.method
        drift: Drift = "some" if job.drift_stride > 1 else "all"
        spec = StatisticsSpec(
            needs=method.needs,
            drift=drift if job.uses_dense_target(in_features) else "none",
            hold_out=method.needs_held_out,
            reference_order=job.reference_order,
            rounded=self.finish is not None,  # masks would show it, and integers do not
            distributed=self.ranks.size > 1,
        )
        return InputStatistics(in_features, spec, job.device)

    def prune_head(
        self, batches: Sequence[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], LinearRecord]:
        """Prune the output head on the outputs of the final norm: its tensor, and its record."""
        head = self.skeleton.head()
        key, device = f"{head.name}.weight", self.job.device
        with self.skeleton.outside_blocks(self.job.source.read_outside, device, with_head=True):
            self.ranks.set_location(head.name)
            statistics = self._new_statistics(head)
            for batch, ids in enumerate(own_part(self.ranks, batches)):
                x = self.skeleton.head_input(ids.to(device), self.stream.states.get(batch))
                statistics.add(x.reshape(-1, x.shape[-1]))
            statistics.complete(self.ranks)
            stored = self.job.source.read_outside([key])[key]
            finished = prune_linear(
                self.job.linear_settings, head, head.name, stored, statistics, ranks=self.ranks
            )
        check_same(self.ranks, head.name, {key: finished.weight})
        return {key: finished.weight}, finished.record

    def close(self) -> None:
        self.stream.close()
        if self.dense is not None:
            self.dense.close()


@dataclass
class BlockState:
    index: int
    name: str
    stored: Mapping[str, torch.Tensor]
    digest: str
    module: nn.Module
    linears: list[Linear]
    walk: Walk
    expert_counters: list[ExpertCounter]
    dense_inputs: DenseBlockInputs | None
    reconstruction: BlockReconstruction | None
    #: the finished tensors by relative name, as far as they differ from `stored`.
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    records: dict[str, LinearRecord] = field(default_factory=dict)
    #: the linears that a compressed checkpoint stores as integers, by relative name.
    packed: dict[str, Stored] = field(default_factory=dict)
    reconstructed: ReconstructionRecord | None = None

    @property
    def finished(self) -> dict[str, torch.Tensor]:
        """All tensors of the block by relative name, as far as they are pruned."""
        return {**self.stored, **self.changed}

    def record(self, ranks: int) -> BlockRecord:
        """The record of the finished block; its seconds are still missing."""
        return BlockRecord(
            name=self.name,
            input_sha256=self.digest,
            walk=self.walk,
            ranks=ranks,
            linears={linear.name: self.records[linear.name] for linear in self.linears},
            reconstruction=self.reconstructed,
        )
