"""How many channels and heads stay, and which tensors of each block they are rows and columns of.

The layout is found as everywhere here: the model that a narrower configuration describes is built
without weights, and the shapes of its tensors are compared. Once only the channels of one kind of
MLP are fewer, and once only the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prunus.model.config_fields import canonical
from prunus.model.skeleton import Skeleton
from prunus.structure.layout import check_same_blocks, shapes_of
from prunus.structure.recipe import StructureRecipe
from prunus.structure.width_layout import LayoutFinder, PartLayout

__all__ = ["BlockWidth", "HeadPlan", "WidthPlan", "plan_width"]

#: Fields that count the channels of an MLP, of routed experts, or of a shared expert.
_CHANNEL_FIELDS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
)
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
class BlockWidth:
    """The layout of one block.

    Attributes:
        channels: of every MLP that becomes narrower; a routed expert is one.
        heads: None if it has none that go.
    """

    channels: list[PartLayout]
    heads: PartLayout | None


@dataclass
class WidthPlan:
    """What stays in every block.

    Attributes:
        heads: None if all stay.
        changes: canonical name of a field of the configuration -> its new value.
        sizes: pairs of sizes before and after that shapes and attributes may show.
        blocks: the layout of every old block.
    """

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
    finder: LayoutFinder,
) -> WidthPlan:
    """Decide how many channels and heads stay.

    Args:
        recipe: its width, heads and key-value heads.
        old: the model without weights.
        config: its configuration, of the language model alone.
        name: of the model, for messages.
        build: the model of a configuration with some fields changed.
        finder: of the layouts of the model.

    Raises:
        ValueError: the numbers do not fit; says which do.
        NotImplementedError: the family has no such width; says what it has.
    """
    plan = WidthPlan(_plan_heads(recipe, config, name))
    every = range(len(old))
    channels: list[list[PartLayout]] = [[] for _ in every]
    for field_name, before, after, narrower in _narrower_mlps(recipe, old, config, build):
        for index in every:
            new = narrower.blocks[index]
            channels[index] += finder.channels(old.blocks[index], new, index)
        plan.changes[field_name] = after
        plan.sizes |= {(before, after), *_sizes(old, narrower)}
    heads: list[PartLayout | None] = [None for _ in every]
    if plan.heads is not None:
        changes = _head_fields(plan.heads, config)
        try:
            fewer = build(changes)
            heads = _head_layouts(plan.heads, old, fewer, finder)
            of_heads = _head_sizes(plan.heads) | _sizes(old, fewer)
            check_same_blocks(old, fewer, every, of_heads)
        except NotImplementedError as fault:
            raise _without_heads(fault, name, plan, recipe) from fault
        plan.changes |= changes
        plan.sizes |= of_heads
    if not plan.changes:
        raise _nothing_goes(recipe, name, config)
    plan.blocks = [BlockWidth(*each) for each in zip(channels, heads, strict=True)]
    return plan


def _narrower_mlps(
    recipe: StructureRecipe,
    old: Skeleton,
    config: Any,
    build: Callable[[Mapping[str, Any]], Skeleton],
) -> Iterator[tuple[str, int, int, Skeleton]]:
    """Each field that counts channels, its number before and after, and the model with this number.

    A configuration may hold the fields of another family, which change nothing.
    """
    for known, before, after in _channel_counts(recipe, config):
        if after < before and _sizes(old, narrower := build({known: after})):
            yield known, before, after, narrower


def _channel_counts(recipe: StructureRecipe, config: Any) -> list[tuple[str, int, int]]:
    """The fields that may count channels, and each number before and after."""
    found: dict[str, tuple[str, int, int]] = {}
    for name in _CHANNEL_FIELDS if recipe.width is not None else ():
        before = getattr(config, name, None)
        if name == "n_inner" and before is None and hasattr(config, name):
            before = 4 * config.hidden_size  # what GPT-2 and its relatives take then
        if isinstance(before, int) and before > 1:
            assert recipe.width is not None
            # Round to a number that hardware likes, but by no more than a 32nd of all channels.
            step = next(m for m in _MULTIPLES if before % m == 0 and m <= max(1, before // 32))
            after = max(step, round(before * (1 - recipe.width) / step) * step)
            known = canonical(config, name)
            found.setdefault(known, (known, before, after))
    return list(found.values())


def _sizes(old: Skeleton, new: Skeleton) -> set[tuple[int, int]]:
    """The pairs of lengths in which the tensors of two models differ."""
    found = set()
    for before, after in zip(old.blocks, new.blocks, strict=True):
        now = shapes_of(after)
        for name, shape in shapes_of(before).items():
            pairs = zip(shape, now.get(name, shape), strict=False)
            found |= {pair for pair in pairs if pair[0] != pair[1]}
    return found


# --- heads ---


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
            f"`{option}` {value}"
            for option, value in (("heads", recipe.heads), ("kv_heads", recipe.kv_heads))
            if value is not None
        ]
        shown = ", ".join(f"{h} with {g}" for h, g in sorted(possible, reverse=True)[:12])
        raise ValueError(
            f"{' with '.join(asked)} does not fit {name}, whose {heads} query heads share {groups} "
            f"key-value heads, each of them {per_group}: every key-value head must keep the same "
            f"number of query heads. Possible are (query heads with key-value heads): {shown}"
        )
    share = 0.0 if recipe.width is None else recipe.width
    if recipe.heads is None and recipe.kv_heads is not None:
        keep = max(wanted)
    else:
        keep = min(wanted, key=lambda x: (abs(x[0] / heads - (1 - share)), -x[1]))
    return None if keep == (heads, groups) else HeadPlan(heads, keep[0], groups, keep[1], size)


def _head_fields(plan: HeadPlan, config: Any) -> dict[str, Any]:
    """The fields of the configuration that count heads -> their new values."""
    fields = {"num_attention_heads": plan.keep_heads}
    if hasattr(config, "num_key_value_heads"):
        fields["num_key_value_heads"] = plan.keep_groups
    # Without this, many classes would compute it from the number of heads.
    fields["head_dim"] = plan.size
    return {canonical(config, name): value for name, value in fields.items()}


def _head_sizes(plan: HeadPlan) -> set[tuple[int, int]]:
    """Numbers of heads and groups, and of their channels, before and after."""
    pairs = (
        (plan.heads, plan.keep_heads),
        (plan.groups, plan.keep_groups),
        (plan.heads // plan.groups, plan.keep_heads // plan.keep_groups),
    )
    return {*pairs, *((before * plan.size, after * plan.size) for before, after in pairs)}


def _head_layouts(
    plan: HeadPlan, old: Skeleton, fewer: Skeleton, finder: LayoutFinder
) -> list[PartLayout | None]:
    """Where the heads of each block lie.

    Raises:
        NotImplementedError: they cannot become fewer; says why.
    """
    units: dict[Any, tuple[int, int]] = {"heads": (plan.heads, plan.keep_heads)}
    if plan.groups != plan.heads:
        units["groups"] = (plan.groups, plan.keep_groups)
    found = [
        finder.heads(block, new, units, index)
        for index, (block, new) in enumerate(zip(old.blocks, fewer.blocks, strict=True))
    ]
    if not any(found):
        raise NotImplementedError(
            "its configuration has no width of a head, so fewer heads would be wider ones"
        )
    return found


def _without_heads(
    fault: NotImplementedError, name: str, plan: WidthPlan, recipe: StructureRecipe
) -> NotImplementedError:
    """The error for heads that cannot go, with what can be asked for in their place."""
    assert plan.heads is not None
    message = f"attention heads of {name} cannot be removed: {fault}"
    if not plan.changes:
        if recipe.width is not None:
            message += ". Its configuration has no number for the channels of its MLPs either"
        return NotImplementedError(message)
    return NotImplementedError(
        f"{message}. Give `width` {recipe.width} and `heads` {plan.heads.heads}: all heads stay "
        "then, and only the MLPs become narrower"
    )


def _nothing_goes(recipe: StructureRecipe, name: str, config: Any) -> Exception:
    """The error for numbers that leave everything as it is."""
    if recipe.width is None:
        return ValueError(
            f"{name} has {config.num_attention_heads} query heads, and all of them would stay: "
            "give `width` as well, so that channels of its MLPs are removed, or a smaller number"
        )
    counts = _channel_counts(recipe, config)
    if counts and all(before == after for _, before, after in counts):
        return ValueError(
            f"`width` {recipe.width} is less than one step of channels and heads of {name}, so "
            "nothing would be removed; give a larger share"
        )
    return NotImplementedError(
        f"the configuration of {name} has no number for the channels of its MLPs, and all heads "
        "stay, so nothing would be removed"
    )
