"""Where a run puts what it has changed: a new checkpoint folder, or the loaded model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prunus.distributed import on_rank_0
from prunus.engine.block.linear import LinearRounding
from prunus.engine.folder import BlockFolder
from prunus.engine.linear_plan import LinearPlan, Storage
from prunus.engine.linear_record import LinearsRecord
from prunus.engine.loop import FinishedBlock
from prunus.engine.result import MEASUREMENT, Result
from prunus.methods.statistics import InputStatistics
from prunus.model.checkpoint.card import keep_records, manifest_text
from prunus.model.checkpoint.files import remove
from prunus.model.checkpoint.tensor_files import Checkpoint, Writable
from prunus.model.source import ModuleSource


@dataclass(frozen=True)
class Rounding:
    """How a run rounds weights and stores them, which is decided before its first block.

    Attributes:
        of: How each linear is rounded.
        encode: From the full name of a linear and its weight as its type stores it to the tensors
            of a shard.
        decode: From the full name of a linear and the tensors of a shard, which lose those of this
            linear, to the dense weight.
        outside: From the tensors outside the blocks by stored name, and the inputs of the output
            head, to the tensors of their shard; None where they stay as they are.
        needs_head: Whether `outside` needs those inputs; it gets None otherwise.
        tune: Trains what rounding leaves open, when all shards are written; None leaves them as
            they are.
    """

    of: LinearRounding
    encode: Callable[[str, Any], dict[str, torch.Tensor]]
    decode: Callable[[str, dict[str, torch.Tensor]], torch.Tensor]
    outside: Callable[[dict[str, Writable], InputStatistics | None], dict[str, Writable]] | None
    needs_head: bool
    tune: Callable[[ShardFolder], None] | None = None


class InPlaceOutput:
    """The loaded model itself. Its weights change block by block, and no run can be resumed.

    Attributes:
        finished: 0, because no earlier run has finished a block.
        finished_seconds: 0 for the same reason.
    """

    def __init__(self, source: ModuleSource, record: LinearsRecord, storage: Storage) -> None:
        self.finished, self.finished_seconds = 0, 0.0
        self._source, self._record, self._storage = source, record, storage

    def read_block(self, position: int) -> Mapping[str, torch.Tensor]:
        """No block is finished: LookupError."""
        raise LookupError(f"no earlier run finished block {position} of a loaded model")

    def write_block(self, position: int, block: FinishedBlock) -> None:
        """Put the tensors of a block into the model, then enter the block in the record."""
        self._source.write(block.tensors, position)
        self._record.blocks.append(block.record)

    def complete(
        self, changed: Mapping[str, torch.Tensor], head: InputStatistics | None = None
    ) -> None:
        """Write tensors outside the blocks, by their names in the model, and keep the records."""
        self._source.write(changed)
        self._record.state = "finished"
        model = self._source.model
        name = str(getattr(model, "name_or_path", "") or self._record.source)
        named = self._record.model_copy(update={"source": name})
        text = manifest_text(named.model_dump(mode="json"))
        keep_records(model, {"README.md": self._storage.card(named), named.FILE: text})


class ShardFolder(BlockFolder):
    """A new folder of a run of prune or compress.

    No dense copy of a quantised linear is ever written.

    Args:
        record: The record of the run.
        plan: The run.
        result: What the folder becomes in the end.
        rounding: How weights are rounded and stored; None for plain tensors.
    """

    record: LinearsRecord
    plan: LinearPlan

    def __init__(
        self,
        record: LinearsRecord,
        plan: LinearPlan,
        result: Result[Any],
        rounding: Rounding | None,
    ) -> None:
        super().__init__(result.folder, record, plan)
        self.result, self.rounding = result, rounding

    def complete(
        self, changed: Mapping[str, torch.Tensor], head: InputStatistics | None = None
    ) -> None:
        """Complete the result.

        Args:
            changed: Tensors outside the blocks that replace those of the source, by their names.
            head: The inputs of the output head, if the rounding needs them.
        """

        def finish() -> None:
            self.write_outside(changed, head)
            if self.rounding is not None and self.rounding.tune is not None:
                self.rounding.tune(self)
            self.result.finish(self, self.plan)
            remove(self.folder / MEASUREMENT)

        on_rank_0(finish)

    def shard_tensors(self, position: int, block: FinishedBlock) -> dict[str, torch.Tensor]:
        """The tensors of a block's shard, with quantised linears as the format stores them."""
        rounded = {f"{name}.weight" for name in block.rounded}
        tensors = self.plan.checkpoint.as_stored(position, block.tensors, rounded)
        for name, weight in block.rounded.items():
            assert self.rounding is not None
            tensors |= self.rounding.encode(f"{block.record.name}.{name}", weight)
        return tensors

    def restored(self, position: int) -> dict[str, torch.Tensor]:
        """The tensors of a finished block by relative name, with quantised linears dense again."""
        shard = Checkpoint(self.folder, only=[self.record.shard(position)])
        return self.dense(position, dict(shard.read(shard.tensors)))

    def dense(self, position: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same from the tensors of the shard, which lose those of quantised linears."""
        block = self.record.blocks[position]
        for linear in block.linears if self.rounding is not None else ():
            assert self.rounding is not None
            name = f"{block.name}.{linear}"
            weight = self.rounding.decode(name, tensors).to(self.plan.checkpoint.weight_dtype(name))
            tensors[self.plan.checkpoint.weight_key(name)] = weight
        return self.plan.checkpoint.from_stored(position, tensors.items())

    def write_known(self) -> None:
        """Write what lies outside the blocks, if it is known before the first block."""
        # The hashes of what lies outside the blocks were taken just now, and embedding reads it
        # next. Copied now, it is read from the disk only once. A pruned head is not known yet.
        is_plain = self.rounding is None or self.rounding.outside is None
        if is_plain and not self.plan.recipe.extras.head:
            on_rank_0(lambda: self.write_outside({}))

    def write_outside(
        self, changed: Mapping[str, torch.Tensor], head: InputStatistics | None = None
    ) -> None:
        """Write the shard of everything outside the blocks, unless it is there and unchanged.

        Args:
            changed: Tensors that replace those of the source, by their names in the model.
            head: The inputs of the output head, if the rounding needs them.
        """
        source = self.plan.checkpoint
        keys = source.outside_keys()
        if keys and (changed or not self.has(self.record.outside_shard)):
            replaced = {source.stored_names[name]: tensor for name, tensor in changed.items()}
            # With little memory, cached pages of the written file would push out the pages that
            # were read for it and are needed again at once.
            uncached = 4 * source.checkpoint.nbytes(keys) > self.plan.memory.host_budget
            dense: dict[str, Writable] = {**source.checkpoint.file_tensors(keys), **replaced}
            if self.rounding is not None and self.rounding.outside is not None:
                dense = self.rounding.outside(dense, head)
            self.write_shard(self.record.outside_shard, dense, uncached=uncached)
            self.save()
