"""The models that a search for a target can make: which widths there are, and how large each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunus.model.config import experts_per_token
from prunus.model.experts import Experts
from prunus.model.skeleton import Skeleton
from prunus.runs.job import RunJob
from prunus.structure.recipe import StructureRecipe
from prunus.structure.target import parse_target
from prunus.structure.width_plan import WidthPlan, WidthPlanner

#: Width is removed in steps of a 128th, and at most half of it.
_PARTS, _MOST = 128, 64


@dataclass(frozen=True)
class Level:
    """One width of all blocks.

    Attributes:
        parts: how much of the width is removed, in 128ths.
        options: of the recipe that makes it: width and heads.
        plan: what stays.
        sizes: of every block of the model at this width, as the target counts.
    """

    parts: int
    options: dict[str, Any]
    plan: WidthPlan
    sizes: list[int]


class TargetPlan:
    """What a search for a target needs to know before any work.

    Attributes:
        target: what is asked for.
        whole: the size of the model as it is.
    """

    def __init__(
        self,
        job: RunJob,
        recipe: StructureRecipe,
        planner: WidthPlanner,
    ) -> None:
        assert recipe.target is not None
        self.target = parse_target(recipe.target)
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
        return self.target.is_met(self.size(kept, level), self.whole)

    def widths(self, kept: Sequence[int]) -> list[Level]:
        """The ways in which the model of some blocks meets the target by width.

        In one of them all heads stay. In the other one heads are removed together with channels.
        Heads are removed in large steps, so only as many are removed as just before the last step,
        and more channels in its place.

        Returns:
            At most two; none where that takes more than half of the width.
        """
        found = [self._widest(kept, self._heads)]
        along = self._widest(kept, None)
        if along is not None:
            before = self._level(along.parts - 1, None)
            plan = before.plan.heads if before is not None else None
            found.append(self._widest(kept, plan.keep_heads if plan else self._heads) or along)
        different: list[Level] = []
        for level in found:
            known = [other.plan.changes for other in different]
            if level is not None and level.plan.changes not in known:
                different.append(level)
        return different

    def check(self) -> None:
        """Check that the target can be met, and that something has to be removed for it."""
        target, whole, name = self.target, self.whole, self._job.model_name
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
        """The smallest loss of width with which the model of some blocks meets the target.

        None if that is more than half of the width. `heads` are the query heads to keep, or None to
        remove heads together with channels.
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
            options = {"width": parts / _PARTS, "heads": heads}
            try:
                plan = self._planner.plan(
                    self._recipe.model_copy(update={"target": None, **options})
                )
            except (ValueError, NotImplementedError):
                self._levels[parts, heads] = None
            else:
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
            experts = [module for module in block.modules() if isinstance(module, Experts)]
            unread = sum(
                _parameters(module) * max(0, module.count - per_token) // module.count
                for module in experts
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
        return {"parameters": parameters, "memory": memory, "speed": read}[self.target.kind]


def _parameters(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())
