"""A checked run of compress: what can be packed, the bytes of the result, and the memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from prunus.compression.loss_sensitivity import PROBE_TOKENS, PROBE_WINDOWS, part_width
from prunus.compression.output import embedding_and_head
from prunus.compression.rate_control import side_bits
from prunus.compression.recipe import CompressionRecipe
from prunus.compression.record import CompressionRecord
from prunus.hardware.memory import resident_memory
from prunus.methods.statistics import statistics_bytes
from prunus.model.kinds import require_causal
from prunus.model.linears import Linear
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.pruning.job import LinearSelection, PruningJob
from prunus.pruning.manifest import PruningRecord
from prunus.pruning.reconstruction.reconstruct_block import activation_bytes
from prunus.runs.job import BlockMemory

# A tensor's entry in the header of a shard, without its name.
_HEADER_BYTES = 75
# What a quantised weight has besides its data: classes, steps and scales.
_PARTS = 4


@dataclass(kw_only=True)
class CompressionJob(PruningJob):
    """The decisions of one run of compress."""

    RECORD: ClassVar[type[PruningRecord]] = CompressionRecord
    QUANTIZES: ClassVar[bool] = True

    recipe: CompressionRecipe

    @classmethod
    def select(
        cls, found: LinearSelection, source: CheckpointSource | ModuleSource, skeleton: Skeleton
    ) -> LinearSelection:
        if isinstance(source, ModuleSource):
            raise ValueError(
                "a compressed model is a packed checkpoint: give the folder of a checkpoint "
                "instead of a loaded model"
            )
        require_causal(source.config, "prunus compress")
        return _packable(found, skeleton, source)

    def check(self) -> None:
        # If all weights were zeros, a linear would still take a bit plane, steps, scales, classes.
        shapes = [linear.shape for linear in self.selected_linears().values()]
        weights = [rows * columns for rows, columns in shapes]
        least = sum(
            (1 + side_bits(shape)) * count for shape, count in zip(shapes, weights, strict=True)
        ) / sum(weights)
        if self.recipe.bits <= least:
            raise ValueError(
                f"bits = {self.recipe.bits:g} cannot be reached: if all weights were 0, the "
                f"linears of this model would take {least:.2f} bits per weight with their steps "
                "and scales. Give more"
            )
        measured, held = self._measuring_bytes(), resident_memory()
        if self.budget < measured:
            raise ValueError(
                "measuring how the loss depends on each linear needs "
                f"{(measured + held) / 1e9:.2f} GB; the memory budget is "
                f"{(self.budget + held) / 1e9:.2f} GB. Raise `memory`"
            )

    def describe(self) -> dict[str, object]:
        return {"bits": self.recipe.bits, "head_bits": self.recipe.head_bits}

    def file_bytes(self) -> int:
        # The rate control spends the bits that the recipe asks for, so they say what linears take.
        checkpoint = self.checkpoint.checkpoint
        bits = dict.fromkeys(self.selected_linears(), self.recipe.bits)
        if self.recipe.head_bits is not None:
            bits |= dict.fromkeys(embedding_and_head(self.skeleton.model), self.recipe.head_bits)
        total = float(checkpoint.nbytes(checkpoint.tensors))
        total += sum(len(name) + _HEADER_BYTES for name in checkpoint.tensors)
        for name, each in bits.items():
            key = self.checkpoint.stored[f"{name}.weight"]
            total += math.prod(checkpoint.tensors[key].shape) * each / 8 - checkpoint.nbytes([key])
            total += (_PARTS - 1) * (len(key) + _HEADER_BYTES)
        return round(total)

    def peak_bytes(self) -> int:
        return max(super().peak_bytes(), self._measuring_bytes())

    def _measuring_bytes(self) -> int:
        """Memory of the pass that measures how the loss depends on each linear, in bytes."""
        return self.measuring_memory().total(hidden=self.device.type == "cpu", paused=False)

    def measuring_memory(self) -> BlockMemory:
        """The same by purpose. The entry `hidden` are the inputs of all blocks, on the host."""
        skeleton, itemsize = self.skeleton, self.dtype.itemsize
        blocks, length = range(len(skeleton)), min(PROBE_TOKENS, self.recipe.seqlen)
        tokens = min(PROBE_WINDOWS, self.recipe.samples) * length
        hidden = skeleton.window_shape(0, self.recipe.seqlen)[1]
        linears = [skeleton.linears(index) for index in blocks]
        widest = max(max(linear.shape) for block in linears for linear in block)
        parameters = max(
            sum(p.numel() for p in skeleton.blocks[index].parameters()) for index in blocks
        )
        heads = int(getattr(self.source.config.get_text_config(), "num_attention_heads", 1) or 1)
        activations = activation_bytes(tokens, length, hidden, widest, heads, itemsize)
        # The head sees one window at a time: its logits, their logarithms, and the gradients of
        # both.
        vocabulary = skeleton.vocabulary
        logits = vocabulary * (hidden * itemsize + 16 * length)
        return BlockMemory(
            weights=max(map(self.source.block_nbytes, blocks)) + parameters * itemsize,
            working=max(map(_statistics_bytes, linears)),
            hidden=len(blocks) * tokens * hidden * itemsize,
            paused=0,
            transient=2 * tokens * hidden * itemsize + max(activations, logits),
        )


def _packable(
    found: LinearSelection, skeleton: Skeleton, source: CheckpointSource
) -> LinearSelection:
    """The part of a selection that a compressed checkpoint can store as integers.

    The rest stays dense: transposed linears, linears of special classes, and experts that the
    checkpoint stores in one tensor.
    """
    stored = source.stored
    kept: list[list[str]] = []
    left_dense = dict(found.left_dense)
    for index, names in enumerate(found.selected):
        kept.append([])
        for linear in skeleton.linears(index):
            if linear.name not in names:
                continue
            full_name = f"{skeleton.block_name(index)}.{linear.name}.weight"
            own = stored.get(full_name, "").endswith(".weight")
            if own and type(linear.module) is nn.Linear:
                kept[-1].append(linear.name)
            else:
                left_dense[full_name] = linear.shape
    if not any(kept):
        raise NotImplementedError(
            "none of the chosen linears can be stored as integers: they are transposed, special, "
            "or experts in one tensor; such a checkpoint cannot be compressed yet"
        )
    return LinearSelection(kept, left_dense)


def _statistics_bytes(linears: Sequence[Linear]) -> int:
    """Bytes of the Gram matrices of a block's linears, one for each part of their inputs."""
    part = part_width(linears)
    return sum(
        statistics_bytes(min(part, linear.shape[1] - start), "gram")
        for linear in linears
        for start in range(0, linear.shape[1], part)
    )
