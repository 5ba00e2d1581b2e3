"""What is known of one block while it is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from prunus.model.linears import Linear
from prunus.packed.weight import QuantizedWeight
from prunus.pruning.block.dense_stream import DenseBlockInputs
from prunus.pruning.block.expert_tokens import ExpertCounter
from prunus.pruning.reconstruction.reconstruct_block import BlockReconstruction
from prunus.pruning.records import BlockRecord, LinearRecord, ReconstructionRecord
from prunus.runs.record import Walk


@dataclass(frozen=True)
class FinishedBlock:
    """What was made of a block.

    Attributes:
        changed: the pruned tensors by relative name, in their stored dtype and orientation.
        packed: the linears that a compressed checkpoint stores as integers, by relative name.
        record: what the manifest says about the block.
    """

    changed: dict[str, torch.Tensor]
    packed: dict[str, QuantizedWeight]
    record: BlockRecord


@dataclass
class BlockState:
    """One block while it is pruned.

    Attributes:
        index: position of the block.
        name: of the block in the model.
        stored: its dense tensors by relative name, in the checkpoint's dtypes.
        digest: SHA-256 of `stored`.
        module: the block with its weights in place.
        linears: the linears to prune.
        walk: how the windows go through it.
        expert_counters: of its experts modules.
        dense_inputs: inputs of the dense block, if the run needs them.
        reconstruction: of this block, or None.
        changed: the finished tensors by relative name, as far as they differ from `stored`.
        records: of the linears, by relative name.
        packed: the linears that a compressed checkpoint stores as integers, by relative name.
        reconstructed: the record of the reconstruction.
    """

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
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    records: dict[str, LinearRecord] = field(default_factory=dict)
    packed: dict[str, QuantizedWeight] = field(default_factory=dict)
    reconstructed: ReconstructionRecord | None = None

    @property
    def finished(self) -> dict[str, torch.Tensor]:
        """All tensors of the block by relative name, as far as they are pruned."""
        return {**self.stored, **self.changed}

    def result(self, ranks: int) -> FinishedBlock:
        """The finished block; the seconds of its record are still missing."""
        record = BlockRecord(
            name=self.name,
            input_sha256=self.digest,
            walk=self.walk,
            ranks=ranks,
            linears={linear.name: self.records[linear.name] for linear in self.linears},
            reconstruction=self.reconstructed,
        )
        return FinishedBlock(self.changed, self.packed, record)
