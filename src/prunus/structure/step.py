"""The step that makes the blocks of a smaller model, one after the other.

    measure ► choose what is removed ► cut ► repair ► run the windows through the result

The hidden states are those of the smaller model. So every block is measured on what will reach it.

Experts are chosen first. Then the windows run to the linear that reads the heads (`o`), whose heads
are chosen and whose remaining columns are fitted. Then they run to the one that reads the channels
of the MLP (`down`), after the smaller attention. In a mixture of experts these are all experts at
once, each on the tokens that chose it.

A block has an old position in the source (`old_index`) and a new one in the result (`new_index`).
Names of tensors and linears are relative to their block, such as `mlp.down_proj.weight`.

Shape suffixes: O outputs, I inputs, E experts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from prunus.distributed import Ranks, own_part, split_range
from prunus.engine.block.hooks import input_hooks, tokens_of
from prunus.engine.linear_job import training_dtype
from prunus.engine.linear_record import ReconstructionRecord
from prunus.engine.loop import FinishedBlock, StoredBlock, check_same
from prunus.engine.reconstruction.reconstruct_block import (
    BlockReconstructor,
    ReconstructionSettings,
    step_parts,
    step_ranks,
)
from prunus.engine.record import Walk
from prunus.methods.solvers.least_squares import ridge
from prunus.methods.statistics import InputStatistics, StatisticsSpec
from prunus.methods.structured import ExpertSums, Reader, columns_of, kept_experts
from prunus.model.experts import Experts
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.structure.layout import axis_that_changes, cut, experts_in, old_names, shapes_of
from prunus.structure.plan import SmallerModel, StructureJob
from prunus.structure.records import BlockChange, ExpertChange, PartChange
from prunus.structure.width_layout import KeptUnits, PartLayout
from prunus.structure.width_plan import HeadPlan


class ShrinkStep:
    """Makes one block after the other: a `BlockStep`. Call `take` or `make` for each in order.

    Args:
        job: The checked run.
        smaller: The model that is made.
        ids: Calibration windows of all ranks, (windows, tokens).
        walks: For each old block, how the ranks take their batches through it.
        spill_to: Folder for a file of hidden states, if they do not stay in memory.
        ranks: The processes of the run.
    """

    def __init__(
        self,
        job: StructureJob,
        smaller: SmallerModel,
        ids: Tensor,
        walks: Sequence[Walk],
        spill_to: Path,
        ranks: Ranks,
    ) -> None:
        self._job = job
        self._smaller = smaller
        self._ranks = ranks
        self._stream = Stream(smaller.skeleton, job.source, job.device)
        self._repair: Repair | None = None
        self._open = contextlib.ExitStack()
        self._open.callback(self._stream.close)
        # Without repair, a removed block changes no other. Only experts and width need windows.
        batches = ids.split(job.batch) if job.measures_blocks else ()
        batches_of_rank = own_part(ranks, batches)
        on_device = job.memory.hidden_states_stay
        spill_folder = spill_to if job.memory.spills else None
        if not job.recipe.repair:
            self._stream.embed(batches_of_rank, spill_folder, on_device)
            return
        split = step_ranks(ranks, max(map(len, batches)), job.device)
        self._stream.embed(batches_of_rank, spill_folder, on_device, step_parts(batches, split))
        dense = Stream(job.skeleton, job.source, job.device)
        self._open.callback(dense.close)
        dense.embed(batches_of_rank, spill_folder, on_device)
        reconstructor = BlockReconstructor(
            settings=ReconstructionSettings(None, training_dtype(job.device, job.dtype)),
            stream=self._stream,
            dense=dense,
            numbers=range(len(dense)),
            counts=[len(part) for part in split_range(len(batches), ranks.size)],
            ranks=ranks,
            split=split,
        )
        self._repair = Repair(job, smaller, reconstructor, walks)

    def take(self, new_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Run the windows through a block that an earlier run has finished.

        Args:
            new_index: New position of the block.
            tensors: Its tensors in the result, by relative name.
        """
        if self._repair is not None:
            self._repair.advance(new_index)
        self._stream.propagate(new_index, tensors)

    def make(self, new_index: int, stored: StoredBlock) -> FinishedBlock:
        """Make the block `new_index` of the result, and run the windows through it.

        Args:
            new_index: New position of the block.
            stored: The old block that it is made from.

        Raises:
            RankError: The ranks have made different bytes.
        """
        if self._repair is not None:
            self._repair.advance(new_index)
        tensors, change = self._cut(new_index, stored)
        seconds = change.seconds
        if self._repair is not None:
            tensors, change.repair = self._repair.train(new_index, tensors)
            seconds += change.repair.seconds if change.repair is not None else 0.0
        check_same(self._ranks, change.name, tensors)
        self._stream.propagate(new_index, tensors)
        message = f"made from block {change.made_from} in {seconds:.2f} s"
        return FinishedBlock(tensors, change, message)

    def close(self) -> None:
        """Free the hidden states, on disk too."""
        self._open.close()

    def _cut(self, new_index: int, stored: StoredBlock) -> tuple[dict[str, Tensor], BlockChange]:
        """A block without what is removed from it: its tensors, and what happened to it."""
        job = self._job
        started = time.perf_counter()
        old_index = self._smaller.made_from[new_index]
        name = self._smaller.skeleton.block_name(new_index)
        change = BlockChange(name=name, made_from=old_index, input_sha256=stored.digest)
        tensors = dict(stored.tensors)
        mixtures = experts_in(job.skeleton.blocks[old_index]) if job.experts is not None else []
        if mixtures:  # `plan_structure` refuses blocks with more than one
            change.experts = self._choose_experts(new_index, old_index, tensors, mixtures[0])
            experts_kept = change.experts.kept
            shapes = shapes_of(job.full_width.blocks[old_index])
            tensors = {
                new: cut(
                    tensors[old], axis_that_changes(tensors[old].shape, shapes[new]), experts_kept
                )
                for new, old in old_names(
                    job.skeleton.blocks[old_index], shapes, experts_kept
                ).items()
            }
        if job.width is not None:
            tensors, change.width = narrow(
                job, self._ranks, self._stream, new_index, old_index, tensors
            )
        change.seconds = round(time.perf_counter() - started, 3)
        return tensors, change

    def _choose_experts(
        self, new_index: int, old_index: int, stored: Mapping[str, Tensor], experts: Experts
    ) -> ExpertChange:
        """Choose the experts of a block that stay, on all windows.

        The stream stays before the block, because the block that it runs through is smaller.
        """
        job = self._job
        stream = self._stream
        plan = job.experts
        assert plan is not None
        sums = ExpertSums(plan.count)
        forward = stream.forward(new_index, job.skeleton.fill(old_index, stored, stream.device))
        experts.on_output = sums.add
        try:
            for batch in range(len(stream)):
                forward(batch)
        finally:
            experts.on_output = None
        job.skeleton.release(old_index)
        sums.complete(self._ranks)
        saliency_E = sums.reap_E if job.recipe.saliency == "reap" else sums.contribution_E
        return ExpertChange(
            kept=kept_experts(saliency_E, plan.keep, plan.groups),
            saliency=saliency_E.tolist(),
            tokens=sums.tokens_E.tolist(),
        )


def narrow(
    job: StructureJob,
    ranks: Ranks,
    stream: Stream,
    new_index: int,
    old_index: int,
    stored: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, PartChange]]:
    """Make one block narrower.

    Args:
        job: The checked run, which has a plan of the width.
        ranks: The processes of the run.
        stream: The windows of the smaller model. They are before the block, and stay there.
        new_index: New position of the block.
        old_index: Old position of the block.
        stored: The tensors of the block at full width, by relative name, with only the experts
            that stay.

    Returns:
        The tensors of the narrower block, and what became narrower (`BlockChange.width`).
    """
    full = job.full_width
    plan = job.width
    assert plan is not None
    layout = plan.attention[old_index]
    block = full.fill(old_index, stored, stream.device)
    linears = {linear.name: linear for linear in full.linears(old_index)}
    tensors = dict(stored)
    change: dict[str, PartChange] = {}
    # All cuts come at the end, so that the block runs at full width until then.
    cuts: list[tuple[PartLayout, KeptUnits]] = []
    if plan.heads is not None and layout is not None:
        linear = linears[layout.reader]
        (reader,) = _measured(stream, new_index, block, [linear], ranks)
        heads = _keep_heads(reader, plan.heads, layout.read.width)
        change["heads"] = _fit(linear, tensors, reader, heads, layout.read.width)
        per_group = plan.heads.heads // plan.heads.groups
        groups = sorted({head // per_group for head in heads})
        cuts.append((layout, {"heads": heads, "groups": groups}))
    for parts in _at_once(plan.mlps[old_index], job.memory.budget):
        down = [linears[part.reader] for part in parts]
        readers = _measured(stream, new_index, block, down, ranks)
        for part, linear, reader in zip(parts, down, readers, strict=True):
            channels = reader.keep(part.read.units, 1, part.keep)
            name = part.reader if len(plan.mlps[old_index]) > 1 else "channels"
            change[name] = _fit(linear, tensors, reader, channels, 1)
            cuts.append((part, {"channels": channels}))
    full.release(old_index)
    for part, units in cuts:
        for name, axis_cut in part.cuts.items():
            tensors[name] = cut(tensors[name], axis_cut.axis, axis_cut.entries(units))
    return tensors, change


def _at_once(parts: Sequence[PartLayout], budget: int) -> list[Sequence[PartLayout]]:
    """Parts whose Gram matrices fit in a quarter of the memory budget together, or single ones."""
    # Bytes of a float32 Gram matrix. Only a shared expert has another number of channels.
    largest = max((4 * part.read.units**2 for part in parts), default=1)
    count = max(1, budget // 4 // largest)
    return [parts[first : first + count] for first in range(0, len(parts), count)]


def _measured(
    stream: Stream, new_index: int, block: nn.Module, linears: Sequence[Linear], ranks: Ranks
) -> list[Reader]:
    """Measure the inputs of some linears; those of an expert are the tokens that chose it."""
    spec = StatisticsSpec(needs="gram", means=True, distributed=ranks.size > 1)
    statistics = {
        linear.name: InputStatistics(linear.shape[1], spec, stream.device) for linear in linears
    }
    forward = stream.forward(new_index, block)
    with input_hooks(linears, lambda linear, x: statistics[linear.name].add(tokens_of(x))):
        for batch in range(len(stream)):
            forward(batch)
    for name, inputs in statistics.items():
        inputs.complete(ranks)
        inputs.check_finite(f"{stream.skeleton.block_name(new_index)}.{name}")
    return [_reader(linear, statistics.pop(linear.name)) for linear in linears]


def _reader(linear: Linear, statistics: InputStatistics) -> Reader:
    """A linear with its measured inputs, on the CPU, where units are chosen and columns fitted."""
    gram_II = statistics.gram_II
    sum_I = statistics.sum_I
    assert gram_II is not None and sum_I is not None
    weight_OI = linear.weight_OI.to("cpu", torch.float32, copy=True)
    reader = Reader(weight_OI, gram_II.cpu(), ridge(statistics.in_features, statistics.tokens))
    bias = linear.module.bias
    if not isinstance(bias, Tensor):
        return reader
    bias_O = bias.detach().to("cpu", torch.float32, copy=True)
    return reader.with_bias(bias_O, sum_I.cpu(), statistics.tokens)


def _keep_heads(reader: Reader, plan: HeadPlan, size: int) -> list[int]:
    """The numbers of the query heads that stay.

    Whole groups are removed first, and then heads of the groups that stay, as many from each. A
    head has `size` inputs of the reader.
    """
    per_group = plan.heads // plan.groups
    groups = reader.keep(plan.groups, per_group * size, plan.keep_groups)
    if plan.keep_heads == plan.keep_groups * per_group:
        return [group * per_group + i for group in groups for i in range(per_group)]
    # The rest is scored anew, after the least-squares fit to it.
    bias = range(plan.heads * size, len(reader.gram_II))
    rest = reader.only([*columns_of(groups, per_group * size), *bias])
    left = rest.keep(len(groups) * per_group, size, plan.keep_heads, plan.keep_groups)
    return [groups[head // per_group] * per_group + head % per_group for head in left]


def _fit(
    linear: Linear, tensors: dict[str, Tensor], reader: Reader, units: list[int], width: int
) -> PartChange:
    """Fit the columns of a linear that stay, in the block and in its tensors.

    Both keep their full width: what is removed is 0 until it is cut.

    Args:
        linear: The linear in the block; its weight is overwritten.
        tensors: The tensors of the block by name; those of the linear are replaced.
        reader: The same linear with its measured inputs.
        units: The numbers of the channels or heads that stay.
        width: How many inputs a unit has.
    """
    weight_OI = reader.weight_OI
    inputs = linear.shape[1]
    # A bias is one more column, after those of the inputs, and always stays.
    columns = [*columns_of(units, width), *range(inputs, weight_OI.shape[1])]
    fitted_OI = reader.fit(columns)
    plain_OI = torch.zeros_like(weight_OI)
    plain_OI[:, columns] = weight_OI[:, columns]
    new_OI = fitted_OI[:, :inputs]
    new = {f"{linear.name}.weight": new_OI.T if linear.transposed else new_OI}
    linear.assign(new_OI.to(linear.parameter.device))
    if isinstance(bias := linear.module.bias, Tensor):
        new[f"{linear.name}.bias"] = fitted_OI[:, -1]
        bias.copy_(fitted_OI[:, -1])
    for name, tensor in new.items():
        tensors[name] = tensor.to(tensors[name].dtype).contiguous()
    errors = {"error": reader.error(fitted_OI), "error_before_fit": reader.error(plain_OI)}
    return PartChange(kept=units, **errors)


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
        job: The checked run.
        smaller: The model that is made.
        reconstructor: Trains blocks on the windows of the smaller model and of the old one.
        walks: For each old block, how the ranks take their batches through it.
    """

    def __init__(
        self,
        job: StructureJob,
        smaller: SmallerModel,
        reconstructor: BlockReconstructor,
        walks: Sequence[Walk],
    ) -> None:
        self._job = job
        self._smaller = smaller
        self._reconstructor = reconstructor
        self._stream = reconstructor.stream
        self._walks = walks
        self._depth = 0  # old blocks that the dense windows have run through
        # The first block to train. Those before it see and compute what they did in the old model.
        count = len(smaller.made_from)
        self._first = next((index for index in range(count) if self._changes(index)), count)

    def advance(self, new_index: int) -> None:
        """Run the windows through the dense model, up to the output that the block learns.

        This is the input of the old block that the next new block is made from.
        """
        end = [*self._smaller.made_from, len(self._job.skeleton)][new_index + 1]
        for index in range(self._depth, end):
            self._reconstructor.dense.propagate(index, self._job.source.block(index))
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
        reconstruction = self._reconstructor.begin(new_index, block, trained, walk)
        if reconstruction is None:
            return dict(tensors), None
        with reconstruction.recording(self._stream.forward(new_index, block)) as forward:
            if reconstruction.suffix is not None:
                for batch in range(len(self._stream)):
                    forward(batch)
        changed, record = reconstruction.run(tensors, tensors)
        skeleton.release(new_index)
        return {**tensors, **changed}, record

    def _changes(self, new_index: int) -> bool:
        """Whether a block lost parts, or was next to a removed block."""
        every = [-1, *self._smaller.made_from, len(self._job.skeleton)]
        before, index, after = every[new_index : new_index + 3]
        return (before, after) != (index - 1, index + 1) or bool(self._smaller_tensors(new_index))

    def _smaller_tensors(self, new_index: int) -> set[str]:
        """Relative names of the tensors that have lost rows or columns, or were removed."""
        before = shapes_of(self._job.skeleton.blocks[self._smaller.made_from[new_index]])
        after = shapes_of(self._smaller.skeleton.blocks[new_index])
        return {name for name, shape in before.items() if after.get(name) != shape}

    def _routers(self, new_index: int) -> list[str]:
        """Relative names of the modules whose weights have a row per remaining expert."""
        if self._job.experts is None:
            return []
        smaller = self._smaller_tensors(new_index)
        return [
            name.removesuffix(".weight")
            for name, parameter in self._smaller.skeleton.blocks[new_index].named_parameters()
            if name in smaller and name.endswith(".weight") and parameter.dim() == 2
        ]
