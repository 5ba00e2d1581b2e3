"""How many channels and heads stay: as a recipe asks for them.

The width of a recipe is a share to remove. Channels become fewer by this share, rounded to a number
that kernels like. Heads become fewer by it as nearly as their key-value groups allow, because every
group must keep the same number of query heads.

The model that a narrower configuration describes is built without weights, and the shapes of its
tensors are compared: once only the channels of one kind of MLP are fewer, and once only the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prunus.model.config import canonical
from prunus.model.skeleton import Skeleton
from prunus.structure.layout import check_same_blocks, shapes_of
from prunus.structure.records import StructureRecipe
from prunus.structure.width_layout import LayoutFinder, PartLayout, UnitKind

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
    """How many query heads and key-value groups stay in every block.

    A group is a key-value head with the query heads that share it. In a model without shared
    key-value heads, each query head is a group.
    """

    #: Query heads before.
    heads: int
    #: Query heads that stay.
    keep_heads: int
    #: Key-value groups before.
    groups: int
    #: Key-value groups that stay.
    keep_groups: int
    #: Channels of one head, which do not change.
    size: int

    @property
    def units(self) -> dict[UnitKind, tuple[int, int]]:
        """Heads before and after, and groups if heads share them.

        >>> HeadPlan(8, 4, 2, 1, 64).units, HeadPlan(8, 4, 8, 4, 64).units
        ({'heads': (8, 4), 'groups': (2, 1)}, {'heads': (8, 4)})
        """
        units: dict[UnitKind, tuple[int, int]] = {"heads": (self.heads, self.keep_heads)}
        if self.groups != self.heads:
            units["groups"] = (self.groups, self.keep_groups)
        return units

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """The pairs (before, after) that shapes and attributes of modules may show.

        They are the numbers of heads, of groups, and of heads per group, and the channels of each.
        """
        pairs = {
            (self.heads, self.keep_heads),
            (self.groups, self.keep_groups),
            (self.heads // self.groups, self.keep_heads // self.keep_groups),
        }
        return pairs | {(before * self.size, after * self.size) for before, after in pairs}

    def fields(self, config: Any) -> dict[str, Any]:
        """Canonical name of a field of a configuration -> its value with the heads that stay."""
        fields = {"num_attention_heads": self.keep_heads}
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = self.keep_groups
        # Without this, many classes would compute it from the number of heads.
        fields["head_dim"] = self.size
        return {canonical(config, name): value for name, value in fields.items()}


@dataclass
class WidthPlan:
    """What stays of the width of every block, and where it is in the tensors."""

    #: How many heads stay; None if all do.
    heads: HeadPlan | None
    #: For every old block, where the channels are of each MLP that becomes narrower. A routed
    #: expert is an MLP.
    mlps: list[list[PartLayout]]
    #: For every old block, where the heads are; None if the block has none or keeps all.
    attention: list[PartLayout | None]
    #: Canonical name of a field of the configuration -> its new value.
    changes: dict[str, Any] = field(default_factory=dict)
    #: The pairs (size before, size after) that shapes and attributes of modules may show.
    sizes: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class WidthPlanner:
    """Plans narrower versions of one model."""

    #: The model at full width, without weights.
    old: Skeleton
    #: The configuration of the language model alone.
    config: Any
    #: The name of the model, for messages.
    name: str
    #: Builds the model with some fields changed (canonical name -> new value), without weights.
    build: Callable[[Mapping[str, Any]], Skeleton]
    #: Finds which rows and columns are the channels and heads.
    finder: LayoutFinder

    def plan(self, recipe: StructureRecipe) -> WidthPlan:
        """Decide how many channels and heads stay, and find them in the tensors of each block.

        Raises:
            ValueError: The numbers of the recipe do not fit, or would remove nothing. The message
                names numbers that fit.
            NotImplementedError: The family has no such width.
        """
        old = self.old
        plan = WidthPlan(self._heads(recipe), [[] for _ in old.blocks], [None for _ in old.blocks])
        for name, before, after in self._channel_counts(recipe):
            # A configuration may hold the fields of another family, which change nothing.
            if after < before and (sizes := _sizes(old, narrower := self.build({name: after}))):
                for index, (block, new) in enumerate(zip(old.blocks, narrower.blocks, strict=True)):
                    plan.mlps[index] += self.finder.channels(block, new, index)
                plan.changes[name] = after
                plan.sizes |= {(before, after), *sizes}
        if plan.heads is not None:
            try:
                self._plan_heads(plan, plan.heads)
            except NotImplementedError as fault:
                raise self._without_heads(fault, plan, plan.heads, recipe.width) from fault
        if not plan.changes:
            raise self._nothing_removed(recipe)
        return plan

    def _plan_heads(self, plan: WidthPlan, heads: HeadPlan) -> None:
        """Find where the heads of each block are."""
        old = self.old
        fields = heads.fields(self.config)
        fewer = self.build(fields)
        blocks = zip(old.blocks, fewer.blocks, strict=True)
        plan.attention = [
            self.finder.heads(block, new, heads.units, index)
            for index, (block, new) in enumerate(blocks)
        ]
        if not any(plan.attention):
            raise NotImplementedError(
                "its configuration has no width of a head, so fewer heads would be wider ones"
            )
        sizes = heads.sizes | _sizes(old, fewer)
        check_same_blocks(old, fewer, range(len(old)), sizes)
        plan.changes |= fields
        plan.sizes |= sizes

    def _channel_counts(self, recipe: StructureRecipe) -> list[tuple[str, int, int]]:
        """The fields that may count channels (canonical name), and each number before and after."""
        config = self.config
        width = recipe.width
        counts: dict[str, tuple[str, int, int]] = {}
        for name in _CHANNEL_FIELDS if width is not None else ():
            before = getattr(config, name, None)
            if name == "n_inner" and before is None and hasattr(config, name):
                before = 4 * config.hidden_size  # the rule of GPT-2 and its relatives
            if isinstance(before, int) and before > 1:
                assert width is not None
                # Round to a number that hardware likes, but by at most a 32nd of all channels.
                step = next(m for m in _MULTIPLES if before % m == 0 and m <= max(1, before // 32))
                after = max(step, round(before * (1 - width) / step) * step)
                field_name = canonical(config, name)
                counts.setdefault(field_name, (field_name, before, after))
        return list(counts.values())

    def _heads(self, recipe: StructureRecipe) -> HeadPlan | None:
        """How many heads stay; None if all do."""
        config = self.config
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int) or heads < 1:
            return None
        groups = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        per_group = heads // groups
        # Pairs of query heads and groups: every group keeps n of its query heads.
        possible = [(g * n, g) for g in range(1, groups + 1) for n in range(1, per_group + 1)]
        allowed = [
            (h, g)
            for h, g in possible
            if recipe.heads in (None, h) and recipe.kv_heads in (None, g)
        ]
        if not allowed:
            numbers = {"heads": recipe.heads, "kv_heads": recipe.kv_heads}
            asked = [f"`{name}` {value}" for name, value in numbers.items() if value is not None]
            shown = ", ".join(f"{h} with {g}" for h, g in sorted(possible, reverse=True)[:12])
            raise ValueError(
                f"{' with '.join(asked)} does not fit {self.name}, whose {heads} query heads share "
                f"{groups} key-value heads, each of them {per_group}: every key-value head must "
                "keep the same number of query heads. Possible are (query heads with key-value "
                f"heads): {shown}"
            )
        if recipe.heads is None and recipe.kv_heads is not None:
            keep = max(allowed)  # whole groups alone are removed
        else:
            # The share of heads that is nearest; of equal ones, that with the most groups, because
            # then fewer keys and values are lost.
            share = 1 - (recipe.width or 0.0)
            keep = min(allowed, key=lambda pair: (abs(pair[0] / heads - share), -pair[1]))
        return None if keep == (heads, groups) else HeadPlan(heads, keep[0], groups, keep[1], size)

    def _without_heads(
        self, fault: Exception, plan: WidthPlan, heads: HeadPlan, width: float | None
    ) -> NotImplementedError:
        """The error for heads that cannot be removed, with what can be asked for instead."""
        message = f"attention heads of {self.name} cannot be removed: {fault}"
        if plan.changes:
            message += (
                f". Give `width` {width} and `heads` {heads.heads}: all heads stay then, and only "
                "the MLPs become narrower"
            )
        elif width is not None:
            message += ". Its configuration has no number for the channels of its MLPs either"
        return NotImplementedError(message)

    def _nothing_removed(self, recipe: StructureRecipe) -> Exception:
        """The error for numbers that leave everything as it is."""
        if recipe.width is None:
            return ValueError(
                f"{self.name} has {self.config.num_attention_heads} query heads, and all of them "
                "would stay: give `width` as well, so that channels of its MLPs are removed, or a "
                "smaller number"
            )
        counts = self._channel_counts(recipe)
        if counts and all(before == after for _, before, after in counts):
            return ValueError(
                f"`width` {recipe.width} is less than one step of channels and heads of "
                f"{self.name}, so nothing would be removed; give a larger share"
            )
        return NotImplementedError(
            f"the configuration of {self.name} has no number for the channels of its MLPs, and all "
            "heads stay, so nothing would be removed"
        )


def _sizes(old: Skeleton, new: Skeleton) -> set[tuple[int, int]]:
    """The pairs of lengths in which the tensors of two models differ."""
    sizes = set()
    for before, after in zip(old.blocks, new.blocks, strict=True):
        new_shapes = shapes_of(after)
        for name, shape in shapes_of(before).items():
            pairs = zip(shape, new_shapes.get(name, shape), strict=False)
            sizes |= {pair for pair in pairs if pair[0] != pair[1]}
    return sizes
