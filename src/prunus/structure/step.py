"""The step that makes the blocks of a smaller model, one after the other.

    measure ► choose what is removed ► cut ► repair ► run the windows through the result

The hidden states are those of the smaller model. So the experts of every block are measured on what
will reach them, and repair trains every block on that.

A block has an old position in the source (`old_index`) and a new one in the result (`new_index`).
Names of tensors and linears are relative to their block, such as `mlp.down_proj.weight`.

Shape suffix: E experts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from prunus.distributed import own_part
from prunus.engine.linear_plan import ReconstructionSettings, training_dtype
from prunus.engine.linear_record import ReconstructionRecord
from prunus.engine.loop import FinishedBlock, StoredBlock, check_same
from prunus.engine.reconstruction.reconstruct_block import (
    BlockReconstructor,
    splits_windows,
    step_parts,
)
from prunus.engine.run_record import Walk
from prunus.methods.structured import ExpertSums, kept_experts
from prunus.model.stream import Stream
from prunus.structure.structure_plan import ExpertPlan, SmallerModel, StructurePlan
from prunus.structure.structure_record import BlockChange, ExpertChange
from prunus.structure.tensor_layout import experts_in, shapes_of, with_experts


class ShrinkStep:
    """Makes one block after the other: a `BlockStep`.

    Call `propagate` or `change_block` for each in order.

    Args:
        plan: The checked run.
        smaller: The model that is made.
        ids: Calibration windows of all processes, (windows, tokens).
        walks: For each old block, how the windows go through it.
        spill_to: Folder for a file of hidden states, if they do not stay in memory.
    """

    def __init__(
        self,
        plan: StructurePlan,
        smaller: SmallerModel,
        ids: Tensor,
        walks: Sequence[Walk],
        spill_to: Path,
    ) -> None:
        self._plan = plan
        self._smaller = smaller
        self._stream = Stream(smaller.skeleton, plan.source, plan.device)
        self._repair: Repair | None = None
        self._open = contextlib.ExitStack()
        self._open.callback(self._stream.close)
        # Without repair, a removed block changes no other. Only experts need windows.
        needs_windows = plan.recipe.repair or plan.experts is not None
        batches = ids.split(plan.batch) if needs_windows else ()
        batches_of_rank = own_part(batches)
        on_device = plan.memory.hidden_states_stay
        spill_folder = spill_to if plan.memory.spills else None
        if not plan.recipe.repair:
            self._stream.embed(batches_of_rank, spill_folder, on_device)
            return
        splits = splits_windows(batches, plan.device)
        self._stream.embed(batches_of_rank, spill_folder, on_device, step_parts(batches, splits))
        dense = Stream(plan.skeleton, plan.source, plan.device)
        self._open.callback(dense.close)
        dense.embed(batches_of_rank, spill_folder, on_device)
        reconstructor = BlockReconstructor(
            settings=ReconstructionSettings(None, training_dtype(plan.device, plan.dtype)),
            stream=self._stream,
            dense=dense,
            numbers=range(len(dense)),
            splits=splits,
        )
        self._repair = Repair(plan, smaller, reconstructor, walks)

    def propagate(self, new_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Run the windows through a block that an earlier run has finished.

        Args:
            new_index: New position of the block.
            tensors: Its tensors in the result, by relative name.
        """
        if self._repair is not None:
            self._repair.advance(new_index)
        self._stream.propagate(new_index, tensors)

    def change_block(self, new_index: int, stored: StoredBlock) -> FinishedBlock:
        """Make the block `new_index` of the result, and run the windows through it.

        Args:
            new_index: New position of the block.
            stored: The old block that it is made from.

        Raises:
            RankError: Two processes have made different bytes.
        """
        if self._repair is not None:
            self._repair.advance(new_index)
        tensors, change = self._cut(new_index, stored)
        seconds = change.seconds
        if self._repair is not None:
            tensors, change.repair = self._repair.train(new_index, tensors)
            seconds += change.repair.seconds if change.repair is not None else 0.0
        check_same(change.name, tensors)
        self._stream.propagate(new_index, tensors)
        message = f"made from block {change.made_from} in {seconds:.2f} s"
        return FinishedBlock(tensors, change, message)

    def close(self) -> None:
        """Free the hidden states, on disk too."""
        self._open.close()

    def _cut(self, new_index: int, stored: StoredBlock) -> tuple[dict[str, Tensor], BlockChange]:
        """A block without what is removed from it: its tensors, and what happened to it."""
        plan = self._plan
        started = time.perf_counter()
        old_index = self._smaller.made_from[new_index]
        name = self._smaller.skeleton.block_name(new_index)
        change = BlockChange(name=name, made_from=old_index, input_sha256=stored.digest)
        tensors = dict(stored.tensors)
        block = plan.skeleton.blocks[old_index]
        if plan.experts is not None and experts_in(block):
            change.experts = self._choose_experts(new_index, old_index, tensors, plan.experts)
            shapes = shapes_of(self._smaller.skeleton.blocks[new_index])
            tensors = with_experts(block, tensors, shapes, change.experts.kept)
        change.seconds = round(time.perf_counter() - started, 3)
        return tensors, change

    def _choose_experts(
        self, new_index: int, old_index: int, stored: Mapping[str, Tensor], counts: ExpertPlan
    ) -> ExpertChange:
        """Choose the experts of a block that stay, on all windows.

        The stream stays before the block, because the block that it runs through is smaller.
        """
        plan, stream = self._plan, self._stream
        sums = ExpertSums(counts.count)
        forward = stream.forward(new_index, plan.skeleton.fill(old_index, stored, stream.device))
        # `plan_structure` refuses blocks with several mixtures.
        (experts,) = experts_in(plan.skeleton.blocks[old_index])
        experts.on_output = sums.add
        try:
            for batch in range(len(stream)):
                forward(batch)
        finally:
            experts.on_output = None
        plan.skeleton.release(old_index)
        sums.complete()
        saliency_E = sums.reap_E if plan.recipe.saliency == "reap" else sums.contribution_E
        return ExpertChange(
            kept=kept_experts(saliency_E, counts.keep, counts.groups),
            saliency=saliency_E.tolist(),
            tokens=sums.tokens_E.tolist(),
        )


class Repair:
    """Repair after removal: trains the blocks that stay towards the outputs of the dense model.

        smaller stream  x̂ ──► block k, made smaller ──► trained towards y
        dense stream    x  ──► old blocks, up to the next one that stays ──► y

    So a block before a gap learns to do the work of the removed blocks. Repair trains this block,
    every block that lost parts, and all blocks after them, whose inputs have changed. The last
    block learns the next tokens of the dense model. The schedule is that of reconstruction, but all
    linears of a block are trained, and nothing is masked. In a mixture of experts the remaining
    rows of the router are trained too, because tokens of the lost experts now choose others.

    Call `advance` for each block in order.

    Args:
        plan: The checked run.
        smaller: The model that is made.
        reconstructor: Trains blocks on the windows of the smaller model and of the old one.
        walks: For each old block, how the windows go through it.
    """

    def __init__(
        self,
        plan: StructurePlan,
        smaller: SmallerModel,
        reconstructor: BlockReconstructor,
        walks: Sequence[Walk],
    ) -> None:
        self._plan = plan
        self._smaller = smaller
        self._reconstructor = reconstructor
        self._stream = reconstructor.stream
        self._walks = walks
        self._depth = 0  # old blocks that the dense windows have run through
        # The first block to train. Those before it see and compute what they did in the old model:
        # they lost no experts, and were not next to a removed block.
        ends = [-1, *smaller.made_from, len(plan.skeleton)]
        changed = [
            (before, after) != (index - 1, index + 1)
            or (plan.experts is not None and experts_in(plan.skeleton.blocks[index]) != [])
            for before, index, after in zip(ends, ends[1:], ends[2:], strict=False)
        ]
        self._first = [*changed, True].index(True)

    def advance(self, new_index: int) -> None:
        """Run the windows through the dense model, up to the output that the block learns.

        This is the input of the old block that the next new block is made from.
        """
        end = [*self._smaller.made_from, len(self._plan.skeleton)][new_index + 1]
        for index in range(self._depth, end):
            self._reconstructor.dense.propagate(index, self._plan.source.block(index))
        self._depth = end

    def train(
        self, new_index: int, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], ReconstructionRecord | None]:
        """Train a block, for which `advance` was called. Neither stream moves.

        Args:
            new_index: New position of the block. The smaller stream is before it.
            tensors: Its tensors by relative name, in their stored dtypes.

        Returns:
            The tensors of the trained block, and what the training did. For a block that is not
            trained, the tensors as they are, and None.
        """
        if new_index < self._first:
            return dict(tensors), None
        skeleton = self._smaller.skeleton
        walk = self._walks[self._smaller.made_from[new_index]]
        block = skeleton.fill(new_index, tensors, self._stream.device)
        linears = [linear.name for linear in skeleton.linears(new_index)]
        trained = [*linears, *(name for name in self._routers(new_index) if name not in linears)]
        reconstruction = self._reconstructor.begin(new_index, block, trained, False, walk)
        if reconstruction is None:
            return dict(tensors), None
        with reconstruction.recording(self._stream.forward(new_index, block)) as forward:
            if reconstruction.suffix is not None:
                for batch in range(len(self._stream)):
                    forward(batch)
        changed, record = reconstruction.run(tensors, tensors)
        skeleton.release(new_index)
        return {**tensors, **changed}, record

    def _routers(self, new_index: int) -> list[str]:
        """Relative names of the modules whose weights have a row per remaining expert."""
        before = shapes_of(self._plan.skeleton.blocks[self._smaller.made_from[new_index]])
        return [
            name.removesuffix(".weight")
            for name, parameter in self._smaller.skeleton.blocks[new_index].named_parameters()
            if name.endswith(".weight")
            and parameter.dim() == 2
            and before.get(name, parameter.shape) != tuple(parameter.shape)
        ]
