"""Limits on the numbers in a checkpoint's JSON files, checked before transformers reads them.

A configuration of sixty bytes can ask for a model that fills any memory. Some classes of
transformers spend that memory when they only read the configuration: they make a list with an entry
per layer. So every number in the file is compared with what the checkpoint stores, whatever its
name and however deep it is nested. Names only decide which limit a number has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.reader import Checkpoint

_MAX_BYTES = 2**24  # of a JSON file that describes a model
_MAX_DEPTH = 32  # of lists and objects in each other
_MAX_LIST = 10_000  # entries; transformers may repeat a list once per layer
_MAX_POSITIONS = 2**24  # tokens; the longest context of a published model is 10 million
_MAX_PIXELS = 4096  # per side of an image
_MAX_LAYERS = 4096
_MAX_EXPERTS = 2**15  # per block
# Up to these values a field is accepted in any checkpoint. Layers can share their weights, and some
# fields count what has no weights.
_SMALL_LAYERS, _SMALL_EXPERTS, _SMALL = 128, 64, 2**16

# Which limit a field has, by its name. The first rule that fits counts; all other fields count
# something, such as heads or labels, of which a checkpoint has no more than its longest side.
_RULES = {
    # They choose a row or scale a value, and size nothing.
    "": r"token_ids?$|token_index$|(theta|seed|_value|clipping)$|(rope|rotary)\w*base",
    "experts": r"experts?$",
    "pixels": r"(image|crop)_size",
    "layers": (
        r"layers?$|depths?$|blocks?$|repeats?$|cycles$|loops$|passes$|iters$|stacks?$|stages$"
        r"|hashes$|networks$|hidden_groups$|group_num$|codebooks$|quantizers$|nextn_predict|^pattern"
        r"|attention_types$"
    ),
    "positions": (
        r"position|length|context|window|seq|ctx$|max_len|_floor$|floor_scale|chunk|(^|_)max_"
    ),
    "numbers": (
        r"hidden|intermediate|vocab|embd|embed|inner|ffn|ff$|width|channels|size|dim|^d_|units"
        r"|params|flops|tokens$|steps?$|samples$"
    ),
}
_NUMBERED = re.compile(r"\.(\d+)(?=\.)")


@dataclass(frozen=True)
class StoredSizes:
    """What a checkpoint stores, as limits for its configuration. Empty tensors count as nothing.

    Attributes:
        numbers: bytes of all tensors; a coded weight can take less than a byte.
        tensors: tensors that are not empty.
        layers: modules with a number in their name that hold a tensor, such as `model.layers.7`.
        experts: the largest number of experts that a block can have.
        longest: the longest side of a tensor.
    """

    numbers: int
    tensors: int
    layers: int
    experts: int
    longest: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StoredSizes:
        """The sizes of an open checkpoint."""
        numbers = tensors = fused_experts = longest = 0
        layers: set[str] = set()
        # Path of a list of experts -> the numbers in it.
        experts: dict[str, set[str]] = {}
        for name, info in checkpoint.tensors.items():
            if not (count := math.prod(info.shape)):
                continue
            numbers += count * info.dtype.itemsize
            tensors += 1
            longest = max(longest, *info.shape, 1)
            if len(info.shape) > 2:
                fused_experts = max(fused_experts, info.shape[0])
            for match in _NUMBERED.finditer(name):
                path = name[: match.start()]
                if path.endswith("experts"):
                    experts.setdefault(path, set()).add(match[1])
                else:
                    layers.add(name[: match.end()])
        most_experts = max([fused_experts, *map(len, experts.values())])
        return cls(numbers, tensors, len(layers), most_experts, longest)


#: Of a folder without weights, such as that of a tokenizer. No model is built from it.
_UNKNOWN = StoredSizes(2**34, _MAX_LAYERS, _MAX_LAYERS, _MAX_EXPERTS, 2**24)


def check_config(folder: Path, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Check the numbers in a folder's config.json against its weights.

    Returns:
        The content of the file.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    content = read_config(path)
    if content.get("quantization_config") and _is_packed(content):
        # The module that reads packed weights compares this part with the tensors, one by one.
        checked = {key: value for key, value in content.items() if key != "quantization_config"}
    else:
        checked = content
    stored: StoredSizes | None = None
    for name, value in _numbers(path, checked):
        if value <= _SMALL_EXPERTS:
            continue
        if stored is None:
            stored = _sizes(folder, checkpoint)
        _check(path, name, value, stored)
    return content


def check_processor_files(folder: Path) -> None:
    """Check the numbers in the files that describe a tokenizer or an image processor."""
    for file, largest in (("tokenizer_config.json", _SMALL), ("preprocessor_config.json", 2**12)):
        path = folder / file
        if not path.exists():
            continue
        for name, value in _numbers(path, read_config(path)):
            # Tokenizers say 1e30 where their length is unlimited. It sizes nothing.
            if value > largest and not re.search(r"max_len|length$|token_id|_pixels$", name):
                raise ValueError(
                    f"{path} has {name} = {value:,}, and at most {largest:,} is accepted; is the "
                    "file damaged?"
                )


def read_config(path: Path) -> dict[str, Any]:
    """The content of a JSON file that describes a model."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, and at most {_MAX_BYTES:,} are read; is "
            "it a configuration?"
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object, as a configuration must be; copy it again")
    return content


def _is_packed(content: dict[str, Any]) -> bool:
    described = content["quantization_config"]
    return isinstance(described, dict) and described.get("quant_method") == "prunus"


def _sizes(folder: Path, checkpoint: Checkpoint | None) -> StoredSizes:
    if checkpoint is None:
        try:
            checkpoint = Checkpoint(folder)
        except FileNotFoundError:
            return _UNKNOWN
    return StoredSizes.of(checkpoint)


def _numbers(path: Path, content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Every whole number in a JSON value with the name of its field, and large floats rounded."""
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"{path} nests lists and objects deeper than {_MAX_DEPTH} levels; is it damaged?"
        )
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(path, value, key, depth + 1)
    elif isinstance(content, list):
        if len(content) > _MAX_LIST:
            raise ValueError(
                f"{path} has a list of {len(content):,} entries under {name!r}, and at most "
                f"{_MAX_LIST:,} are accepted; is it damaged?"
            )
        for value in content:
            yield from _numbers(path, value, name, depth + 1)
    elif isinstance(content, float) and math.isfinite(content):
        # Python's JSON reads 1e9 as a float, and some classes turn it into an integer.
        yield name, min(int(content), 2**63)
    elif isinstance(content, int) and not isinstance(content, bool):
        yield name, content


def _check(path: Path, name: str, value: int, stored: StoredSizes) -> None:
    kind = next((kind for kind, rule in _RULES.items() if re.search(rule, name)), "counts")
    if not kind:
        return
    limit = {
        "layers": min(max(stored.layers, _SMALL_LAYERS), _MAX_LAYERS),
        "experts": min(max(stored.experts, _SMALL_EXPERTS), _MAX_EXPERTS),
        "pixels": _MAX_PIXELS,
        "positions": _MAX_POSITIONS,
        "numbers": max(stored.numbers, _SMALL),
        "counts": max(stored.longest, stored.tensors, _SMALL),
    }[kind]
    if value <= limit:
        return
    if kind in ("pixels", "positions"):
        raise ValueError(
            f"{path} asks for {name} = {value:,}, and at most {limit:,} is accepted; is it damaged?"
        )
    raise ValueError(
        f"{path} asks for {name} = {value:,}, and the checkpoint holds {stored.numbers:,} bytes in "
        f"{stored.tensors:,} tensors of {stored.layers:,} layers; config and weights do not belong "
        "together"
    )
