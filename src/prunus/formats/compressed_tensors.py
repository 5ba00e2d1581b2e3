"""Compress to the format of the package compressed-tensors, for vLLM and SGLang on GPUs.

A weight is value · scale: value is an integer of 4 or 8 bits, and a group of inputs of a row has a
scale. The result is a checkpoint folder with these tensors for each linear:

    weight_packed   int32 (O, I · bits / 32), from low to high bits, counted from the lowest value
    weight_scale    (O, S), of the dtype of the weight in the source
    weight_shape    int64, (O, I)

Shape suffixes: O outputs (rows), I inputs, B bytes of a row, S groups of a row, K bytes of a group.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from prunus.engine.linear_record import LinearRecord
from prunus.formats.base import TypeFormat
from prunus.formats.block_bytes import ONE, BlockType, Field, integers, scaled
from prunus.formats.cards import quantized_card
from prunus.formats.records import CompressionRecord
from prunus.methods.group_quantizer import GroupedWeight
from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.linears import is_tied

# The kernels of vLLM know groups of these sizes. Fewer scales take fewer bits.
_GROUPS = (128, 64, 32)
# The bits that those kernels know.
_BITS = (4, 8)


class IntegerType(BlockType):
    """Integers with a scale for each group, stored as the group's scale and its integers."""

    def zero_point(self, numbers: tuple[float, ...]) -> int:
        """Always 0."""
        # The package stores all integers counted from the lowest on.
        return 0


def integer_type(bits: int, group: int, dtype: torch.dtype) -> IntegerType:
    """The integers of 4 or 8 bits with a scale for each group of columns.

    Args:
        bits: 4 or 8.
        group: The number of columns that share a scale.
        dtype: The dtype of scales, of two bytes.

    >>> integer_type(4, 128, torch.bfloat16).bits
    4.125
    """
    layout = (Field("d"), Field("levels", bits, 1))
    return IntegerType(f"W{bits}A16", group, group, integers(bits), ONE, layout, dtype=dtype)


def stored_parts(key: str, weight: GroupedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a weight by name, see the top of this file.

    Args:
        key: The name under which the source stores the weight.
        weight: The weight, quantised by an `IntegerType`.
        dtype: The dtype of the weight in the source, which its scales get.
    """
    quantizer = weight.quantizer
    assert isinstance(quantizer, IntegerType)
    scale_OS, values_OB = quantizer.separate(weight.data_OB)
    rows, spans = scale_OS.shape
    return {
        f"{key}_packed": values_OB.view(torch.int32),
        f"{key}_scale": scale_OS.to(dtype),
        f"{key}_shape": torch.tensor([rows, spans * quantizer.span]),
    }


class TensorsFormat(TypeFormat):
    """A checkpoint folder in this format. All linears have the same bits."""

    PROGRAMS: ClassVar[dict[str, str]] = {"vLLM": "vllm serve OUT"}

    def check_readable(self) -> None:
        """Check that transformers can load the result, which takes the package of the format."""
        if importlib.util.find_spec("compressed_tensors") is None:
            raise ModuleNotFoundError(
                "scoring the result needs the package compressed-tensors: install it, or leave "
                "--check out"
            )

    def check(self) -> None:
        """Check bits, masks, head and widths.

        Raises:
            ValueError: The format cannot do what the recipe asks for.
        """
        recipe = self.recipe
        if recipe.bits not in _BITS or recipe.template is not None:
            raise ValueError(
                "compressed-tensors stores linears in 4 or 8 bits: give `bits` 4 or 8, and leave "
                "`size`, `type` and `template` out"
            )
        self.refuse_zeros("compressed-tensors")
        if "head_bits" in recipe.model_fields_set and recipe.packs_head:
            raise ValueError(
                "compressed-tensors keeps embeddings and head as they are: leave `head_bits` out"
            )
        self.check_widths(_GROUPS[-1])

    @functools.cached_property
    def group(self) -> int:
        """Inputs with a common scale: the largest number that divides the width of each linear."""
        widths = [linear.shape[1] for linear in self.job.selected_linears().values()]
        return next(x for x in _GROUPS if not any(width % x for width in widths))

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each linear -> (out, in). Embeddings and head stay as they are."""
        return {name: linear.shape for name, linear in self.job.selected_linears().items()}

    def quantizers(self, name: str) -> list[IntegerType]:
        """The only quantiser of a linear."""
        return [integer_type(int(self.recipe.bits or 0), self.group, self.scale_dtype(name))]

    @property
    def packed_outside(self) -> dict[str, list[str]]:
        """Nothing: engines expect embeddings and head as they are."""
        return {}

    def tensors_of(self, key: str, weight: GroupedWeight) -> dict[str, torch.Tensor]:
        """The three tensors of a linear; see `Format.tensors_of`."""
        return stored_parts(key, weight, self.job.checkpoint.checkpoint.tensors[key].dtype)

    def weight_from(
        self, key: str, tensors: dict[str, torch.Tensor], record: LinearRecord, dtype: torch.dtype
    ) -> torch.Tensor:
        """The dense weight of a linear; its three tensors leave `tensors`."""
        packed, scale_OS, _ = (tensors.pop(f"{key}_{x}") for x in ("packed", "scale", "shape"))
        bits = int(self.recipe.bits or 0)
        lowest = -(2 ** (bits - 1))
        return scaled(packed.view(torch.uint8), bits, scale_OS, scale_OS.float() * lowest).to(dtype)

    def card(self, record: CompressionRecord) -> str:
        """The README.md of the folder."""
        bits = f"{record.recipe.bits:g}"
        return quantized_card(
            record,
            "compressed",
            f"with its linears in {bits} bits and a scale for each {self.group} inputs of a row "
            f"(W{bits}A16), in the format of the package compressed-tensors. The folder is for "
            "vLLM and SGLang. transformers loads it where compressed-tensors is installed.",
            self.commands(Path("FOLDER")),
            tags=["compressed-tensors", f"{bits}-bit"],
            source=self.job.checkpoint.checkpoint.folder,
        )

    def config(self, record: CompressionRecord) -> Mapping[str, object]:
        """The config.json of the source, with how its linears are quantised."""
        source, model = self.job.checkpoint.checkpoint, self.job.skeleton.model
        # A tied head is not stored. Engines take other matrices for linears too, such as routers.
        head = model.get_output_embeddings()
        dense = [name for name, module in model.named_modules() if module is head]
        for key, info in source.tensors.items():
            if key.endswith(".weight") and len(info.shape) == 2 and key not in self.weights:
                dense.append(key.removesuffix(".weight"))
        weights = {"num_bits": int(self.recipe.bits or 0), "type": "int", "symmetric": True}
        weights |= {"strategy": "group", "group_size": self.group, "dynamic": False}
        described = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": sorted(set(dense)),
        }
        config = read_json(source.folder / "config.json")
        # A head that is stored with other numbers than the embedding is tied by vLLM all the same.
        tied = {"tie_word_embeddings": False} if not is_tied(model) else {}
        return {**config, **tied, "quantization_config": described}
