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

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from prunus.formats.block_bytes import ONE, BlockType, Field, scaled
from prunus.formats.codec import Codec
from prunus.formats.fixed import MLX, check_fixed
from prunus.rounding.cards import CardWords
from prunus.rounding.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.rounding.size_plan import PlanRequest, SizePlan, folder_plan
from prunus.words import name_patterns

#: Model types whose weights mlx-lm 0.32 takes under the names that transformers gives them, and as
#: they are -> the values of tie_word_embeddings with which it does. With the packages installed,
#: tests/compression/test_mlx.py compares every one with mlx-lm.
FAMILIES: dict[str, tuple[bool, ...]] = {
    **dict.fromkeys([
        "apertus", "gemma3_text", "glm", "granite", "llama", "mamba2", "ministral3", "mistral",
        "nemotron", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
    ], (False, True)),
    **dict.fromkeys(["cohere", "gemma", "gemma2"], (True,)),
    **dict.fromkeys(["phi", "seed_oss", "stablelm"], (False,)),
}  # fmt: skip
# The numbers of bits and of columns of a group that MLX has kernels for; the smallest weight first.
_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (128, 64, 32)


def affine_type(bits: int, group: int, dtype: torch.dtype) -> BlockType:
    """Integers from 0 on, with a scale and a bias for each group of columns.

    Args:
        bits: Of an integer, from 2 to 8.
        group: The number of columns that share a scale.
        dtype: The dtype of scales and biases, of two bytes.

    >>> affine_type(4, 64, torch.bfloat16).bits
    4.5
    """
    layout = (Field("levels", bits, 0), Field("d"), Field("-dmin"))
    name, values = f"{bits}bit-g{group}", tuple(range(2**bits))
    return BlockType(name, group, group, values, ONE, layout, dtype=dtype)


def dense_weight(
    key: str, tensors: dict[str, torch.Tensor], group: int, known: Collection[int] = _BITS
) -> torch.Tensor:
    """A weight that `MlxCodec.encode` has stored, float32 (O, I); `tensors` lose its parts.

    Args:
        key: The name of the weight.
        tensors: Tensors of a checkpoint by name.
        group: The number of columns that share a scale.
        known: The bits that it may have.

    Raises:
        ValueError: The tensors do not belong together, or are of another mode than affine.
    """
    packed, scales_OS, biases_OS = (tensors.pop(x, torch.empty(0)) for x in _names(key))
    columns = group * scales_OS.shape[-1]
    bits = 32 * packed.shape[-1] / max(1, columns)
    shapes = {tuple(scales_OS.shape), tuple(biases_OS.shape), (len(packed), columns // group)}
    if packed.dtype != torch.uint32 or bits not in known or len(shapes) > 1:
        raise ValueError(
            f"{key} is not stored as integers of {' or '.join(map(str, known))} bits with a scale "
            f"and a bias for each {group} columns, as config.json says: "
            "give a model of mode affine, without experts in one tensor"
        )
    return scaled(packed.view(torch.uint8), int(bits), scales_OS, biases_OS)


class MlxCodec(Codec):
    """A checkpoint folder in this format."""

    SCALES = ("MODULE.scales", "MODULE.biases")
    PROGRAMS: ClassVar[dict[str, str]] = {"mlx-lm": 'mlx_lm.generate --model OUT --prompt "Hello"'}

    @classmethod
    def plan(cls, request: PlanRequest) -> SizePlan:
        """All linears, the embedding and the head, in the bits of least loss for the size.

        Raises:
            ValueError: mlx-lm does not take the family, widths are no whole groups, or the types do
                not reach the bits or the size.
        """
        config = request.source.config
        tied = request.skeleton.vocabulary_weights.is_tied
        if tied not in FAMILIES.get(config.model_type, ()):
            raise ValueError(
                f"mlx-lm does not take the weights of a model of the family {config.model_type} "
                f"with `tie_word_embeddings` {str(tied).lower()} as they are stored: write a GGUF "
                "file instead. prunus writes MLX checkpoints of "
                f"{', '.join(sorted(FAMILIES))}"
            )
        check_fixed("mlx-lm", "an MLX checkpoint", config, MLX[config.model_type])
        request.refuse_gguf_options()
        names = [*request.linears, *sorted(request.outside)]
        request.check_widths(names, _GROUPS[-1])
        weights = [request.typed([name], _types(request, name)) for name in names]
        words = CardWords(
            "in the format of MLX, with {bits} bits per weight in its linears. Each weight has "
            "the bits (2 to 8) and the size of groups that lose the least for the size. mlx-lm and "
            "LM Studio run the folder on Macs.",
            cls.PROGRAMS,
            ["mlx"],
            "compressed for MLX",
            {"library_name": "mlx", "pipeline_tag": "text-generation"},
        )
        # mlx-lm drops further blocks (MTP) of the families that have them, and takes no others.
        source = request.source
        left_out = source.checkpoint.tensors.keys() - set(source.stored_names.values())
        unmatched = {"the checkpoint": name_patterns(source.unused)} if source.unused else {}
        lists = {"left_out": left_out, "unmatched": unmatched}
        result = "an MLX checkpoint"
        return folder_plan(
            request, weights, cls.encode, result, words=words, configure=_config, **lists
        )

    @staticmethod
    def encode(key: str, weight: GroupedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The three tensors of a weight; see `Codec.encode`."""
        assert isinstance(weight.quantizer, BlockType)
        integers_OB, scales_OS, biases_OS = weight.quantizer.separate(weight.data_OB)
        parts = integers_OB.view(torch.uint32), scales_OS, biases_OS
        return dict(zip(_names(key), parts, strict=True))

    @staticmethod
    def decode(
        key: str, tensors: dict[str, torch.Tensor], quantizer: GroupQuantizer
    ) -> torch.Tensor:
        """The dense weight of a linear; its three tensors leave `tensors`."""
        return dense_weight(key, tensors, quantizer.group)

    @staticmethod
    def owns(path: Path) -> bool:
        """Whether a path whose configuration has MLX's entry is a folder."""
        return path.is_dir()

    @staticmethod
    def make_dense(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        """Turn the content of a folder into that of a plain checkpoint; see `Codec`.

        Other programs' results can be read as well.
        """
        described = config.pop("quantization")
        config.pop("quantization_config", None)
        for scales in [name for name in tensors if name.endswith(".scales")]:
            module, stored = scales.removesuffix(".scales"), tensors[scales].dtype
            kind = described.get(module, described)
            known = [kind["bits"]]
            weight_OI = dense_weight(f"{module}.weight", tensors, kind["group_size"], known)
            tensors[f"{module}.weight"] = weight_OI.to(stored)


def _types(request: PlanRequest, name: str) -> list[BlockType]:
    """The types whose groups fill the width, smallest first; `head_bits` may name the bits."""
    recipe = request.recipe
    fixed = recipe.head_bits is not None and name in request.outside
    bits = [recipe.head_bits] if fixed else _BITS
    columns = request.source.checkpoint.tensors[request.source.weight_key(name)].shape[1]
    groups = [group for group in _GROUPS if columns % group == 0]
    dtype = request.scale_dtype(name)
    return [affine_type(x, group, dtype) for x in _BITS if x in bits for group in groups]


def _config(plan: SizePlan, kinds: Mapping[str, GroupQuantizer]) -> Mapping[str, object]:
    """The config.json of the source, with bits and groups of every module."""
    source = plan.request.source
    config = source.folder.dense_config
    described: dict[str, object] = {"group_size": 64, "bits": 4, "mode": "affine"}
    for key, kind in sorted((source.weight_key(name), kind) for name, kind in kinds.items()):
        bits = int(math.log2(len(kind.values)))
        entry = {"group_size": kind.span, "bits": bits, "mode": "affine"}
        described[key.removesuffix(".weight")] = entry
    return {
        **rope_keys(config),
        **config,
        # mlx-lm has defaults of its own where the file does not say it.
        "tie_word_embeddings": plan.request.skeleton.vocabulary_weights.is_tied,
        "quantization": described,
        "quantization_config": described,
    }


def rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of transformers 4 for `rope_parameters`, which mlx-lm 0.32 reads for few families.

    Without them it takes a base of 10,000 for most, in silence.

    Args:
        config: The content of config.json.

    >>> rope_keys({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    {'rope_theta': 500000.0}
    """
    by_layer = config.get("rope_parameters") or {}
    rope = by_layer.get("full_attention", by_layer)
    keys = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if "sliding_attention" in by_layer:
        keys["rope_local_base_freq"] = by_layer["sliding_attention"]["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = rope | {"type": rope["rope_type"]}
    return keys


def _names(key: str) -> tuple[str, str, str]:
    """The names of the integers, the scales and the biases of a weight."""
    module = key.removesuffix(".weight")
    return key, f"{module}.scales", f"{module}.biases"
