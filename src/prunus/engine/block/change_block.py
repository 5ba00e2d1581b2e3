"""Prunes the blocks of a model one after the other, with all calibration windows in step.

The steps of one block, as `BlockChanger.change_block` takes them:

    load         weights into the block; a copy of the dense block where its inputs are needed
    walk         all windows through the block; every linear is pruned when its statistics are known
    reconstruct  train the surviving weights towards the outputs of the dense block
    advance      the hidden states to the outputs of the finished block

`BlockState` at the end of the file holds what these steps know of their block. This file knows
weights, hidden states and walks. It knows nothing of folders, manifests on disk or where text is
read.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from prunus.distributed import own_part, ranks, set_location
from prunus.engine.block.dense_stream import DenseBlockInputs, DenseStream
from prunus.engine.block.hooks import ExpertCounter, find_expert_counters
from prunus.engine.block.linear import SPARSE, LinearRounding, change_linear
from prunus.engine.block.walks import WALKS, Accumulate, BlockWalk, accumulate_inputs
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.linear_record import BlockRecord, LinearRecord, ReconstructionRecord
from prunus.engine.loop import FinishedBlock, StoredBlock, check_same
from prunus.engine.reconstruction import reconstruct_block
from prunus.engine.reconstruction.reconstruct_block import (
    BlockReconstruction,
    BlockReconstructor,
)
from prunus.engine.run_record import Walk
from prunus.engine.session import Session
from prunus.hardware.numerics import count_zeros
from prunus.methods.statistics import Drift, InputStatistics, StatisticsSpec
from prunus.methods.work import LinearPlace, Rounded
from prunus.model.linears import Linear
from prunus.model.meta_model import place
from prunus.model.stream import Stream


class BlockChanger:
    """Takes all calibration windows through a model, one block at a time.

    Call `embed` first, then `change_block` or `propagate` once per block in order, then `close`.
    `prune_head` may follow the last block. All ranks call each of them at once.

    Args:
        plan: The decisions of the run: model, method, options and device.
        session: Who hears of the run.
        walks: Per block, how the windows go through it; see `walks.py`.
        sparsities: The sparsity of single linears, by full name; the others get that of the run.
        round_as: How linears are rounded; None for a run that rounds none.

    Attributes:
        stream: The hidden states of the pruned model before the next block.
        dense: The hidden states of the dense model; None if the run does not need them.
    """

    def __init__(
        self,
        plan: LinearPlan,
        session: Session,
        walks: Sequence[Walk],
        sparsities: Mapping[str, float],
        round_as: LinearRounding | None = None,
    ) -> None:
        self.plan = plan
        self.session = session
        self.walks = walks
        self.sparsities = sparsities
        self.round_as = round_as
        self.skeleton = plan.skeleton
        self.stream = Stream(plan.skeleton, plan.source, plan.device)
        self.dense: DenseStream | None = None
        if plan.runs_dense_stream:
            self.dense = DenseStream(plan.skeleton, plan.source, plan.device, plan.drift_stride)
        # Trains blocks after they are pruned; None before `embed`, or if the run trains none.
        self._reconstructor: BlockReconstructor | None = None

    def embed(self, batches: Sequence[torch.Tensor], spill_folder: Path) -> None:
        """Run what precedes the blocks on this rank's share of the batches.

        Args:
            batches: Token ids (windows, tokens), or images, of all batches of all ranks.
            spill_folder: Folder for a file of hidden states, if they do not fit in memory.
        """
        reconstruction, memory = self.plan.reconstruction, self.plan.memory
        share, splits, partial = own_part(batches), False, list[torch.Tensor]()
        if reconstruction is not None:
            splits = reconstruct_block.splits_windows(batches, self.plan.device)
            partial = reconstruct_block.step_parts(batches, splits)
        spill_to = spill_folder if memory.spills else None
        self.stream.embed(share, spill_to, memory.hidden_states_stay, partial)
        if self.dense is None:
            return
        own = ranks().own_range(len(batches))
        self.dense.embed(share, spill_to, memory.hidden_states_stay, own.start)
        if reconstruction is not None:
            self._reconstructor = reconstruct_block.BlockReconstructor(
                settings=reconstruction,
                stream=self.stream,
                dense=self.dense.stream,
                numbers=list(self.dense.dense_number),
                splits=splits,
            )

    def propagate(self, position: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take all batches through a block that an earlier run has finished.

        The hidden states end as they do after `change_block`.

        Args:
            position: Position of the block.
            tensors: Its finished tensors by relative name.
        """
        self.stream.propagate(position, tensors)
        if self.dense is not None:
            self.dense.propagate(position)

    def change_block(self, position: int, stored: StoredBlock) -> FinishedBlock:
        """Prune one block, and take all batches through it.

        Args:
            position: Position of the block.
            stored: The block as the checkpoint stores it.

        Returns:
            All its tensors, its record, a line for the log, and its rounded linears.

        Raises:
            ValueError: Weights or activations are not finite; the message names the tensor.
            NotImplementedError: The walk cannot prune this block, for one that calls a linear more
                than once.
            RankError: The ranks have pruned to different bytes.
        """
        started = time.perf_counter()
        state = self._load_block(position, stored)
        self._note_zeros(state)
        self._walk(state)
        if state.reconstruction is not None:
            self._reconstruct(state, state.reconstruction)
        self.skeleton.release(position)
        check_same(state.name, state.changed)
        record = BlockRecord(
            name=state.name,
            input_sha256=stored.digest,
            walk=state.walk,
            seconds=round(time.perf_counter() - started, 3),
            ranks=ranks().size,
            linears={linear.name: state.records[linear.name] for linear in state.linears},
            dense_zeros={
                linear.name: count_zeros(state.finished[f"{linear.name}.weight"])
                for linear in self.skeleton.linears(position)
                if linear.name not in state.records
            },
            reconstruction=state.reconstructed,
        )
        done = "pruned" if self.round_as is None else "compressed"
        message = f"{done} in {record.seconds:.2f} s"
        if record.walk == "replay":
            message += ", with one batch in flight: paused windows do not fit in the memory budget"
        return FinishedBlock(state.finished, record, message, state.rounded)

    def _load_block(self, index: int, stored: StoredBlock) -> BlockState:
        """Put the weights into the block, and prepare all that its walk needs."""
        plan, name = self.plan, self.skeleton.block_name(index)
        selected, walk = plan.selected[index], self.walks[index]
        method = plan.method
        set_location(name)
        module = self.skeleton.fill(index, stored.tensors, plan.device)
        linears = [linear for linear in self.skeleton.linears(index) if linear.name in selected]
        names = [linear.name for linear in linears]
        least = plan.recipe.min_expert_tokens
        counters = find_expert_counters(module, names, method.needs, least)
        # Copied before anything changes in the block: neither weights nor wrapped forwards follow.
        dense_inputs = None
        if self.dense is not None:
            aimed = [x.name for x in linears if plan.uses_dense_target(x.shape[1])]
            dense_inputs = self.dense.copy_block(
                index, stored.tensors, aimed, cache=walk == "lockstep"
            )
        reconstruction = learning = None
        if self._reconstructor is not None:
            # What learns during the walk is a copy, because batches wait in the block itself.
            before, trained = self._reconstructor.settings.before, module
            if before:
                trained = self.skeleton.fill(index, stored.tensors, plan.device, duplicate=True)
            begun = self._reconstructor.begin(index, trained, names, method.updates_weights, walk)
            reconstruction, learning = (None, begun) if before else (begun, None)
        return BlockState(
            index=index,
            name=name,
            dense_tensors=stored.tensors,
            module=module,
            linears=linears,
            walk=walk,
            expert_counters=counters,
            dense_inputs=dense_inputs,
            reconstruction=reconstruction,
            learning=learning,
        )

    def _note_zeros(self, state: BlockState) -> None:
        """Say before the first block that the model is sparse already."""
        weights = [state.dense_tensors[f"{linear.name}.weight"] for linear in state.linears]
        count = sum(weight.numel() for weight in weights)
        zeros = sum(map(count_zeros, weights)) if state.index == 0 else 0
        if zeros > SPARSE * count:
            self.session.tell(
                f"the model has zeros already: {zeros / count:.1%} of the weights to prune in "
                f"{state.name}; the sparsity that you ask for includes them"
            )

    def _walk(self, state: BlockState) -> None:
        """Take all batches through the block and prune its linears on the way."""
        prune = functools.partial(self._change_linear, state)
        unreached = state.linears
        if self.plan.walks_windows:
            forward = self.stream.forward(state.index, state.module)
            # A block that is trained gets its outputs later, in `_reconstruct`.
            is_final = state.reconstruction is None
            accumulate: Accumulate = accumulate_inputs
            if state.dense_inputs is not None:
                accumulate = state.dense_inputs.accumulate
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
                    accumulate=accumulate,
                    expert_counters=state.expert_counters,
                )
                unreached = WALKS[state.walk](walk)
        # Linears that no token reached are pruned too, by their weights alone.
        for linear in unreached:
            empty = self._new_statistics(linear)
            empty.complete()
            prune(linear, empty)
        if state.dense_inputs is not None:
            state.dense_inputs.finish()
            state.dense_inputs = None  # releases the copy of the dense block

    def _change_linear(
        self, state: BlockState, linear: Linear, statistics: InputStatistics
    ) -> None:
        """Prune a linear, and enter its weight and its record into the state of its block."""
        key = f"{linear.name}.weight"
        full_name = f"{state.name}.{linear.name}"
        if state.learning is not None and linear.name in state.learning.trained:
            self._learn(state, state.learning)
        set_location(full_name)
        work, masks = self.plan.work, self.plan.step.masks
        sparsity = self.sparsities.get(full_name, work.sparsity)
        finished = change_linear(
            self.plan.method,
            replace(
                work,
                sparsity=sparsity,
                given_OI=None if masks is None else masks.get(full_name),
                linear=LinearPlace(full_name, state.index, linear.name, linear.kind),
            ),
            linear,
            full_name,
            state.dense_tensors[key],
            statistics,
            self.round_as,
            state.learnt.get(key),
        )
        state.changed[key] = finished.weight
        state.records[linear.name] = finished.record
        if finished.rounded is not None:
            state.rounded[linear.name] = finished.rounded
        for counter in state.expert_counters:
            if counter.owns(linear.name):
                finished.record.notes |= counter.notes(linear.name)

    def _learn(self, state: BlockState, learning: BlockReconstruction) -> None:
        """Train the weights after attention, which is changed already, before they are changed."""
        assert state.dense_inputs is not None, "what learns needs the dense model's outputs"
        state.learning = None
        place(learning.block, state.finished, self.plan.device)
        learning.find_suffix(self.stream.forward(state.index, learning.block))
        keys = [f"{name}.weight" for name in learning.trained]
        weights = {key: state.dense_tensors[key].float() for key in keys}
        targets = state.dense_inputs.outputs()
        state.learnt, state.reconstructed = learning.run(weights, weights, targets)

    def _reconstruct(self, state: BlockState, reconstruction: BlockReconstruction) -> None:
        """Train the surviving weights towards the dense block's outputs.

        Then replace the hidden states by the outputs of the trained block. If a block is not
        trained, the walk has done that already.
        """
        trained_tensors, state.reconstructed = reconstruction.run(
            state.dense_tensors, state.changed
        )
        state.changed |= trained_tensors
        for linear in state.linears:
            # Training may round a small weight to zero.
            record = state.records[linear.name]
            weight = state.changed[f"{linear.name}.weight"]
            record.zeros = count_zeros(weight)
            record.sparsity = record.zeros / weight.numel()
        if len(self.stream):
            module = self.skeleton.fill(state.index, state.finished, self.plan.device)
            # The cached inputs of the suffix save running the attention again.
            self.stream.advance(reconstruction.suffix or self.stream.forward(state.index, module))

    def _new_statistics(self, linear: Linear) -> InputStatistics:
        """Empty statistics of the inputs of a linear, with all that the run needs."""
        plan, in_features = self.plan, linear.shape[1]
        drift: Drift = "some" if plan.drift_stride > 1 else "all"
        spec = StatisticsSpec(
            needs=plan.needs,
            drift=drift if plan.uses_dense_target(in_features) else "none",
            reference_order=plan.work.reference_order,
            rounded=self.round_as is not None,  # masks would show it, and integers do not
            first_share=plan.storage.first_share if linear.feeds_attention else 0.0,
            distributed=ranks().size > 1,
        )
        return InputStatistics(in_features, spec, plan.device)

    def prune_head(
        self, batches: Sequence[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], LinearRecord]:
        """Prune the output head on the outputs of the final norm, after the last block.

        Args:
            batches: Token ids of all batches of all ranks, as in `embed`.

        Returns:
            The pruned weight by its name in the model, in its stored dtype, and its record.
        """
        head = self.skeleton.vocabulary_weights.prunable_head
        key, device = f"{head.name}.weight", self.plan.device
        with self.skeleton.outside_blocks(self.plan.source.read_outside, device, with_head=True):
            statistics = self._head_statistics(head, batches)
            stored = self.plan.source.read_outside([key])[key]
            sparsity = self.sparsities.get(head.name, self.plan.work.sparsity)
            place = LinearPlace(head.name, inner=head.name)
            finished = change_linear(
                self.plan.method,
                replace(self.plan.work, sparsity=sparsity, linear=place),
                head,
                head.name,
                stored,
                statistics,
            )
        check_same(head.name, {key: finished.weight})
        return {key: finished.weight}, finished.record

    def head_statistics(self, batches: Sequence[torch.Tensor]) -> InputStatistics:
        """The statistics of the inputs of the output head, after the last block.

        Args:
            batches: Token ids of all batches of all ranks, as in `embed`.
        """
        read, device = self.plan.source.read_outside, self.plan.device
        with self.skeleton.outside_blocks(read, device, with_head=True):
            head = self.skeleton.vocabulary_weights.linear_head
            return self._head_statistics(head, batches)

    def _head_statistics(self, head: Linear, batches: Sequence[torch.Tensor]) -> InputStatistics:
        """`head_statistics`, while the head has its weight."""
        set_location(head.name)
        statistics = self._new_statistics(head)
        for batch, ids in enumerate(own_part(batches)):
            x = self.skeleton.head_input(ids.to(self.plan.device), self.stream.states.get(batch))
            statistics.add(x)
        statistics.complete()
        return statistics

    def close(self) -> None:
        """Release the hidden states, and the file that holds them."""
        self.stream.close()
        if self.dense is not None:
            self.dense.stream.close()


@dataclass
class BlockState:
    """One block while it is pruned.

    The fields from `changed` on are empty until the walk and the training fill them.

    Attributes:
        index: Position of the block.
        name: Name of the block in the model, such as `model.layers.3`.
        dense_tensors: By relative name, in the checkpoint's dtypes and on the host.
        module: The block with its weights in place, on the device. The walk changes them.
        linears: The linears to prune, in the order of registration.
        walk: How the windows go through the block; see `walks.py`.
        expert_counters: Counters of its experts modules. Empty if no expert is to be measured on
            tokens that did not choose it.
        dense_inputs: Inputs of the dense block; None if the run needs none, and after the walk.
        reconstruction: How the block is trained after the walk; None if it is not.
        learning: How a part of it is trained during the walk; None if it is not, and afterwards.
        learnt: What that gave, float32 by relative name.
        changed: The finished tensors by relative name, as far as they differ from
            `dense_tensors`, in its dtypes.
        records: The records of the linears, by relative name.
        rounded: The linears that a format stores in types of its own, by relative name.
        reconstructed: The record of the training; None before it, or if there is none.
    """

    index: int
    name: str
    dense_tensors: Mapping[str, torch.Tensor]
    module: nn.Module
    linears: list[Linear]
    walk: Walk
    expert_counters: list[ExpertCounter]
    dense_inputs: DenseBlockInputs | None
    reconstruction: BlockReconstruction | None
    learning: BlockReconstruction | None = None
    learnt: dict[str, torch.Tensor] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    records: dict[str, LinearRecord] = field(default_factory=dict)
    rounded: dict[str, Rounded] = field(default_factory=dict)
    reconstructed: ReconstructionRecord | None = None

    @property
    def finished(self) -> dict[str, torch.Tensor]:
        """All tensors of the block by relative name, as far as they are pruned."""
        return {**self.dense_tensors, **self.changed}
