"""The models that a search for a target can make: which widths there are, and what each weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunus.model.experts import Experts
from prunus.model.skeleton import Skeleton
from prunus.pruning.job import PruningJob
from prunus.pruning.structure.config import experts_per_token
from prunus.pruning.structure.recipe import StructureRecipe
from prunus.pruning.structure.target import Size, Target, parse_target, total
from prunus.pruning.structure.width_plan import WidthPlan

__all__ = ["Level", "TargetPlan", "plan_target"]

#: A step removes this share of the width of all blocks; at most half of it goes.
_STEP, _STEPS = 1 / 16, 8


@dataclass(frozen=True)
class Level:
    """One width of all blocks.

    Attributes:
        width: the share that is removed.
        plan: what stays; None for the width of the model.
        sizes: of every block of the model at this width.
    """

    width: float
    plan: WidthPlan | None
    sizes: list[Size]


@dataclass(frozen=True)
class TargetPlan:
    """What a search for a target needs to know before any work.

    Attributes:
        target: what is asked for.
        levels: the widths, from that of the model downwards.
        outside: the size of what lies outside the blocks.
        heads: the number of heads at all widths, in a family whose heads cannot go; else None.
    """

    target: Target
    levels: list[Level]
    outside: Size
    heads: int | None = None

    def size(self, level: int, kept: Sequence[int]) -> Size:
        """The size of the model of some blocks at one width."""
        return total([self.levels[level].sizes[index] for index in kept], self.outside)

    @property
    def whole(self) -> Size:
        """The size of the model as it is."""
        return self.size(0, range(len(self.levels[0].sizes)))

    def is_met(self, level: int, kept: Sequence[int]) -> bool:
        """Whether the model of some blocks at one width meets the target."""
        return self.target.is_met(self.size(level, kept), self.whole)


def plan_target(
    recipe: StructureRecipe,
    job: PruningJob,
    build: Callable[[Mapping[str, Any]], Skeleton],
    plan_width: Callable[[StructureRecipe], WidthPlan],
) -> TargetPlan:
    """Find the widths that a search can choose from, and check that the target can be met.

    Args:
        recipe: its target and its rules for width.
        job: the source and its skeleton.
        build: the model of a configuration with some fields changed.
        plan_width: what stays at the width of a recipe.

    Raises:
        ValueError: the target cannot be met, or is met already; says what is possible.
    """
    assert recipe.target is not None
    config, old = job.source.config.get_text_config(), job.skeleton
    bytes_of = [job.source.block_nbytes(index) for index in range(len(old))]
    levels = [Level(0.0, None, _sizes(old, old, bytes_of, config))]
    heads = None
    for step in range(1, _STEPS + 1):
        changes = {"target": None, "width": step * _STEP, "heads": heads}
        at_width = recipe.model_copy(update=changes)
        try:
            plan, heads = _plan_level(at_width, config, plan_width)
        except ValueError:
            continue  # less than one channel or head would go
        except NotImplementedError:
            break  # a family that cannot become narrower loses blocks only
        known = levels[-1].plan
        if known is None or known.changes != plan.changes:
            sizes = _sizes(build(plan.changes), old, bytes_of, config)
            levels.append(Level(step * _STEP, plan, sizes))
    found = TargetPlan(parse_target(recipe.target), levels, _outside(job), heads)
    every = range(len(old))
    smallest = min((found.size(len(levels) - 1, [index]) for index in every), key=found.target.cost)
    found.target.check(found.whole, smallest, job.model_name)
    return found


def _plan_level(
    recipe: StructureRecipe, config: Any, plan_width: Callable[[StructureRecipe], WidthPlan]
) -> tuple[WidthPlan, int | None]:
    """What stays at one width, and the number of heads in a family whose heads cannot go.

    Raises:
        ValueError, NotImplementedError: of `plan_width`.
    """
    try:
        return plan_width(recipe), recipe.heads
    except NotImplementedError:
        if recipe.heads is not None:
            raise
    # Where heads cannot go, the channels of MLPs may.
    heads = getattr(config, "num_attention_heads", None)
    return plan_width(recipe.model_copy(update={"heads": heads})), heads


def _sizes(new: Skeleton, old: Skeleton, bytes_of: Sequence[int], config: Any) -> list[Size]:
    """The size of every block, whose tensors keep the dtypes in which they are stored."""
    found = []
    for block, before, stored in zip(new.blocks, old.blocks, bytes_of, strict=True):
        parameters, of_old = _parameters(block), _parameters(before)
        # Of all experts, a token reads those that it chooses.
        experts = [module for module in block.modules() if isinstance(module, Experts)]
        unread = sum(
            _parameters(module) * max(0, module.count - experts_per_token(config)) // module.count
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
