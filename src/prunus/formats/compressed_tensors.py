"""Compress to the format of the package compressed-tensors, for vLLM and SGLang on GPUs.

A weight is value · scale: value is an integer of 4 or 8 bits, and a group of inputs of a row has a
scale. The result is a checkpoint folder with these tensors for each linear:

    weight_packed   int32 (O, I · bits / 32), from low to high bits, counted from the lowest value
    weight_scale    (O, S), of the dtype of the weight in the source
    weight_shape    int64, (O, I)

Shape suffixes: O outputs (rows), I inputs, B bytes of a row, S groups of a row, K bytes of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch

from prunus.formats.block_bytes import ONE, BlockType, Field, integers, scaled
from prunus.formats.cards import CardWords
from prunus.formats.codec import Codec
from prunus.formats.size_plan import Given, SizePlan, folder_plan
from prunus.hardware.words import in_bytes
from prunus.methods.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.model.config import dense_config
from prunus.model.linears import is_tied

# The kernels of vLLM know groups of these sizes. Fewer scales take fewer bits.
_GROUPS = (128, 64, 32)
# What configurations call the format.
_METHOD = "compressed-tensors"
# The bits that those kernels know, the smallest first.
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


def dense_weight(key: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight that `TensorsCodec.encode` has stored, float32 (O, I); its parts leave `tensors`.

    Args:
        key: The name of the weight.
        tensors: Tensors of a checkpoint by name.

    Raises:
        ValueError: The tensors do not belong together.
    """
    packed, scale_OS, shape = (
        tensors.pop(f"{key}_{part}", torch.empty(0)) for part in ("packed", "scale", "shape")
    )
    rows, columns = shape.tolist() if shape.shape == (2,) else (0, 0)
    spans = scale_OS.shape[-1] if scale_OS.shape == (rows, *scale_OS.shape[1:2]) else 0
    bits = next((x for x in _BITS if packed.shape == (rows, columns * x // 32)), 0)
    of_types = packed.dtype == torch.int32 and scale_OS.dtype.is_floating_point
    # Rows end with a word, and consist of whole groups.
    if not (bits and spans and rows and of_types) or columns % 8 or columns % spans:
        raise ValueError(
            f"{key} is not stored as integers of 4 or 8 bits with a scale for each group of inputs"
        )
    lowest = -(2 ** (bits - 1))
    return scaled(packed.view(torch.uint8), bits, scale_OS, scale_OS.float() * lowest)


class TensorsCodec(Codec):
    """A checkpoint folder in this format. All linears have the same bits."""

    PROGRAMS: ClassVar[dict[str, str]] = {
        "prunus": 'prunus generate OUT --prompt "Hello"',
        "vLLM": "vllm serve OUT",
    }

    @classmethod
    def plan(cls, given: Given) -> SizePlan:
        """All linears, in the bits that are asked for or the most with which the files fit.

        Embeddings and head stay as they are.
        """
        recipe = given.recipe
        lower = "name the output OUT.gguf for a GGUF file, or choose `format` mlx"
        given.refuse_gguf_options(takes_nearest=True)
        if recipe.bits is not None and recipe.bits not in _BITS:
            raise ValueError(
                f"a folder of format compressed-tensors stores linears in 4 or 8 bits: for "
                f"{recipe.bits:g} bits {lower}"
            )
        if recipe.head_bits not in (None, "none"):
            raise ValueError(
                "compressed-tensors keeps embeddings and head as they are: leave `head_bits` out"
            )
        linears = given.linears
        given.check_widths(list(linears), _GROUPS[-1])
        # The largest number that divides the width of each linear.
        widths = [linear.shape[1] for linear in linears.values()]
        group = next(x for x in _GROUPS if not any(width % x for width in widths))

        def planned(bits: int) -> SizePlan:
            weights = [
                given.typed(name, [integer_type(bits, group, given.scale_dtype(name))])
                for name in linears
            ]
            words = CardWords(
                f"with its linears in {bits} bits and a scale for each {group} inputs of a row "
                f"(W{bits}A16), in the format of the package compressed-tensors. The folder is for "
                "vLLM and SGLang, and for transformers with the package compressed-tensors.",
                cls.PROGRAMS,
                ["compressed-tensors", f"{bits}-bit"],
            )
            return folder_plan(given, weights, cls.encode, words=words, configure=_config)

        if recipe.size is None:
            return planned(int(recipe.bits or _BITS[0]))
        plans = [planned(bits) for bits in _BITS]
        if (least := plans[0].file_bytes()) > recipe.size:
            raise ValueError(
                f"{in_bytes(recipe.size)} is not possible: the files take {in_bytes(least)} with "
                f"linears in {_BITS[0]} bits, the fewest that compressed-tensors has. For less, "
                f"{lower}"
            )
        return [plan for plan in plans if plan.file_bytes() <= recipe.size][-1]

    @staticmethod
    def encode(key: str, weight: GroupedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The three tensors of a linear, see the top of this file; scales have its dtype."""
        quantizer = weight.quantizer
        assert isinstance(quantizer, IntegerType)
        scale_OS, values_OB = quantizer.separate(weight.data_OB)
        rows, spans = scale_OS.shape
        return {
            f"{key}_packed": values_OB.view(torch.int32),
            f"{key}_scale": scale_OS.to(dtype),
            f"{key}_shape": torch.tensor([rows, spans * quantizer.span]),
        }

    @staticmethod
    def decode(
        key: str, tensors: dict[str, torch.Tensor], quantizer: GroupQuantizer
    ) -> torch.Tensor:
        """The dense weight of a linear; its three tensors leave `tensors`."""
        return dense_weight(key, tensors)


def _config(plan: SizePlan, kinds: Mapping[str, GroupQuantizer]) -> Mapping[str, object]:
    """The config.json of the source, with how its linears are quantised."""
    source, model = plan.given.source, plan.given.skeleton.model
    # A tied head is not stored. Engines take other matrices for linears too, such as routers.
    head = model.get_output_embeddings()
    dense = [name for name, module in model.named_modules() if module is head]
    rounded = set(map(source.weight_key, kinds))
    for key, info in source.checkpoint.tensors.items():
        if key.endswith(".weight") and len(info.shape) == 2 and key not in rounded:
            dense.append(key.removesuffix(".weight"))
    kind = next(iter(kinds.values()))
    bits = int(math.log2(len(kind.values)))
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": kind.group, "dynamic": False}
    described = {
        "quant_method": _METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted(set(dense)),
    }
    config = dense_config(source.checkpoint.folder)
    # A head that is stored with other numbers than the embedding is tied by vLLM all the same.
    tied = {"tie_word_embeddings": False} if not is_tied(model) else {}
    return {**config, **tied, "quantization_config": described}
