"""Compress to the format of MLX, which mlx-lm and LM Studio run on Macs.

A weight is scale · integer + bias: the integer has 2 to 8 bits, and a group of inputs of a row has
a scale and a bias. The result is a checkpoint folder with these tensors for each weight that has a
type, where NAME is the module:

    NAME.weight   uint32 (O, I · bits / 32): the integers of a row, from low to high bits, without
                  gaps, so that some reach from one word into the next
    NAME.scales   (O, S), bfloat16 or float16
    NAME.biases   (O, S), of the same dtype

config.json has bits and size of the groups of every module, since each has its own.

Shape suffixes: O outputs (rows), I inputs, B bytes of a row, S groups of a row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prunus.engine.linear_record import LinearRecord
from prunus.formats.base import MixFormat
from prunus.formats.block_bytes import ONE, BlockType, Field, from_stream
from prunus.formats.cards import mlx_card
from prunus.formats.records import CompressionRecord, FileSize
from prunus.methods.group_quantizer import GroupedWeight
from prunus.model.checkpoint.atomic_files import make_folder, read_json, write_json
from prunus.model.checkpoint.output_folder import auxiliary_files, copy_companion
from prunus.model.checkpoint.reader import SINGLE_NAME, Checkpoint, TensorInfo
from prunus.model.checkpoint.writer import file_nbytes, save_safetensors
from prunus.model.device import DTYPES

#: Model types whose weights mlx-lm takes under the names that transformers gives them, with each
#: linear by itself. tests/compression/test_mlx.py compares every one with mlx-lm.
FAMILIES = frozenset({"llama"})
# The numbers of bits and of columns of a group that MLX has kernels for; the smallest weight first.
_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (128, 64, 32)


class AffineType(BlockType):
    """Integers with a scale and a bias for each group, stored as scale, bias and integers."""

    @property
    def width(self) -> int:
        """The bits of an integer."""
        return self.layout[-1].bits


def affine_type(bits: int, group: int, dtype: torch.dtype) -> AffineType:
    """Integers from 0 on, with a scale and a bias for each group of columns.

    Args:
        bits: Of an integer, from 2 to 8.
        group: The number of columns that share a scale.
        dtype: The dtype of scales and biases, of two bytes.

    >>> affine_type(4, 64, torch.bfloat16).bits
    4.5
    """
    layout = (Field("d"), Field("-dmin"), Field("levels", bits, 0))
    name, values = f"{bits}bit-g{group}", tuple(range(2**bits))
    return AffineType(name, group, group, values, ONE, layout, dtype=dtype)


def stored_parts(key: str, weight: GroupedWeight) -> dict[str, torch.Tensor]:
    """The tensors of a weight by name, see the top of this file.

    Args:
        key: The name under which the source stores the weight.
        weight: The weight, quantised by an `affine_type`.
    """
    assert isinstance(weight.quantizer, BlockType)
    scales_OS, biases_OS, integers_OB = weight.quantizer.separate(weight.data_OB)
    path = _module(key)
    return {
        key: integers_OB.view(torch.uint32),
        f"{path}.scales": scales_OS,
        f"{path}.biases": biases_OS,
    }


def dense_weight(key: str, tensors: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    """The weight of `stored_parts`, float32 (O, I); its tensors leave `tensors`.

    Args:
        key: The name of the weight.
        tensors: Tensors of a checkpoint by name.
        group: The number of columns that share a scale.

    Raises:
        ValueError: The tensors do not belong together, or are of another mode than affine.
    """
    names = key, f"{_module(key)}.scales", f"{_module(key)}.biases"
    packed, scales_OS, biases_OS = (tensors.pop(name, torch.empty(0)) for name in names)
    columns = group * scales_OS.shape[-1]
    bits = 32 * packed.shape[-1] / max(1, columns)
    fits = packed.dtype == torch.uint32 and scales_OS.shape == biases_OS.shape
    if not fits or bits not in _BITS or packed.shape[:-1] != scales_OS.shape[:-1] or not columns:
        raise ValueError(
            f"{key} is not stored as integers with a scale and a bias for each {group} columns: "
            "give a model of mode affine, without experts in one tensor"
        )
    integers_OI = from_stream(packed.view(torch.uint8), int(bits)).float()
    groups_OSC = integers_OI.unflatten(1, (-1, group))
    return groups_OSC.mul_(scales_OS[..., None]).add_(biases_OS[..., None]).flatten(1)


class MlxFormat(MixFormat):
    """A checkpoint folder in this format."""

    owns = staticmethod(Path.is_dir)

    @staticmethod
    def unpack(
        path: Path,
        dest: Path,
        *,
        overwrite: bool = False,
        dtype: str | None = "bfloat16",
        progress: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Write the weights of a result as a plain checkpoint. The whole model is in memory.

        Other programs' results can be read as well. See `CompressedFormat.unpack`; `dtype` None
        keeps that of the scales.

        Raises:
            ValueError: A weight is stored in another way.
        """
        source, config = Checkpoint(path), read_json(path / "config.json")
        described = config.pop("quantization")
        config.pop("quantization_config", None)
        tensors = dict(source.read(source.tensors))
        for scales in [name for name in tensors if name.endswith(".scales")]:
            module, stored = scales.removesuffix(".scales"), tensors[scales].dtype
            entry = described.get(module)
            group = int((entry if isinstance(entry, dict) else described)["group_size"])
            weight_OI = dense_weight(f"{module}.weight", tensors, group)
            tensors[f"{module}.weight"] = weight_OI.to(DTYPES[dtype] if dtype else stored)
        make_folder(dest)
        for file in auxiliary_files(path):
            copy_companion(file, dest / file.name)
        save_safetensors(dest / SINGLE_NAME, tensors)
        write_json(dest / "config.json", config)
        return {"tensors": len(tensors)}

    @staticmethod
    def read_record(path: Path) -> CompressionRecord | None:
        """The record in a folder; None if prunus did not make it."""
        made = (path / CompressionRecord.FILE).exists()
        return CompressionRecord.load(path) if made else None

    @staticmethod
    def stored_types(path: Path) -> dict[str, tuple[str, float]]:
        """The types of the weights of a folder that prunus made; empty for others."""
        record = MlxFormat.read_record(path)
        types = {} if record is None else record.types
        bits = {x.name: x.bits for x in _types(torch.bfloat16)}
        return {name: (kind, bits[kind]) for name, kind in types.items()}

    def check(self) -> None:
        """Check family, options, widths, and that types reach the bits or the size.

        Raises:
            ValueError: The format cannot do what the recipe asks for.
        """
        family = self.job.checkpoint.config.model_type
        if family not in FAMILIES:
            raise ValueError(
                f"mlx-lm takes no compressed weights of the family {family} under the names of "
                "this checkpoint: write a GGUF file or a packed checkpoint instead, or one of "
                f"{', '.join(sorted(FAMILIES))}"
            )
        self.refuse_types()
        self.refuse_zeros("an MLX checkpoint")
        self.check_widths(_GROUPS[-1])
        self.check_reach("an MLX checkpoint")

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Module of each weight with a type -> the shape of the weight."""
        tensors = self.job.checkpoint.checkpoint.tensors
        return {name: tensors[key].shape for key, name in self.module_of.items()}

    def quantizers(self, name: str) -> list[AffineType]:
        """The types whose groups fill the width, smallest first; `head_bits` may name the bits."""
        key = self.job.stored_key(name)
        columns = self.shapes[name][1]
        fixed = "head_bits" in self.recipe.model_fields_set and name in self.modules_outside
        bits = [self.recipe.packs_head] if fixed else _BITS
        types = _types(self.scale_dtype(key))
        return [x for x in types if columns % x.span == 0 and x.width in bits]

    def parts(self, key: str, info: TensorInfo, bits: float) -> dict[str, Any]:
        """The tensors of a weight, without contents, of its type; of its largest before a choice.

        `bits` is ignored: the type says it.
        """
        name = self.module_of[key]
        quantizer = self.quantizer(name) if self.types else self.quantizers(name)[-1]
        size = info.shape[0], quantizer.nbytes_of(info.shape[1])
        data_OB = torch.empty(size, dtype=torch.uint8, device="meta")
        return stored_parts(key, GroupedWeight(quantizer, data_OB))

    @functools.cached_property
    def others(self) -> int:
        """The bytes of all else, with headers as long as those of the largest types."""
        return sum(map(file_nbytes, self.shards(0))) - self.reach[1]

    def describe(self) -> dict[str, object]:
        """The size of the files and what takes it, for a plan."""
        source = self.job.checkpoint.checkpoint
        count = sum(math.prod(info.shape) for info in source.tensors.values())
        sizes = source.file_bytes(), self.file_bytes()
        return {"file": FileSize.of(*sizes, count, self.planned_parts()).model_dump()}

    def tensors_of(self, key: str, weight: GroupedWeight) -> dict[str, torch.Tensor]:
        """The three tensors of a weight; see `Format.tensors_of`."""
        return stored_parts(key, weight)

    def weight_from(
        self, key: str, tensors: dict[str, torch.Tensor], record: LinearRecord, dtype: torch.dtype
    ) -> torch.Tensor:
        """The dense weight of a linear; its three tensors leave `tensors`."""
        return dense_weight(key, tensors, self.quantizer(self.module_of[key]).group).to(dtype)

    def card(self, record: CompressionRecord) -> str:
        """The README.md of the folder."""
        return mlx_card(record, self.job.checkpoint.checkpoint.folder)

    def config(self, record: CompressionRecord) -> Mapping[str, object]:
        """The config.json of the source, with bits and groups of every module."""
        source, config = self.job.checkpoint, self.job.skeleton.model.config
        described: dict[str, object] = {"group_size": 64, "bits": 4, "mode": "affine"}
        for key, name in sorted(self.module_of.items()):
            quantizer = self.quantizer(name)
            assert isinstance(quantizer, AffineType)
            bits, group = quantizer.width, quantizer.group
            described[_module(key)] = {"group_size": group, "bits": bits, "mode": "affine"}
        return read_json(source.checkpoint.folder / "config.json") | {
            # mlx-lm has defaults of its own where the file does not say it.
            "tie_word_embeddings": bool(config.tie_word_embeddings),
            "quantization": described,
            "quantization_config": described,
        }


@functools.cache
def _types(dtype: torch.dtype) -> tuple[AffineType, ...]:
    """All types with scales of a dtype, the smallest first."""
    return tuple(affine_type(bits, group, dtype) for bits in _BITS for group in _GROUPS)


def _module(key: str) -> str:
    """The name of a module, from the stored name of its weight."""
    return key.removesuffix(".weight")
