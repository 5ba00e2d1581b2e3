"""How large llama-quantize's file of a preset is, such as Q4_K_M, and which types it has.

A preset gives most matrices the type of `llama_cpp.PRESETS`, and some another one, by `_RULES`.
Then a type whose span does not divide the width of a tensor is replaced (`types.type_for`). These
are the rules of llama.cpp in 2026 (`llama_tensor_get_type_impl`), without an importance matrix for
presets that do without one. Files of earlier versions can be a little smaller or larger.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from prunus.formats.gguf.contents import FileContents
from prunus.formats.gguf.header import padded
from prunus.formats.gguf.layout import GgufLayout, GgufTensor, block_of
from prunus.formats.gguf.types import type_for, type_named
from prunus.rounding.llama_cpp import PRESETS

# Kinds of models for which llama-quantize has other rules.
_OTHER_RULES = ("falcon", "glm5-next")
# The presets of about two bits.
_TWO_BITS = "IQ2_XXS IQ2_XS IQ2_S IQ2_M"
_EVERY = " ".join(PRESETS)
# Presets, tensors, condition, type. The first that fits counts. The tensors are "head" (also an
# embedding that is the head), "embedding", and in a block "v" (also fused with queries and keys),
# "k", "q", "output", "down", "gate" and "up"; "*" stands for all. The conditions are those of
# `_conditions`; without one the rule always holds.
_RULES = tuple(
    (presets.split(), tensors.split(), condition, kind)
    for presets, tensors, condition, kind in (
        ("MXFP4_MOE", "head", "", "Q8_0"),
        (_EVERY, "head", "odd width", "Q8_0"),
        (f"{_TWO_BITS} IQ3_XXS", "head", "", "Q5_K"),
        ("Q8_0", "head", "", "Q8_0"),
        (_EVERY, "head", "", "Q6_K"),
        ("MXFP4_MOE", "*", "one matrix", "Q8_0"),
        ("IQ2_XXS IQ2_XS", "embedding", "", "Q2_K"),
        ("IQ2_S IQ2_M IQ3_XXS", "embedding", "", "IQ3_S"),
        ("Q2_0", "embedding", "", "Q4_K"),
        (_TWO_BITS, "v", "shared or experts", "Q4_K"),
        ("IQ2_S IQ2_M", "v", "", "IQ3_S"),
        ("IQ2_XXS IQ2_XS", "v", "", "Q2_K"),
        (_TWO_BITS, "k", "eight experts", "Q4_K"),
        (_TWO_BITS, "output", "eight experts", "Q5_K"),
        ("IQ2_S IQ2_M", "output", "", "IQ3_S"),
        ("IQ2_S IQ2_M", "down", "first tensors", "IQ3_S"),
        ("IQ2_XXS IQ2_XS", "down", "first tensors", "Q2_K"),
        (_EVERY, "v k", "eight experts", "Q8_0"),
        ("Q2_K Q2_K_S Q3_K_S Q3_K_M IQ3_XXS IQ3_XS IQ3_S IQ3_M", "v", "70B", "Q5_K"),
        ("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", "v", "shared", "Q4_K"),
        ("Q2_K", "v", "", "Q3_K"),
        ("Q3_K_M", "v", "first two", "Q5_K"),
        ("Q3_K_M IQ3_M", "v", "", "Q4_K"),
        ("Q3_K_L", "v", "", "Q5_K"),
        ("IQ4_NL IQ4_XS", "v", "shared", "Q5_K"),
        ("Q4_K_M Q5_K_M", "v", "more bits", "Q6_K"),
        ("Q4_K_S", "v", "first four", "Q5_K"),
        ("Q4_K_S Q4_K_M", "v", "70B", "Q5_K"),
        ("IQ3_XS", "q k", "", "IQ3_XXS"),
        ("IQ3_XXS", "q k", "", "IQ2_S"),
        ("Q2_K", "down", "", "Q3_K"),
        ("Q2_K_S", "down", "first eighth", "Q4_K"),
        ("Q3_K_M", "down", "first sixteenth", "Q5_K"),
        ("Q3_K_M", "down", "", "Q4_K"),
        ("Q3_K_L", "down", "", "Q5_K"),
        ("IQ3_M", "down", "first eighth", "Q4_K"),
        ("IQ3_M", "down", "more bits of eight experts", "Q4_K"),
        ("Q4_K_M Q5_K_M", "down", "more bits", "Q6_K"),
        ("IQ4_NL IQ4_XS Q4_K_S", "down", "first eighth", "Q5_K"),
        ("Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M", "output", "eight experts", "Q5_K"),
        ("IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS", "output", "eight experts", "Q5_K"),
        ("Q3_K_L", "output", "eight experts", "Q3_K"),
        ("Q2_K", "output", "", "Q3_K"),
        ("IQ3_XXS", "output", "", "IQ3_S"),
        ("Q3_K_M IQ3_M", "output", "", "Q4_K"),
        ("Q3_K_L", "output", "", "Q5_K"),
        ("IQ3_XS", "gate up", "middle", "IQ3_XXS"),
        # With an importance matrix, or without one where it is needed; and of Falcon.
        ("Q4_0", "down", "never", "Q4_1"),
        ("Q5_0", "down", "never", "Q5_1"),
        ("IQ3_XXS", "down", "never", "Q3_K"),
        ("Q3_K_L", "output", "never", "Q4_K"),
        ("Q4_K_M", "down", "never", "Q5_K"),
    )
)
_PARTS = re.compile(r"attn_(qkv|kv_b|v|k|q|output)\.weight|ffn_(up|gate|down)")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_EIGHT = 8


def types_of(preset: str, experts: int = 0) -> set[str]:
    """The types that a preset can give to a matrix whose width its types divide.

    Args:
        preset: The preset.
        experts: The number of experts of a block. Eight of them have types of their own.
    """
    rare = {"odd width", "70B", *(() if experts == _EIGHT else ("eight experts",))}
    given = {x for presets, _, when, x in _RULES if preset in presets and when not in rare}
    return {PRESETS[preset], *given}


def preset_bytes(layout: GgufLayout) -> dict[str, int]:
    """Preset of llama-quantize -> the bytes of its file of a model.

    Args:
        layout: The tensors and fields of the file.

    Returns:
        The smallest file first. Empty for the few kinds of models that have other rules.
    """
    plain = FileContents(layout, None)
    if layout.fields["general.architecture"].value in _OTHER_RULES:
        return {}
    sizes = Counter[str]()
    for preset in PRESETS:
        sizes[preset] = plain.file_bytes({})
        for tensor, kind in _types(preset, layout):
            columns, count = tensor.shape[-1], math.prod(tensor.shape)
            # No type has this width, so it gets F16.
            nbytes = 2 * count if columns % 32 else type_for(kind, columns).nbytes_of(count)
            sizes[preset] += padded(nbytes) - padded(plain.type_of(tensor, {})[2])
    return dict(sorted(sizes.items(), key=lambda size: size[1]))


def size_of(preset: str, layout: GgufLayout) -> int:
    """The bytes of llama-quantize's file of one preset; the arguments are as of `preset_bytes`.

    Raises:
        ValueError: llama-quantize has other rules for models of this kind.
    """
    sizes = preset_bytes(layout)
    if preset not in sizes:
        raise ValueError(
            f"what {preset} takes is not known for models of this kind: give `size` in bytes, such "
            "as 900MB"
        )
    return sizes[preset]


def _types(preset: str, layout: GgufLayout) -> Iterator[tuple[GgufTensor, str]]:
    """Each matrix of a file with the type that the preset gives to it."""
    matrices = [x for x in layout.tensors if x.is_matrix and x.name.endswith("weight")]
    parts = {tensor.name: _part(tensor.name) for tensor in matrices}
    if "head" not in parts.values():
        parts |= {name: "head" for name, part in parts.items() if part == "embedding"}
    count, earlier = Counter(parts.values()), Counter[str]()
    for tensor in sorted(matrices, key=lambda x: (block_of(x.name), x.name)):
        part = parts[tensor.name]
        holds = _conditions(layout, preset, tensor, earlier[part], count[part])
        fitting = (
            kind
            for presets, tensors, condition, kind in _RULES
            if preset in presets and (part in tensors or "*" in tensors) and holds[condition]
        )
        yield tensor, next(fitting, PRESETS[preset])
        earlier[part] += 1


def _part(name: str) -> str:
    """What a matrix is, in the words of `_RULES`; empty for any other."""
    if name in _EMBEDDINGS:
        return "embedding"
    found = _PARTS.search(name)
    part = "" if found is None else found[1] or found[2]
    return "head" if name == "output.weight" else "v" if part in ("qkv", "kv_b") else part


def _conditions(
    layout: GgufLayout, preset: str, tensor: GgufTensor, earlier: int, count: int
) -> Mapping[str, bool]:
    """Condition of `_RULES` -> whether it holds.

    Args:
        layout: The file.
        preset: The preset.
        tensor: The matrix.
        earlier: How many matrices of its kind come before it.
        count: How many there are.
    """

    def field(name: str) -> int:
        """A number of the model, that of the first block if each has its own; 0 for none."""
        found = layout.fields.get(f"{architecture}.{name}")
        value = 0 if found is None else found.value
        return int(value[0] if isinstance(value, list) else value)

    architecture = layout.fields["general.architecture"].value
    blocks, experts = field("block_count"), field("expert_count")
    heads, cached = field("attention.head_count"), field("attention.head_count_kv")
    shared = heads // (cached or heads or 1)
    is_v = _part(tensor.name) == "v"
    number, total = (earlier, count) if is_v else (block_of(tensor.name), blocks)
    more = number < total // 8 or number >= 7 * total // 8 or (number - total // 8) % 3 == 2
    eight = experts == _EIGHT
    return {
        "": True,
        "never": False,
        "odd width": tensor.shape[-1] % type_named(PRESETS[preset]).span > 0,
        "one matrix": len(tensor.shape) == 2,
        "shared": shared >= 4,
        "shared or experts": shared >= 4 or experts >= 4,
        "eight experts": eight,
        "70B": architecture == "llama" and blocks == 80 and shared > 1,
        "more bits": more,
        "more bits of eight experts": more and eight,
        "first tensors": earlier < blocks // 8,
        "first two": earlier < 2,
        "first four": earlier < 4,
        "first eighth": number < blocks // 8,
        "first sixteenth": number < blocks // 16,
        "middle": blocks // 8 <= number < 7 * blocks // 8,
    }
