"""A checked run of compress: its linears, its bits, and the bytes of its result."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from prunus.compression.file_size import embedding_and_head, file_size
from prunus.compression.quantize_rows import BYTES_PER_QUANTIZED_WEIGHT
from prunus.compression.rate_control import side_bits, zero_bits
from prunus.compression.records import CompressionRecipe, CompressionRecord
from prunus.hardware.sizes import in_bytes
from prunus.model.checkpoint.reader import TensorInfo
from prunus.model.checkpoint.writer import file_nbytes
from prunus.model.kinds import require_causal
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.packed.description import QuantizedShape
from prunus.pruning.job import LinearSelection, PruningJob
from prunus.pruning.manifest import PruningRecord

# The most bits per weight of linears. The least that `size` may ask for is this much above the bits
# of zeros, where nearly all weights are 0.
_MOST_BITS, _ABOVE_LEAST = 7.0, 0.1


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

    @functools.cached_property
    def weights(self) -> dict[str, int]:
        """Stored name of the weight of each linear to compress -> how many numbers it has."""
        stored, linears = self.checkpoint.stored, self.selected_linears()
        return {stored[f"{name}.weight"]: math.prod(x.shape) for name, x in linears.items()}

    @functools.cached_property
    def packed_outside(self) -> dict[str, list[str]]:
        """`embedding_and_head`, as far as the recipe packs them."""
        packs = self.recipe.packs_head is not None
        return embedding_and_head(self.skeleton.model, self.checkpoint.stored) if packs else {}

    @functools.cached_property
    def bits(self) -> float:
        """Bits per weight of the linears: those asked for, or about what `size` leaves for them."""
        if self.recipe.bits is not None:
            return self.recipe.bits
        return self.bits_next_to(file_nbytes(self.shards(8.0)[0]))

    def bits_next_to(self, outside: int) -> float:
        """The bits per weight that `size` leaves if the shard outside the blocks has this size."""
        assert self.recipe.size is not None
        # With fewer bits the headers are not longer.
        weights, blocks = sum(self.weights.values()), map(file_nbytes, self.shards(8.0)[1:])
        return 8 * (1 + (self.recipe.size - outside - sum(blocks)) / weights)

    def shards(self, bits: float) -> list[dict[str, Any]]:
        """What lies outside the blocks, and each block: name -> something with shape and dtype."""
        source = self.checkpoint
        copies = {key for keys in self.packed_outside.values() for key in keys}
        outside = [key for key in source.outside_keys() if key not in copies]
        blocks = map(source.block_keys, range(len(self.skeleton)))
        packed = dict.fromkeys(self.weights, bits)
        packed |= dict.fromkeys(self.packed_outside, float(self.recipe.packs_head or 0))
        shards: list[dict[str, Any]] = []
        for keys in (outside, *blocks):
            shards.append({})
            for key in keys:
                info = source.checkpoint.tensors[key]
                shards[-1] |= self.parts(key, info, packed[key]) if key in packed else {key: info}
        return shards

    def parts(self, key: str, info: TensorInfo, bits: float) -> dict[str, Any]:
        """The tensors that store the weight `key` in this many bits: name -> shape and dtype."""
        rows, columns = info.shape
        data = round((bits - side_bits((rows, columns))) * rows * columns / 8)
        parts = QuantizedShape(rows, columns, max(1, data), (), 1).tensors(None)
        return {f"{key.removesuffix('.weight')}.{part}": each for part, each in parts.items()}

    def bytes_at(self, bits: float) -> int:
        """Bytes of all files with weights if the linears take `bits` bits per weight."""
        return sum(map(file_nbytes, self.shards(bits)))

    def check(self) -> None:
        if self.recipe.type is not None or self.recipe.template is not None:
            raise ValueError(
                "`type` and `template` belong to GGUF files: give the output a name that ends in "
                ".gguf, or leave them out"
            )
        # If all weights were zeros, a linear would still take a bit plane, steps, scales, classes.
        shapes = [linear.shape for linear in self.selected_linears().values()]
        side = sum(side_bits(shape) * math.prod(shape) for shape in shapes)
        least = 1 + side / sum(self.weights.values())
        if self.recipe.bits is not None and self.recipe.bits > _MOST_BITS:
            raise ValueError(f"bits = {self.bits:g} is too much: give at most {_MOST_BITS:g}")
        if self.recipe.bits is not None and self.recipe.bits <= least:
            raise ValueError(
                f"bits = {self.bits:g} cannot be reached: if all weights were 0, the "
                f"linears of this model would take {least:.2f} bits per weight with their steps "
                "and scales. Give more"
            )
        sparsity, size = self.recipe.sparsity, self.recipe.size
        if size is None:
            return
        most = _MOST_BITS * (1 - sparsity) + zero_bits(sparsity)
        smallest, largest = map(self.bytes_at, (least + _ABOVE_LEAST, most))
        if not smallest <= size <= largest:
            raise ValueError(
                f"size = {in_bytes(size)} is not possible: the file takes {in_bytes(smallest)} to "
                f"{in_bytes(largest)} ({smallest:,} to {largest:,} bytes), of which "
                f"{in_bytes(file_nbytes(self.shards(1.0)[0]))} are embeddings, head and norms; "
                "see `head_bits`"
            )

    def refuse_zeros(self, what: str) -> None:
        """Refuse to force zeros in a format that stores them as all other weights."""
        if self.recipe.forces_zeros:
            raise ValueError(
                f"{what} stores zeros as all other weights: leave `sparsity` and `pattern` out, or "
                "write a packed checkpoint, whose zeros take fewer bits"
            )

    def describe(self) -> dict[str, object]:
        tensors = {key: each for shard in self.shards(self.bits) for key, each in shard.items()}
        file = file_size(self.checkpoint, self.skeleton.model, tensors, self.file_bytes())
        head_bits = self.recipe.head_bits if self.packed_outside else "none"
        return {"bits": self.bits, "head_bits": head_bits, "file": file.model_dump()}

    def peak_bytes(self) -> int:
        # Embedding and head are quantised before the first block is read.
        tensors = self.checkpoint.checkpoint.tensors
        sizes = [math.prod(tensors[key].shape) for key in self.packed_outside]
        return max(super().peak_bytes(), BYTES_PER_QUANTIZED_WEIGHT * max(sizes, default=0))

    def file_bytes(self) -> int:
        # The rate control spends the bits that the recipe asks for, so they say what linears take.
        return self.bytes_at(self.bits)


def _packable(
    found: LinearSelection, skeleton: Skeleton, source: CheckpointSource
) -> LinearSelection:
    """The part of a selection that a compressed checkpoint can store as integers."""
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
