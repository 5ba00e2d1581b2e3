"""The names of a checkpoint's tensors in the skeleton, by transformers' own rules.

A checkpoint may be older than the model's code, or store experts one by one. transformers therefore
has rules that turn stored names into names of the model; prunus applies the same rules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from prunus.model.skeleton import Skeleton


def naming_rules(model: Any) -> tuple[list[Any], list[Any]]:
    """The rules by which names in checkpoints of this model become names of the model.

    Returns:
        Rules that rename whole tensors, and rules that make one tensor of several or several of
        one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def names_in_model(
    skeleton: Skeleton, keys: Mapping[str, Any]
) -> tuple[dict[str, str], set[str], dict[str, str]]:
    """Match stored names with the names of the skeleton.

    Returns:
        The skeleton's name -> stored name. A stored fused tensor, which is several in the skeleton,
        appears under its own name.
        The stored names of tensors that need more than a new name.
        The name that a tensor would have -> stored name, of tensors that the model has no place
        for.
    """
    from transformers.core_model_loading import rename_source_key

    model = skeleton.model
    fused = [
        (f"{skeleton.block_name(index)}.{each.name}", f"{skeleton.block_name(index)}.", each)
        for index in range(len(skeleton))
        for each in skeleton.fused(index)
    ]
    fused_names = {name for name, _, _ in fused}
    of_experts = {prefix + member for _, prefix, each in fused for member in each.members}
    expected = dict(model.state_dict()) | dict.fromkeys(fused_names, True)
    renamings, converters = naming_rules(model)
    prefix = model.base_model_prefix
    names: dict[str, str] = {}
    converted: set[str] = set()
    unknown: dict[str, str] = {}
    for key in sorted(keys):
        # First without the converters: what they would fuse, the skeleton wants one by one.
        name, _ = rename_source_key(key, renamings, [], prefix, expected)
        if name in of_experts or name in fused_names:
            names[name] = key
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


def stored_names(model: Any, keys: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Return stored name -> the model's name, for some tensors of a loaded model."""
    from transformers.core_model_loading import rename_source_key

    renamings, expected = naming_rules(model)[0], dict.fromkeys(names, True)
    found = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, expected)
        name = name if name in expected else key
        if name in expected:
            found[key] = name
    if missing := sorted(set(expected) - set(found.values())):
        raise NotImplementedError(
            f"the checkpoint does not store {missing[0]!r} as the model has it, so it cannot be "
            "written again with packed weights; expand it with prunus unpack"
        )
    return found
