"""The configuration of a smaller model, made from that of the model.

Families name the same number differently (`num_experts`, `n_routed_experts`), and some files use
another name than the class (`attribute_map` of transformers). So every change is made under the
name that the class uses, and in the file under each name that stands there already.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.atomic_files import write_json

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
)
#: Lists of positions of blocks.
_BLOCK_POSITIONS = {"mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "global_attn_layers"}
#: How many blocks at the beginning are of another kind than the rest.
_FIRST_BLOCKS = {
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
    "max_window_layers",
}
#: The position of the last block of a kind.
_LAST_BLOCKS = {"moe_layer_end_index"}
#: Blocks after the last one, which predict further tokens and do not belong to the model.
_EXTRA_BLOCKS = {"num_nextn_predict_layers"}


def canonical(config: Any, name: str) -> str:
    """The name under which the class keeps a field."""
    return str(getattr(config, "attribute_map", {}).get(name, name))


def _find(config: Any, names: Sequence[str]) -> str | None:
    """The first of some fields that the configuration has as a whole number above 0."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return canonical(config, name)
    return None


def expert_count(config: Any) -> tuple[str, int] | None:
    """The field that counts the experts of a layer, and its value; None if there is none.

    >>> from transformers import MixtralConfig
    >>> expert_count(MixtralConfig(num_local_experts=4))
    ('num_local_experts', 4)
    """
    name = _find(config, _EXPERT_COUNTS)
    return None if name is None else (name, getattr(config, name))


def experts_per_token(config: Any) -> int:
    """How many experts the router chooses for each token; 1 if the configuration does not say."""
    name = _find(config, _EXPERTS_PER_TOKEN)
    return 1 if name is None else int(getattr(config, name))


def expert_groups(config: Any) -> tuple[int, int]:
    """(groups of experts, groups that a token may use); (1, 1) where experts form no groups."""
    groups = getattr(config, "n_group", None) or 1
    return (groups, getattr(config, "topk_group", None) or groups) if groups > 1 else (1, 1)


def without_blocks(config: Any, kept: Sequence[int], count: int) -> dict[str, Any]:
    """The fields of a configuration that change when only some blocks stay.

    These are the number of blocks, lists with one entry per block, lists of positions of blocks,
    and numbers that say how many blocks at the beginning are of another kind.

    >>> from transformers import Qwen2Config
    >>> config = Qwen2Config(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    >>> sorted(without_blocks(config, [0, 2], 3))
    ['layer_types', 'max_window_layers', 'num_hidden_layers']
    """
    if len(kept) == count:
        return {}
    changes: dict[str, Any] = {canonical(config, "num_hidden_layers"): len(kept)}
    for name, value in config.to_dict().items():
        if isinstance(value, list | tuple) and name in _BLOCK_POSITIONS:
            changes[name] = [place for place, index in enumerate(kept) if index in value]
        elif isinstance(value, list | tuple) and len(value) == count and "layer" in name:
            if not name.startswith("mtp"):
                changes[name] = [value[index] for index in kept]
        elif isinstance(value, int) and name in _FIRST_BLOCKS:
            changes[name] = sum(index < value for index in kept)
        elif isinstance(value, int) and name in _LAST_BLOCKS:
            changes[name] = sum(index <= value for index in kept) - 1
        elif isinstance(value, int) and name in _EXTRA_BLOCKS:
            changes[name] = 0
    return changes


def rewritten(raw: Mapping[str, Any], config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json with some fields of the language model changed.

    Args:
        changes: canonical name of a field -> its new value.

    >>> from transformers import LlavaConfig, Qwen3MoeConfig
    >>> config = Qwen3MoeConfig(num_experts=8)
    >>> name, count = expert_count(config)
    >>> rewritten({"num_experts": 8}, config, {name: 6})["num_experts"]
    6
    >>> raw = {"text_config": {"model_type": "llama", "num_hidden_layers": 9}}
    >>> rewritten(raw, LlavaConfig(), {"num_hidden_layers": 8})["text_config"]["num_hidden_layers"]
    8
    """
    found = copy.deepcopy(dict(raw))
    text = config.get_text_config()
    if text is not config:
        inside = next(name for name in config.sub_configs if getattr(config, name, None) is text)
        # Some older files have the fields of the language model next to those of the whole model.
        if isinstance(found.get(inside), dict):
            found[inside] = rewritten(found[inside], text, changes)
            return found
    left = dict(changes)
    for key in found:
        known = canonical(text, key)
        if known in changes:
            found[key] = changes[known]
            left.pop(known, None)
    return found | left


def blocks_that_take_images(config: Any) -> int:
    """How many blocks of the language model, from the first one, are given features of images.

    Some vision towers hand the outputs of several of their layers to the language model, which adds
    the first after its first block, the second after its second, and so on.
    """
    towers = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return max((len(getattr(x, "deepstack_visual_indexes", None) or ()) for x in towers), default=0)


def parsed(config: Any, raw: Mapping[str, Any]) -> Any:
    """The configuration that transformers reads from the content of a config.json."""
    # transformers reads a file otherwise than a dict: it turns words such as Infinity into numbers.
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, "config.json"), raw)
        found = type(config).from_pretrained(folder)
    found._attn_implementation = config._attn_implementation
    return found
