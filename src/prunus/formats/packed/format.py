"""The packed format: a folder that transformers loads where prunus is installed.

The linears are integers in an entropy code from the first shard on, so they take any number of
bits. `prunus.runtime` decodes and multiplies them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from prunus.engine.folder import BlockFolder
from prunus.engine.linear_record import LinearRecord
from prunus.formats.base import RateFormat
from prunus.formats.cards import compressed_card
from prunus.formats.packed.quantize_rows import BYTES_PER_QUANTIZED_WEIGHT, quantize_rows
from prunus.formats.records import CompressionRecord
from prunus.hardware.errors import naming
from prunus.hardware.sizes import in_bytes
from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.reader import TensorInfo
from prunus.model.checkpoint.writer import Writable, file_nbytes
from prunus.model.kinds import kind_of
from prunus.runtime.description import Description, QuantizedShape
from prunus.runtime.forms import checked_weight, expand
from prunus.runtime.weight import QuantizedWeight, named_tensors

# The most bits per weight of linears.
_MOST_BITS = 7.0
# The least that `size` may ask for is this much above the bits of zeros, where nearly all weights
# are 0.
_ABOVE_LEAST = 0.1


def side_bits(shape: tuple[int, int]) -> float:
    """The bits per weight of steps, scales and classes.

    Args:
        shape: (out, in) of the linear.

    >>> round(side_bits((1536, 576)), 4)
    0.0434
    """
    rows, columns = shape
    return (16 * rows + (16 + 8) * columns) / (rows * columns)


def zero_bits(sparsity: float) -> float:
    """The bits per weight that say which weights a mask keeps: the entropy of a coin.

    Args:
        sparsity: The share of weights that the mask removes, from 0 to 1.

    >>> zero_bits(0.5)
    1.0
    """
    return sum(-share * math.log2(share) for share in (sparsity, 1 - sparsity) if 0 < share < 1)


class PackedFormat(RateFormat):
    """A checkpoint folder with packed linears, embeddings and head."""

    PROGRAMS: ClassVar[dict[str, str]] = {
        "prunus": 'prunus generate OUT --prompt "Hello"',
        "a server": "prunus serve OUT",
    }

    def check(self) -> None:
        """Check that bits or size can be reached.

        Raises:
            ValueError: They cannot, or an option belongs to another format.
        """
        self.refuse_gguf_options()
        # If all weights were zeros, a linear would still take a bit plane, steps, scales, classes.
        shapes = [linear.shape for linear in self.job.selected_linears().values()]
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

    @functools.cached_property
    def bits(self) -> float:
        """Bits per weight of the linears: those asked for, or about what `size` leaves for them."""
        if self.recipe.bits is not None:
            return self.recipe.bits
        return self.bits_next_to(file_nbytes(self.shards(8.0)[0]))

    def bits_next_to(self, outside: int) -> float:
        """What `size` leaves for the linears, in bits per weight, next to `outside` bytes."""
        assert self.recipe.size is not None
        # With fewer bits the headers are not longer.
        weights, blocks = sum(self.weights.values()), map(file_nbytes, self.shards(8.0)[1:])
        return 8 * (1 + (self.recipe.size - outside - sum(blocks)) / weights)

    def parts(self, key: str, info: TensorInfo, bits: float) -> dict[str, Any]:
        """The tensors of a packed weight, without contents."""
        rows, columns = info.shape
        data = round((bits - side_bits((rows, columns))) * rows * columns / 8)
        parts = QuantizedShape(rows, columns, max(1, data), (), 1).tensors(None)
        return {f"{_linear(key)}.{part}": x for part, x in parts.items()}

    def peak_bytes(self) -> int:
        """Bytes of memory while embedding or head is quantised."""
        # Embedding and head are quantised before the first block is read.
        tensors = self.job.checkpoint.checkpoint.tensors
        sizes = [math.prod(tensors[key].shape) for key in self.packed_outside]
        return BYTES_PER_QUANTIZED_WEIGHT * max(sizes, default=0)

    def tensors_of(self, key: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors of a packed linear; see `Format.tensors_of`."""
        return named_tensors(_linear(key), weight)

    def weight_from(
        self, key: str, tensors: dict[str, torch.Tensor], record: LinearRecord, dtype: torch.dtype
    ) -> torch.Tensor:
        """The dense weight of a linear; its tensors leave `tensors`."""
        linear = _linear(key)
        described = Description.of_linears({linear: record.packed or {}})
        weight, offsets = checked_weight(described, linear, tensors)
        for part in described.tensors(linear):
            del tensors[part]
        return expand(weight, dtype, offsets)

    def outside(
        self, folder: BlockFolder, record: CompressionRecord, tensors: dict[str, Writable]
    ) -> dict[str, Writable]:
        """The tensors outside the blocks, with packed embedding and head.

        The record gets their descriptions, and is saved.
        """
        bits = self.recipe.packs_head or 0
        for key, copies in self.packed_outside.items():
            with naming(key):
                weight = quantize_rows(self.job.checkpoint.checkpoint.whole(key), bits)
            for name in (key, *copies):
                del tensors[name]
            tensors |= named_tensors(_linear(key), weight)
            record.packed_outside[_linear(key)] = QuantizedShape.of(weight).to_json()
        # The shard is written next. A run that is killed between the two writes it again.
        folder.save()
        return tensors

    def card(self, record: CompressionRecord) -> str:
        """The README.md of the folder."""
        source = self.job.checkpoint
        return compressed_card(record, kind_of(source.config).loader, source.checkpoint.folder)

    def config(self, record: CompressionRecord) -> Mapping[str, object]:
        """The config.json of the source, with a description of every packed weight."""
        entries = dict(record.packed_outside)
        for block in record.blocks:
            for name, linear in block.linears.items():
                if linear.packed is not None:
                    key = self.job.stored_key(f"{block.name}.{name}")
                    entries[_linear(key)] = linear.packed
        source = self.job.checkpoint.checkpoint.folder
        return Description.of_linears(entries).add_to(read_json(source / "config.json"))


def _linear(key: str) -> str:
    """The name of a linear in the file, from the stored name of its weight."""
    return key.removesuffix(".weight")
