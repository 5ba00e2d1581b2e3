"""How many channels and heads stay: as a recipe asks for them, or as a target needs them.

The model that a narrower configuration describes is built without weights, and the shapes of its
tensors are compared: once only the channels of one kind of MLP are fewer, and once only the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prunus.model.config import canonical, experts_per_token
from prunus.model.skeleton import Skeleton
from prunus.runs.job import RunJob
from prunus.structure.layout import check_same_blocks, experts_in, shapes_of
from prunus.structure.records import StructureRecipe, parse_target
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
    """Query heads and key-value groups before and after, and the width of a head."""

    heads: int
    keep_heads: int
    groups: int
    keep_groups: int
    size: int

    @property
    def units(self) -> dict[UnitKind, tuple[int, int]]:
        """Heads before and after, and groups if heads share them."""
        found: dict[UnitKind, tuple[int, int]] = {"heads": (self.heads, self.keep_heads)}
        if self.groups != self.heads:
            found["groups"] = (self.groups, self.keep_groups)
        return found

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """Numbers of heads and groups, and of their channels, before and after."""
        pairs = {
            (self.heads, self.keep_heads),
            (self.groups, self.keep_groups),
            (self.heads // self.groups, self.keep_heads // self.keep_groups),
        }
        return pairs | {(before * self.size, after * self.size) for before, after in pairs}

    def fields(self, config: Any) -> dict[str, Any]:
        """The fields of a configuration that count heads -> their new values."""
        fields = {"num_attention_heads": self.keep_heads}
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = self.keep_groups
        # Without this, many classes would compute it from the number of heads.
        fields["head_dim"] = self.size
        return {canonical(config, name): value for name, value in fields.items()}


@dataclass
class WidthPlan:
    """What stays in every block.

    Attributes:
        heads: None if all stay.
        mlps: of every old block, where the channels of its MLPs are; a routed expert is an MLP.
        attention: of every old block, where the heads are; None if all of them stay.
        changes: canonical name of a field of the configuration -> its new value.
        sizes: pairs of sizes before and after that shapes and attributes may show.
    """

    heads: HeadPlan | None
    mlps: list[list[PartLayout]]
    attention: list[PartLayout | None]
    changes: dict[str, Any] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class WidthPlanner:
    """Plans narrower versions of one model."""

    old: Skeleton
    config: Any  #: of the language model alone
    name: str
    build: Callable[[Mapping[str, Any]], Skeleton]  #: the model with some fields changed
    finder: LayoutFinder

    def plan(self, recipe: StructureRecipe) -> WidthPlan:
        """Decide how many channels and heads stay."""
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
        old, fields = self.old, heads.fields(self.config)
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
        """The fields that may count channels, and each number before and after."""
        config, width = self.config, recipe.width
        found: dict[str, tuple[str, int, int]] = {}
        for name in _CHANNEL_FIELDS if width is not None else ():
            before = getattr(config, name, None)
            if name == "n_inner" and before is None and hasattr(config, name):
                before = 4 * config.hidden_size  # the rule of GPT-2 and its relatives
            if isinstance(before, int) and before > 1:
                assert width is not None
                # Round to a number that hardware likes, but by at most a 32nd of all channels.
                step = next(m for m in _MULTIPLES if before % m == 0 and m <= max(1, before // 32))
                after = max(step, round(before * (1 - width) / step) * step)
                known = canonical(config, name)
                found.setdefault(known, (known, before, after))
        return list(found.values())

    def _heads(self, recipe: StructureRecipe) -> HeadPlan | None:
        """How many heads stay; None if all do."""
        config = self.config
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int) or heads < 1:
            return None
        groups = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        per_group = heads // groups
        possible = [(g * n, g) for g in range(1, groups + 1) for n in range(1, per_group + 1)]
        wanted = [
            (h, g)
            for h, g in possible
            if recipe.heads in (None, h) and recipe.kv_heads in (None, g)
        ]
        if not wanted:
            given = {"heads": recipe.heads, "kv_heads": recipe.kv_heads}
            asked = [f"`{name}` {value}" for name, value in given.items() if value is not None]
            shown = ", ".join(f"{h} with {g}" for h, g in sorted(possible, reverse=True)[:12])
            raise ValueError(
                f"{' with '.join(asked)} does not fit {self.name}, whose {heads} query heads share "
                f"{groups} key-value heads, each of them {per_group}: every key-value head must "
                "keep the same number of query heads. Possible are (query heads with key-value "
                f"heads): {shown}"
            )
        if recipe.heads is None and recipe.kv_heads is not None:
            keep = max(wanted)
        else:
            share = 1 - (recipe.width or 0.0)
            keep = min(wanted, key=lambda x: (abs(x[0] / heads - share), -x[1]))
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
    found = set()
    for before, after in zip(old.blocks, new.blocks, strict=True):
        now = shapes_of(after)
        for name, shape in shapes_of(before).items():
            pairs = zip(shape, now.get(name, shape), strict=False)
            found |= {pair for pair in pairs if pair[0] != pair[1]}
    return found


#: Width is removed in steps of a 128th, and at most half of it.
_PARTS, _MOST = 128, 64


@dataclass(frozen=True)
class Level:
    """One width of all blocks."""

    parts: int  #: how much of the width is removed, in 128ths
    options: dict[str, Any]  #: of the recipe that makes it: width and heads
    plan: WidthPlan
    sizes: list[int]  #: of every block of the model at this width, as the target counts


class TargetPlan:
    """What a search for a target needs to know before any work."""

    def __init__(self, job: RunJob, recipe: StructureRecipe, planner: WidthPlanner) -> None:
        assert recipe.target is not None
        self._target = parse_target(recipe.target)
        self._recipe, self._job, self._planner = recipe, job, planner
        self._bytes = [job.source.block_nbytes(index) for index in range(len(job.skeleton))]
        self._outside = self._size_outside()
        self._full = self._sizes(job.skeleton)
        self.whole = sum(self._full) + self._outside
        self._levels: dict[tuple[int, int | None], Level | None] = {}

    def size(self, kept: Sequence[int], level: Level | None = None) -> int:
        """The size of the model of some blocks, at full width or another."""
        sizes = self._full if level is None else level.sizes
        return sum(sizes[index] for index in kept) + self._outside

    def is_met(self, kept: Sequence[int], level: Level | None = None) -> bool:
        """Whether the model of some blocks meets the target, at full width or another."""
        return self._target.is_met(self.size(kept, level), self.whole)

    def widths(self, kept: Sequence[int]) -> list[Level]:
        """The widths with which the model of some blocks meets the target: at most two.

        In one of them all heads stay. In the other one heads are removed together with channels.
        Heads are removed in large steps, so only as many are removed as just before the last step,
        and more channels in its place.
        """
        first, second = self._widest(kept, self._heads), self._widest(kept, None)
        if second is not None:
            before = self._level(second.parts - 1, None)
            plan = before.plan.heads if before is not None else None
            second = self._widest(kept, plan.keep_heads if plan else self._heads) or second
        if first is not None and second is not None and first.plan.changes == second.plan.changes:
            second = None
        return [level for level in (first, second) if level is not None]

    def check(self) -> None:
        """Check that the target can be met, and that something has to be removed for it."""
        target, whole, name = self._target, self.whole, self._job.model_name
        levels = [None, self._level(_MOST, None), self._level(_MOST, self._heads)]
        every = range(len(self._full))
        smallest = min(self.size([index], level) for index in every for level in levels)
        already = target.is_met(whole, whole)
        if already or not target.is_met(smallest, whole):
            low, high = (target.shown(target.reached(size, whole)) for size in (smallest, whole))
            raise ValueError(
                f"`target` {target.shown(target.value)}: {name} "
                f"{'already meets it' if already else 'cannot become so small'}; possible is "
                f"anything between {low} and {high}, which is the model as it is"
            )

    @property
    def _heads(self) -> int | None:
        """The number of query heads; None in a family that has none."""
        return getattr(self._planner.config, "num_attention_heads", None)

    def _widest(self, kept: Sequence[int], heads: int | None) -> Level | None:
        """The smallest loss of width, up to half of it, with which some blocks meet the target.

        `heads` are the query heads to keep, or None to remove heads together with channels.
        """

        def meets(parts: int) -> bool:
            level = self._level(parts, heads)
            return level is not None and self.is_met(kept, level)

        low, high = 0, _MOST
        if not meets(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return self._level(high, heads)

    def _level(self, parts: int, heads: int | None) -> Level | None:
        """The width without some parts; None where there is none, or nothing would be removed."""
        if (parts, heads) not in self._levels:
            self._levels[parts, heads] = None
            options = {"width": parts / _PARTS, "heads": heads}
            recipe = self._recipe.model_copy(update={"target": None, **options})
            try:
                plan = self._planner.plan(recipe)
            except (ValueError, NotImplementedError):
                return None
            sizes = self._sizes(self._planner.build(plan.changes))
            self._levels[parts, heads] = Level(parts, options, plan, sizes)
        return self._levels[parts, heads]

    def _sizes(self, new: Skeleton) -> list[int]:
        """The size of every block, whose tensors keep the dtypes in which they are stored."""
        found, per_token = [], experts_per_token(self._planner.config)
        blocks = zip(new.blocks, self._job.skeleton.blocks, self._bytes, strict=True)
        for block, before, stored in blocks:
            parameters = _parameters(block)
            memory = stored * parameters // _parameters(before)
            # Of all experts, a token reads those that it chooses.
            unread = sum(
                _parameters(experts) * max(0, experts.count - per_token) // experts.count
                for experts in experts_in(block)
            )
            read = memory * (parameters - unread) // parameters
            found.append(self._counted(parameters, memory, read))
        return found

    def _size_outside(self) -> int:
        """The size of all that is outside the blocks. Of it, a token reads the head."""
        source: Any = self._job.source
        info = source.checkpoint.tensors
        memory = sum(info[key].nbytes for key in source.outside_keys())
        head: Any = self._job.skeleton.model.get_output_embeddings()
        read = head.weight.numel() * source.stored_dtype.itemsize if head is not None else 0
        return self._counted(0, memory, read)

    def _counted(self, parameters: int, memory: int, read: int) -> int:
        return {"parameters": parameters, "memory": memory, "speed": read}[self._target.kind]


def _parameters(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())
