"""Compress to the format of the package compressed-tensors, for vLLM and SGLang on GPUs.

A weight is value · scale, and a group of inputs of a row has a scale. The result is a checkpoint
folder. If values are integers of 2 to 8 bits, it has these tensors for each linear:

    weight_packed   int32 (O, I · bits / 32), counted from the lowest value: a stream from low to
                    high bits, so that some values reach from one word into the next
    weight_scale    (O, S), of the dtype of the weight in the source
    weight_shape    int64, (O, I)

If they are the sixteen values of FP4:

    weight_packed        uint8 (O, I / 2), the first of two values in the low bits
    weight_scale         MXFP4: uint8 (O, S), the exponent of a power of two, plus 127
                         NVFP4: float8_e4m3fn (O, S), what is divided by the global scale
    weight_global_scale  NVFP4 alone: float32 (1,)

Programs join some linears to one, such as query, key and value. These have one type.

Shape suffixes: O outputs (rows), I inputs, B bytes of a row, S groups of a row, K bytes of a group.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch

from prunus.formats.block_bytes import FP4, FP4_ORDER, ONE, BlockType, Field, integers, scaled
from prunus.formats.codec import Codec
from prunus.model.checkpoint.quantized import FP4_BY_CODE
from prunus.rounding.cards import CardWords
from prunus.rounding.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.rounding.size_plan import PlanRequest, SizePlan, folder_plan

# The kernels of vLLM know groups of these sizes. Fewer scales take fewer bits.
_GROUPS = (128, 64, 32)
# What configurations call the format, and how linears of integers are stored in it.
_METHOD, _PACKED = "compressed-tensors", "pack-quantized"
# The bits of integers, and those that Marlin knows: all linears have them if `bits` is one of them.
_BITS, _UNIFORM = (2, 3, 4, 5, 6, 7, 8), (4, 8)
# The types of FP4 -> the columns that share a scale.
_FP4_GROUPS = {"NVFP4": 16, "MXFP4": 32}
# Names of linears that programs join to one, each with those that it joins.
_JOINED = {
    name: names
    for names in (
        ("q_proj", "k_proj", "v_proj"),
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("gate_proj", "up_proj"),
        ("w1", "w3"),
        ("in_proj_qkv", "in_proj_z"),
        ("in_proj_b", "in_proj_a"),
    )
    for name in names
}
# Weights of NVFP4 times the global scale are below two to this power. So scales down to a 600th
# of the largest are as exact, and feedback may make the largest weight ten times as large.
_REACH = 7


class PackedType(BlockType):
    """Values with a scale for each group, stored as the group's scale and the values' integers."""

    def zero_point(self, numbers: tuple[float, ...]) -> int:
        """Always 0."""
        # The package stores all integers counted from the lowest on.
        return 0


def integer_type(bits: int, group: int, dtype: torch.dtype, name: str = "") -> PackedType:
    """The integers of some bits with a scale for each group of columns.

    Args:
        bits: From 2 to 8.
        group: The number of columns that share a scale.
        dtype: The dtype of scales, of two bytes.
        name: The name of the type; empty for that of its bits alone.

    >>> integer_type(4, 128, torch.bfloat16).bits
    4.125
    """
    layout = (Field("d"), Field("levels", bits, 0))
    name = name or f"W{bits}A16"
    return PackedType(name, group, group, integers(bits), ONE, layout, dtype=dtype)


def fp4_type(name: str, largest: float = 1.0) -> PackedType:
    """NVFP4 or MXFP4.

    The code of every group is 1 / the global scale, which is a power of two: so all weights are
    exact in bfloat16.

    Args:
        name: The name of the type.
        largest: The largest magnitude of the weights that share the global scale.

    >>> fp4_type("NVFP4").bits, fp4_type("MXFP4").bits
    (4.5, 4.25)
    """
    group, dtype, code = _FP4_GROUPS[name], torch.float8_e8m0fnu, 1.0
    if name == "NVFP4":
        # Scales of weights that are nearly zero stay in the range of float32.
        dtype, code = torch.float8_e4m3fn, 2.0 ** (max(math.frexp(largest)[1], -100) - _REACH)
    layout = (Field("d", 8), Field("levels", 4, 0))
    return PackedType(name, group, group, FP4, (code, code), layout, dtype=dtype, order=FP4_ORDER)


class TensorsCodec(Codec):
    """A checkpoint folder in this format."""

    SCALES = ("MODULE.weight_scale",)
    PROGRAMS: ClassVar[dict[str, str]] = {
        "prunus": 'prunus generate OUT --prompt "Hello"',
        "vLLM": "vllm serve OUT",
    }

    @classmethod
    def plan(cls, request: PlanRequest) -> SizePlan:
        """All linears, in one type that is asked for, or in those of least loss for the size.

        Embeddings and head stay as they are.

        Raises:
            ValueError: An option is for other formats, widths are no whole groups, linears that
                programs join would have several types, or the types do not reach the bits or the
                size.
        """
        recipe, linears = request.recipe, request.linears
        request.refuse_gguf_options(takes_nearest=True, types=_FP4_GROUPS)
        if recipe.head_bits not in (None, "none"):
            raise ValueError(
                "compressed-tensors keeps embeddings and head as they are: leave `head_bits` out"
            )
        request.check_widths(list(linears), _FP4_GROUPS.get(recipe.type or "", _GROUPS[-1]))
        is_uniform = recipe.bits in _UNIFORM
        sets = _joined(request, splits=is_uniform)
        of_all = _groups_of(request, linears)

        def types_of(names: Sequence[str]) -> list[PackedType]:
            """The types of linears that have one together, the smallest first."""
            dtype = request.scale_dtype(names[0])
            if recipe.type is not None:
                weights = (request.source.weight(f"{name}.weight") for name in names)
                largest = max(float(weight.abs().max()) for weight in weights)
                return [fp4_type(recipe.type, largest)]
            if is_uniform:
                return [integer_type(int(recipe.bits or 0), of_all[0], dtype)]
            groups = _groups_of(request, names)
            return [
                integer_type(bits, group, dtype, f"W{bits}A16-g{group}")
                for bits in _BITS
                for group in groups
            ]

        weights = []
        for names in sets:
            # Scales are two bytes longer if the checkpoint is stored in float32.
            beyond = request.source.weight_dtype(names[0]).itemsize - 2
            weights.append(request.typed(names, types_of(names), beyond))
        if recipe.type is not None:
            what = f"{recipe.type}, FP4 with a scale for each {_FP4_GROUPS[recipe.type]} inputs"
            tags = [recipe.type.lower()]
        elif is_uniform:
            what = f"{recipe.bits:g} bits and a scale for each {of_all[0]} inputs of a row"
            what, tags = f"{what} (W{recipe.bits:g}A16)", [f"{recipe.bits:g}-bit"]
        else:
            what = "{bits} bits per weight: each has the bits (2 to 8) and groups of least loss"
            tags = []
        words = CardWords(
            f"with its linears in {what}, in the format of the package compressed-tensors. The "
            "folder is for vLLM and SGLang, and for transformers with the package "
            "compressed-tensors.",
            cls.PROGRAMS,
            ["compressed-tensors", *tags],
        )
        result = None if len(weights[0].quantizers) == 1 else "a compressed-tensors folder"
        return folder_plan(
            request, weights, cls.encode, result, words=words, configure=_config, by_inputs=True
        )

    @staticmethod
    def encode(key: str, weight: GroupedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of a linear, see the top of this file; scales of integers have its dtype."""
        quantizer = weight.quantizer
        assert isinstance(quantizer, PackedType)
        scale_OS, values_OB = quantizer.separate(weight.data_OB)
        if quantizer.values != FP4:
            rows, spans = scale_OS.shape
            return {
                f"{key}_packed": values_OB.view(torch.int32),
                f"{key}_scale": scale_OS.to(dtype),
                f"{key}_shape": torch.tensor([rows, spans * quantizer.span]),
            }
        packed = {f"{key}_packed": values_OB}
        if quantizer.dtype == torch.float8_e8m0fnu:
            return packed | {f"{key}_scale": scale_OS.view(torch.uint8)}
        return packed | {
            f"{key}_scale": scale_OS,
            f"{key}_global_scale": torch.tensor([1 / quantizer.codes[0]]),
        }

    @staticmethod
    def decode(
        key: str, tensors: dict[str, torch.Tensor], quantizer: GroupQuantizer
    ) -> torch.Tensor:
        """The dense weight of a linear; its tensors leave `tensors`."""
        packed, scale_OS = tensors.pop(f"{key}_packed"), tensors.pop(f"{key}_scale")
        tensors.pop(f"{key}_shape", None)
        bits, lowest = int(math.log2(len(quantizer.values))), quantizer.values[0]
        if quantizer.values != FP4:
            return scaled(packed.view(torch.uint8), bits, scale_OS, scale_OS.float() * lowest)
        factor = tensors.pop(f"{key}_global_scale", torch.ones(1))
        scale_OS = scale_OS.view(quantizer.dtype).float() / factor
        return scaled(packed, bits, scale_OS, torch.zeros_like(scale_OS), FP4_BY_CODE)


def _joined(request: PlanRequest, splits: bool) -> list[list[str]]:
    """The linears that are compressed; those that programs join are together.

    Experts of a block are joined with each other.

    Args:
        request: What is planned for.
        splits: Whether some of those that programs join may be compressed without the others.

    Raises:
        ValueError: They would be, and must not.
    """
    skeleton, sets = request.skeleton, defaultdict[str, list[str]](list)
    for index in range(len(skeleton)):
        for linear in skeleton.linears(index):
            name = f"{skeleton.block_name(index)}.{linear.name}"
            parent, _, leaf = name.rpartition(".")
            experts, is_expert, _ = name.partition(".experts.")
            sets[experts if is_expert else f"{parent}.{_JOINED.get(leaf, leaf)}"].append(name)
    chosen = []
    for names in sets.values():
        some = [name for name in names if name in request.linears]
        if len(some) not in (0, len(names)) and not splits:
            other = next(name for name in names if name not in request.linears)
            raise ValueError(
                f"vLLM and SGLang join {some[0]} and {other}, which need one type, and only the "
                "first would be compressed: let `ignore` match both or none"
            )
        chosen += [some] if some else []
    return chosen


def _groups_of(request: PlanRequest, names: Iterable[str]) -> list[int]:
    """The sizes of groups that divide the widths of all these linears, the largest first."""
    widths = [request.linears[name].shape[1] for name in names]
    return [x for x in _GROUPS if not any(width % x for width in widths)]


def _config(plan: SizePlan, kinds: Mapping[str, GroupQuantizer]) -> Mapping[str, object]:
    """The config.json of the source, with how its linears are rounded."""
    source, weights = plan.request.source, plan.request.skeleton.vocabulary_weights
    # A tied head is not stored. Engines take other matrices for linears too, such as routers.
    dense = [] if weights.head is None else [weights.head.name]
    rounded = set(map(source.weight_key, kinds))
    for key, info in source.checkpoint.tensors.items():
        if key.endswith(".weight") and len(info.shape) == 2 and key not in rounded:
            dense.append(key.removesuffix(".weight"))
    # Of each type the names of its linears, as the checkpoint has them too.
    targets, by_name = defaultdict[str, set[str]](set), dict[str, GroupQuantizer]()
    for name, kind in kinds.items():
        by_name[kind.name] = kind
        targets[kind.name] |= {name, source.weight_key(name).removesuffix(".weight")}
    groups = {
        f"group_{number}": {
            "targets": sorted(targets[name]) if len(by_name) > 1 else ["Linear"],
            "weights": _arguments(by_name[name]),
        }
        for number, name in enumerate(sorted(by_name))
    }
    stored = next(iter(by_name))
    described = {
        "quant_method": _METHOD,
        "format": f"{stored.lower()}-{_PACKED}" if stored in _FP4_GROUPS else _PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(dense)),
    }
    return {
        **source.folder.dense_config,
        # A head that is stored with other numbers than the embedding is tied by vLLM all the same.
        **({} if weights.is_tied else {"tie_word_embeddings": False}),
        "quantization_config": described,
    }


def _arguments(kind: GroupQuantizer) -> dict[str, object]:
    """What configurations say of a type, in the words of the package."""
    bits = int(math.log2(len(kind.values)))
    of_all = {"symmetric": True, "strategy": "group", "group_size": kind.group, "dynamic": False}
    if kind.name not in _FP4_GROUPS:
        return {"num_bits": bits, "type": "int", **of_all}
    of_scales = (
        {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        if kind.dtype == torch.float8_e4m3fn
        else {"scale_dtype": "torch.uint8"}
    )
    return {"num_bits": bits, "type": "float", **of_all, **of_scales}
