"""How many channels and heads stay, and which tensors of each block they are rows and columns of.

The layout is found as everywhere here: the model that a narrower configuration describes is built
without weights, and the shapes of its tensors are compared. Once only the channels are fewer, and
once only the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prunus.model.linears import find_linears
from prunus.model.skeleton import Skeleton
from prunus.pruning.structure.layout import axis_that_changes, shapes_of
from prunus.pruning.structure.recipe import StructureRecipe

__all__ = ["BlockWidth", "HeadPlan", "PartLayout", "WidthPlan", "plan_width"]

_CHANNEL_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
#: Multiples of this many channels suit kernels and the block sizes of quantised formats.
_MULTIPLES = (64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class HeadPlan:
    """Query heads and key-value groups before and after, and the width of a head."""

    heads: int
    keep_heads: int
    groups: int
    keep_groups: int
    size: int


@dataclass(frozen=True)
class PartLayout:
    """The tensors of one block that channels, or heads, are part of.

    Attributes:
        reader: the linear whose inputs they are, such as `mlp.down_proj`.
        axes: relative name of a tensor -> the axis that becomes shorter.
    """

    reader: str
    axes: dict[str, int]


@dataclass(frozen=True)
class BlockWidth:
    """The layout of one block; None for what it does not have.

    Attributes:
        channels, heads: where they lie.
        of_groups: tensors of which key-value groups are a part, and not query heads.
    """

    channels: PartLayout | None
    heads: PartLayout | None
    of_groups: frozenset[str]


@dataclass
class WidthPlan:
    """What stays in every block.

    Attributes:
        channels: channels of an MLP before and after; None if all stay.
        heads: None if all stay.
        changes: canonical name of a field of the configuration -> its new value.
        sizes: pairs of sizes before and after that shapes and attributes may show.
        blocks: the layout of every old block.
    """

    channels: tuple[int, int] | None
    heads: HeadPlan | None
    changes: dict[str, Any] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    blocks: list[BlockWidth] = field(default_factory=list)


def plan_width(
    recipe: StructureRecipe,
    old: Skeleton,
    config: Any,
    name: str,
    build: Callable[[Mapping[str, Any]], Skeleton],
) -> WidthPlan:
    """Decide how many channels and heads stay.

    Args:
        recipe: its width, heads and key-value heads.
        old: the model without weights.
        config: its configuration.
        name: of the model, for messages.
        build: the model of a configuration with some fields changed.

    Raises:
        ValueError: the numbers do not fit; says which do.
        NotImplementedError: the family has no such width.
    """
    plan = WidthPlan(None, None)
    heads, by_channels, by_heads = _plan_heads(recipe, config, name), None, None
    # A configuration may hold the fields of another family, which change nothing.
    for field_name, before, after in _plan_channels(recipe, config):
        by_channels = build({field_name: after})
        blocks = zip(old.blocks, by_channels.blocks, strict=True)
        if any(shapes_of(block) != shapes_of(other) for block, other in blocks):
            plan.channels, plan.changes[field_name] = (before, after), after
            plan.sizes.add((before, after))
            break
        by_channels = None
    if heads is not None:
        plan.heads = heads
        changes = {
            "num_attention_heads": heads.keep_heads,
            "num_key_value_heads": heads.keep_groups,
            # Without this, many classes would compute it from the number of heads.
            "head_dim": heads.size,
        }
        if not hasattr(config, "num_key_value_heads"):
            del changes["num_key_value_heads"]
        plan.changes |= changes
        for before, after in (
            (heads.heads, heads.keep_heads),
            (heads.groups, heads.keep_groups),
            (heads.heads // heads.groups, heads.keep_heads // heads.keep_groups),
        ):
            plan.sizes |= {(before, after), (before * heads.size, after * heads.size)}
        by_heads = build(changes)
    if plan.channels is None and plan.heads is None:
        raise ValueError(
            f"--width {recipe.width} is less than one step of channels and heads of {name}, so "
            "nothing would go; give a larger share"
        )
    for index, block in enumerate(old.blocks):
        layouts = [
            None if other is None else _part(block, other.blocks[index], what)
            for other, what in ((by_channels, "channels"), (by_heads, "heads"))
        ]
        of_groups: set[str] = set()
        if heads is not None and layouts[1] is not None:
            shapes = shapes_of(block)
            fits = {heads.groups, heads.groups * heads.size}
            if heads.groups != heads.heads:
                of_groups = {n for n, axis in layouts[1].axes.items() if shapes[n][axis] in fits}
        plan.blocks.append(BlockWidth(layouts[0], layouts[1], frozenset(of_groups)))
    if heads is not None and not any(each.heads for each in plan.blocks):
        raise NotImplementedError(
            f"no block of {name} has heads that its configuration describes by one number, so "
            "they cannot go"
        )
    return plan


def _plan_channels(recipe: StructureRecipe, config: Any) -> list[tuple[str, int, int]]:
    """The fields that may count channels, and each number before and after; empty if none goes."""
    found: list[tuple[str, int, int]] = []
    if recipe.width is None:
        return found
    aliases = getattr(config, "attribute_map", {})
    for name in _CHANNEL_FIELDS:
        before = getattr(config, name, None)
        if name == "n_inner" and before is None and hasattr(config, name):
            before = 4 * config.hidden_size  # what GPT-2 and its relatives take then
        if isinstance(before, int) and before > 1:
            # Round to a number that hardware likes, but by no more than a 32nd of all channels.
            step = next(m for m in _MULTIPLES if before % m == 0 and m <= max(1, before // 32))
            after = max(step, round(before * (1 - recipe.width) / step) * step)
            if after < before:
                found.append((str(aliases.get(name, name)), before, after))
    return found


def _plan_heads(recipe: StructureRecipe, config: Any, name: str) -> HeadPlan | None:
    """How many heads stay; None if all do.

    Raises:
        ValueError: the numbers asked for break key-value groups.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return None
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    per_group = heads // groups
    possible = [(g * n, g) for g in range(1, groups + 1) for n in range(1, per_group + 1)]
    wanted = [
        (h, g) for h, g in possible if recipe.heads in (None, h) and recipe.kv_heads in (None, g)
    ]
    if not wanted:
        asked = [
            f"--{option} {value}"
            for option, value in (("heads", recipe.heads), ("kv-heads", recipe.kv_heads))
            if value is not None
        ]
        shown = ", ".join(f"{h} with {g}" for h, g in sorted(possible, reverse=True)[:12])
        raise ValueError(
            f"{' '.join(asked)} does not fit {name}, whose {heads} query heads share {groups} "
            f"key-value heads, each of them {per_group}: every key-value head must keep the same "
            f"number of query heads. Possible are (query heads with key-value heads): {shown}"
        )
    share = 0.0 if recipe.width is None else recipe.width
    if recipe.heads is None and recipe.kv_heads is not None:
        keep = max(wanted)
    else:
        keep = min(wanted, key=lambda x: (abs(x[0] / heads - (1 - share)), -x[1]))
    return None if keep == (heads, groups) else HeadPlan(heads, keep[0], groups, keep[1], size)


def _part(old: nn.Module, new: nn.Module, what: str) -> PartLayout | None:
    """Where channels, or heads, lie in a block.

    Raises:
        NotImplementedError: more than one linear reads them, or a norm goes over all of them.
    """
    before, after = shapes_of(old), shapes_of(new)
    if before.keys() != after.keys():
        raise NotImplementedError(f"fewer {what} would change more than the sizes of this family")
    try:
        axes = {name: axis_that_changes(shape, after[name]) for name, shape in before.items()}
    except ValueError as fault:
        raise NotImplementedError(
            f"fewer {what} would change this family in more than one way: {fault}"
        ) from fault
    found = {name: axis for name, axis in axes.items() if axis is not None}
    if not found:
        return None
    linears = {linear.name: linear for linear in find_linears(old)}
    readers = [
        name
        for name, linear in linears.items()
        if found.get(f"{name}.weight") == (0 if linear.transposed else 1)
    ]
    if len(readers) != 1:
        raise NotImplementedError(
            f"{len(readers)} linears of a block read its {what}, and one is needed: this family "
            "cannot become narrower yet"
        )
    width = linears[readers[0]].shape[1]
    for name, axis in found.items():
        owner = name.rpartition(".")[0]
        in_linear = owner in linears
        if (what == "channels" or not in_linear) and before[name][axis] != width and in_linear:
            raise NotImplementedError(
                f"{name} holds {before[name][axis]} rows for {width} {what}: linears that are "
                "joined into one cannot become narrower yet"
            )
        if not in_linear and before[name][axis] == width:
            raise NotImplementedError(
                f"{name} normalises all {what} together, so fewer of them would change the others"
            )
    return PartLayout(readers[0], found)
