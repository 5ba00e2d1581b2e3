"""What a checkpoint's tensors are called in the skeleton, by transformers' own rules of renaming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunus.model.skeleton import Skeleton

__all__ = ["names_in_model", "naming_rules"]


def naming_rules(model: Any) -> tuple[list[Any], list[Any]]:
    """Transformers' rules by which names in this model's checkpoints become those of the model: those that rename whole
    tensors, and those that make one of several or the other way round."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def names_in_model(
    skeleton: Skeleton, keys: Mapping[str, Any]
) -> tuple[dict[str, str], set[str], dict[str, str]]:
    """The skeleton's name -> stored name. Fused tensors that the skeleton takes apart go by their own name.

    Also the keys that need more than a new name, and as the first those that the model has no place for.
    """
    from transformers.core_model_loading import rename_source_key

    model = skeleton.model
    fused = [
        (f"{skeleton.block_name(index)}.{each.name}", f"{skeleton.block_name(index)}.", each)
        for index in range(len(skeleton))
        for each in skeleton.fused(index)
    ]
    taken_apart = {name for name, _, _ in fused}
    of_experts = {prefix + member for _, prefix, each in fused for member in each.members}
    expected = dict(model.state_dict()) | dict.fromkeys(taken_apart, True)
    renamings, converters = naming_rules(model)
    prefix = model.base_model_prefix
    names: dict[str, str] = {}
    converted: set[str] = set()
    unknown: dict[str, str] = {}
    for key in sorted(keys):
        name, _ = rename_source_key(key, renamings, [], prefix, expected)
        if name in of_experts or name in taken_apart:
            names[name] = key  # what transformers would fuse is what is wanted here, one by one
            continue
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if pattern is not None:
            converted.add(key)
        elif name in expected:
            names[name] = key
        else:
            unknown[name] = key
    return names, converted, unknown
