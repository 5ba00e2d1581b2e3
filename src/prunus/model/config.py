"""The configuration of a checkpoint, and whether it can belong to the weights next to it.

A configuration of sixty bytes can ask for a model that fills any memory. Some classes of
transformers spend that memory when they only read the configuration: they make a list with an entry
per layer. So every number in the file is compared with what the checkpoint stores, whatever its
name and however deep it is nested. Names only decide which limit a number has.

Outline: `StoredSizes` and the limits; the checks of files; and at the end the functions that make
the configuration of a smaller model.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.files import parse_json, read_limited, write_json
from prunus.model.checkpoint.tensor_files import Checkpoint

_MAX_DEPTH = 32  # of lists and objects in each other
_MAX_LIST = 10_000  # entries; transformers may repeat a list once per layer
_MAX_POSITIONS = 2**24  # tokens; the longest context of a published model is 10 million
_MAX_PIXELS = 4096  # per side of an image
_MAX_LAYERS = 4096
_MAX_EXPERTS = 2**15  # per block
# Up to these values a field is accepted in any checkpoint. Layers can share their weights, and some
# fields count what has no weights.
_SMALL_LAYERS = 128
_SMALL_EXPERTS = 64
_SMALL = 2**16  # of all other numbers

# Which limit a field has, by its name. The first rule that fits counts; all other fields count
# something, such as heads or labels, of which a checkpoint has no more than its longest side. The
# limits of the kinds are in `_check`.
_RULES = {
    # They choose a row or scale a value, and size nothing: no limit.
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
# The number of a layer or an expert inside a tensor's name.
_NUMBERED = re.compile(r"\.(\d+)(?=\.)")

#: The fields for the number of experts per block, in the order in which they are tried.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: The fields for the number of experts that the router chooses per token.
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k",
    "top_k_experts",
)  # fmt: skip
#: Lists of positions of blocks.
_BLOCK_POSITIONS = {"mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "global_attn_layers"}
#: How many blocks at the beginning are of another kind than the rest.
_FIRST_BLOCKS = {
    "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers",
}  # fmt: skip
#: The position of the last block of a kind.
_LAST_BLOCKS = {"moe_layer_end_index"}
#: Blocks after the last one, which predict further tokens and do not belong to the model.
EXTRA_BLOCKS = {"num_nextn_predict_layers"}


@dataclass(frozen=True)
class StoredSizes:
    """What a checkpoint stores, as limits for its configuration. Empty tensors count as nothing.

    Attributes:
        numbers: Bytes of all tensors. They limit counts of weights, because a coded weight can take
            less than a byte.
        tensors: Number of tensors that are not empty.
        layers: Number of modules with a number in their name that hold a tensor, such as
            `model.layers.7`.
        experts: The largest number of experts that a block can have.
        longest: The longest side of a tensor.
    """

    numbers: int
    tensors: int
    layers: int
    experts: int
    longest: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StoredSizes:
        """The sizes of an open checkpoint, from its headers."""
        numbers = tensors = fused_experts = longest = 0
        # Names of the modules with a number, up to that number.
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


#: The sizes of a folder without weights, such as that of a tokenizer. No model is built from it.
NO_WEIGHTS = StoredSizes(2**34, _MAX_LAYERS, _MAX_LAYERS, _MAX_EXPERTS, 2**24)


def check_processor_files(folder: Path) -> None:
    """Check the numbers in the files that describe a tokenizer or an image processor.

    Raises:
        ValueError: A file is no JSON object or too deep, or a number in it is beyond all limits.
    """
    for file, largest in (("tokenizer_config.json", _SMALL), ("preprocessor_config.json", 2**12)):
        path = folder / file
        if not path.exists():
            continue
        for name, value in _numbers(path, parse_json(path, read_limited(path))):
            # Tokenizers say 1e30 where their length is unlimited. It sizes nothing.
            if value > largest and not re.search(r"max_len|length$|token_id|_pixels$", name):
                raise ValueError(
                    f"{path} has {name} = {value:,}, and at most {largest:,} is accepted; is the "
                    "file damaged?"
                )


def check_numbers(path: Path, content: Mapping[str, Any], stored: StoredSizes) -> None:
    """Check the numbers in a configuration against the weights next to it.

    Args:
        path: The file, for errors.
        content: What it holds.
        stored: What the checkpoint stores.

    Raises:
        ValueError: It is nested too deep, or a number exceeds all that the checkpoint stores; names
            the field.
    """
    for name, value in _numbers(path, content):
        _check(path, name, value, stored)


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
    """Raise a ValueError if the value of one field is beyond what the checkpoint stores."""
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
    why = (
        f"at most {limit:,} is accepted; is it damaged?"
        if kind in ("pixels", "positions")
        else f"the checkpoint holds {stored.numbers:,} bytes in {stored.tensors:,} tensors of "
        f"{stored.layers:,} layers; config and weights do not belong together"
    )
    raise ValueError(f"{path} asks for {name} = {value:,}, and {why}")


# --- the configuration of a smaller model, made from that of the model ---

# Families name the same number differently (`num_experts`, `n_routed_experts`), and some files use
# another name than the class (`attribute_map` of transformers). So every change is made under the
# name that the class uses, and in the file under each name that is there already.


def canonical(config: Any, name: str) -> str:
    """The name under which the class keeps a field.

    >>> from transformers import GPT2Config
    >>> canonical(GPT2Config(), "num_hidden_layers"), canonical(GPT2Config(), "n_layer")
    ('n_layer', 'n_layer')
    """
    return str(getattr(config, "attribute_map", {}).get(name, name))


def expert_count(config: Any, names: Sequence[str] = _EXPERT_COUNTS) -> tuple[str, int] | None:
    """The first of some fields that is a whole number above 0, and its value; None without one."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return canonical(config, name), value
    return None


def experts_per_token(config: Any) -> int:
    """How many experts the router chooses for each token; 1 if the configuration does not say."""
    named_count = expert_count(config, _EXPERTS_PER_TOKEN)
    return 1 if named_count is None else named_count[1]


def expert_groups(config: Any) -> tuple[int, int]:
    """(groups of experts, groups that a token may use); (1, 1) if experts form no groups."""
    groups = getattr(config, "n_group", None) or 1
    return (groups, getattr(config, "topk_group", None) or groups) if groups > 1 else (1, 1)


def without_blocks(config: Any, staying: Sequence[int], count: int) -> dict[str, Any]:
    """The fields of a configuration that change when only some blocks stay.

    Args:
        config: The transformers configuration of a language model.
        staying: Positions of the blocks that stay, in order.
        count: Number of blocks that the model has.

    Returns:
        Canonical name -> new value. Empty if all blocks stay.

    >>> from transformers import Qwen2Config
    >>> config = Qwen2Config(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    >>> sorted(without_blocks(config, [0, 2], 3))
    ['layer_types', 'max_window_layers', 'num_hidden_layers']
    """
    if len(staying) == count:
        return {}
    changes: dict[str, Any] = {canonical(config, "num_hidden_layers"): len(staying)}
    for name, value in config.to_dict().items():
        if isinstance(value, list | tuple) and name in _BLOCK_POSITIONS:
            changes[name] = [position for position, old in enumerate(staying) if old in value]
        elif isinstance(value, list | tuple) and len(value) == count and "layer" in name:
            # A list with one entry per block. Lists of the blocks in `EXTRA_BLOCKS` stay.
            if not name.startswith("mtp"):
                changes[name] = [value[index] for index in staying]
        elif isinstance(value, int) and name in _FIRST_BLOCKS:
            changes[name] = sum(index < value for index in staying)
        elif isinstance(value, int) and name in _LAST_BLOCKS:
            changes[name] = sum(index <= value for index in staying) - 1
        elif isinstance(value, int) and name in EXTRA_BLOCKS:
            changes[name] = 0
    return changes


def rewritten(raw: Mapping[str, Any], config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json with fields of the language model changed.

    Args:
        raw: The content of the file.
        config: What transformers reads from it; it may be that of a larger model with a language
            model inside.
        changes: Canonical name -> new value. Each is written under every name that the file has for
            it, and under the canonical name if it has none.

    >>> from transformers import LlavaConfig
    >>> raw = {"text_config": {"model_type": "llama", "num_hidden_layers": 9}}
    >>> rewritten(raw, LlavaConfig(), {"num_hidden_layers": 8})["text_config"]["num_hidden_layers"]
    8
    """
    content = copy.deepcopy(dict(raw))
    text = config.get_text_config()
    if text is not config:
        inside = next(name for name in config.sub_configs if getattr(config, name, None) is text)
        # Some older files have the fields of the language model next to those of the whole model.
        if isinstance(content.get(inside), dict):
            content[inside] = rewritten(content[inside], text, changes)
            return content
    # Changes of fields that the file does not have.
    left = dict(changes)
    for key in content:
        name = canonical(text, key)
        if name in changes:
            content[key] = changes[name]
            left.pop(name, None)
    return content | left


def blocks_that_take_images(config: Any) -> int:
    """How many first blocks get features of images: a layer of the vision tower for each."""
    towers = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return max((len(getattr(x, "deepstack_visual_indexes", None) or ()) for x in towers), default=0)


def parsed(config: Any, raw: Mapping[str, Any]) -> Any:
    """The configuration that transformers reads from the content of a config.json.

    It has the class and the implementation of attention of `config`.
    """
    # transformers reads a file otherwise than a dict: it turns words such as Infinity into numbers.
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, "config.json"), raw)
        result = type(config).from_pretrained(folder)
    # The file does not say it.
    result._attn_implementation = config._attn_implementation
    return result
