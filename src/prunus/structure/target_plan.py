"""The models that a search for a target can make: which widths there are, and what each weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunus.model.config_fields import experts_per_token
from prunus.model.experts import Experts
from prunus.model.skeleton import Skeleton
from prunus.pruning.job import PruningJob
from prunus.structure.recipe import StructureRecipe
from prunus.structure.target import Size, Target, parse_target, total
from prunus.structure.width_plan import WidthPlan

__all__ = ["Level", "TargetPlan"]

#: Width goes in steps of a 128th, and at most half of it goes.
_PARTS, _MOST = 128, 64


@dataclass(frozen=True)
class Level:
    """One width of all blocks.

    Attributes:
        parts: how much of the width goes, in 128ths.
        options: of the recipe that makes it: width and heads.
        plan: what stays.
        sizes: of every block of the model at this width.
    """

    parts: int
    options: dict[str, Any]
    plan: WidthPlan
    sizes: list[Size]


class TargetPlan:
    """What a search for a target needs to know before any work.

    Args:
        recipe: its target and its rules for width.
        job: the source and its skeleton.
        build: the model of a configuration with some fields changed.
        plan_width: what stays at the width of a recipe.

    Attributes:
        target: what is asked for.
    """

    def __init__(
        self,
        recipe: StructureRecipe,
        job: PruningJob,
        build: Callable[[Mapping[str, Any]], Skeleton],
        plan_width: Callable[[StructureRecipe], WidthPlan],
    ) -> None:
        assert recipe.target is not None
        self.target: Target = parse_target(recipe.target)
        self._recipe, self._job, self._build, self._plan_width = recipe, job, build, plan_width
        self._config = job.source.config.get_text_config()
        self._bytes = [job.source.block_nbytes(index) for index in range(len(job.skeleton))]
        self._outside = _outside(job)
        self._full = self._sizes(job.skeleton)
        self._levels: dict[tuple[int, int | None], Level | None] = {}

    @property
    def whole(self) -> Size:
        """The size of the model as it is."""
        return total(self._full, self._outside)

    def size(self, kept: Sequence[int], level: Level | None = None) -> Size:
        """The size of the model of some blocks, at full width or another."""
        sizes = self._full if level is None else level.sizes
        return total([sizes[index] for index in kept], self._outside)

    def is_met(self, kept: Sequence[int], level: Level | None = None) -> bool:
        """Whether the model of some blocks meets the target, at full width or another."""
        return self.target.is_met(self.size(kept, level), self.whole)

    def widest(self, kept: Sequence[int], heads: int | None) -> Level | None:
        """The smallest loss of width with which the model of some blocks meets the target.

        Args:
            kept: positions of the blocks.
            heads: query heads to keep; None if they go along with the channels.

        Returns:
            None if it takes more than half of the width, or the family has no such width.
        """
        low, high = 0, _MOST
        if not self._meets(kept, high, heads):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._meets(kept, middle, heads) else (middle, high)
        return self._level(high, heads)

    def widths(self, kept: Sequence[int]) -> list[Level]:
        """The ways in which the model of some blocks meets the target by width.

        In one of them all heads stay. In the other they go along with the channels, but as many
        stay as just before they go in a step: what is missing then, channels make up for.

        Returns:
            At most two; none where that takes more than half of the width.
        """
        found = [self.widest(kept, self._heads)]
        along = self.widest(kept, None)
        if along is not None:
            before = self._level(along.parts - 1, None)
            plan = before.plan.heads if before is not None else None
            found.append(self.widest(kept, plan.keep_heads if plan else self._heads) or along)
        different: list[Level] = []
        for level in found:
            known = [other.plan.changes for other in different]
            if level is not None and level.plan.changes not in known:
                different.append(level)
        return different

    @property
    def _heads(self) -> int | None:
        """The number of query heads; None in a family that has none."""
        return getattr(self._config, "num_attention_heads", None)

    def check(self) -> None:
        """Check that the target can be met, and that something has to go for it.

        Raises:
            ValueError: it cannot, or nothing has to go; says what is possible.
        """
        levels = [None, self._level(_MOST, None), self._level(_MOST, self._heads)]
        one_block = [
            self.size([index], level) for index in range(len(self._full)) for level in levels
        ]
        self.target.check(self.whole, min(one_block, key=self.target.cost), self._job.model_name)

    def _meets(self, kept: Sequence[int], parts: int, heads: int | None) -> bool:
        level = self._level(parts, heads)
        return level is not None and self.is_met(kept, level)

    def _level(self, parts: int, heads: int | None) -> Level | None:
        """The width without some parts; None where there is none, or nothing would go."""
        if (parts, heads) not in self._levels:
            options = {"width": parts / _PARTS, "heads": heads}
            try:
                plan = self._plan_width(self._recipe.model_copy(update={"target": None, **options}))
            except (ValueError, NotImplementedError):
                self._levels[parts, heads] = None
            else:
                sizes = self._sizes(self._build(plan.changes))
                self._levels[parts, heads] = Level(parts, options, plan, sizes)
        return self._levels[parts, heads]

    def _sizes(self, new: Skeleton) -> list[Size]:
        """The size of every block, whose tensors keep the dtypes in which they are stored."""
        found, per_token = [], experts_per_token(self._config)
        blocks = zip(new.blocks, self._job.skeleton.blocks, self._bytes, strict=True)
        for block, before, stored in blocks:
            parameters, of_old = _parameters(block), _parameters(before)
            # Of all experts, a token reads those that it chooses.
            experts = [module for module in block.modules() if isinstance(module, Experts)]
            unread = sum(
                _parameters(module) * max(0, module.count - per_token) // module.count
                for module in experts
            )
            memory = stored * parameters // of_old
            found.append(Size(parameters, memory, memory * (parameters - unread) // parameters))
        return found


def _parameters(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def _outside(job: PruningJob) -> Size:
    """What lies outside the blocks. Of it, a token reads the head."""
    source: Any = job.source
    info = source.checkpoint.tensors
    memory = sum(info[key].nbytes for key in source.outside_keys())
    head: Any = job.skeleton.model.get_output_embeddings()
    read = head.weight.numel() * source.stored_dtype.itemsize if head is not None else 0
    return Size(0, memory, read)
