"""Everything that is checked and decided before a model is made smaller.

The smaller model is built without weights and compared with the old one, block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.engine.run_facts import open_model, run_facts
from prunus.engine.run_options import RunOptions
from prunus.engine.run_plan import RunPlan, windows_per_batch, with_memory
from prunus.engine.session import SILENT, Session
from prunus.model.config import (
    blocks_that_take_images,
    expert_count,
    expert_groups,
    experts_per_token,
    parsed,
    rewritten,
    without_blocks,
)
from prunus.model.kinds import require_causal
from prunus.model.skeleton import Skeleton
from prunus.model.source import OpenModel
from prunus.structure.structure_record import Amount, StructureRecipe
from prunus.structure.tensor_layout import check_same_blocks, experts_in


@dataclass(frozen=True)
class ExpertPlan:
    """How many experts stay in every layer."""

    #: Canonical name of the field of the configuration that counts the experts.
    field: str
    #: Experts before.
    count: int
    #: Experts that stay.
    keep: int
    #: Groups of neighbouring experts among which the router chooses; each keeps the same number.
    groups: int


@dataclass(frozen=True)
class SmallerModel:
    """The model that the run writes, without weights."""

    #: The content of its config.json.
    config: dict[str, Any]
    #: Its modules, without weights.
    skeleton: Skeleton
    #: The old position of each of its blocks, rising.
    made_from: list[int]


@dataclass(frozen=True, kw_only=True)
class StructurePlan(RunPlan):
    """The decisions of one run of shrink."""

    #: What the run was asked to remove.
    recipe: StructureRecipe
    #: How many experts stay; None if all do, or if there are none.
    experts: ExpertPlan | None
    #: How many blocks stay. Which ones, the search decides later.
    keep_blocks: int

    def describe(self, choice: Any = None) -> dict[str, Any]:
        """The plan as JSON values, with the blocks and experts that stay; None for no experts."""
        experts = None if self.experts is None else [self.experts.keep, self.experts.count]
        return super().describe() | {"kept_blocks": self.keep_blocks, "kept_experts": experts}

    @functools.cached_property
    def raw(self) -> dict[str, Any]:
        """The content of the source's config.json."""
        return self.checkpoint.folder.dense_config

    def smaller(self, made_from: Sequence[int]) -> SmallerModel:
        """The model in which only some blocks stay, with the experts that the recipe leaves.

        Args:
            made_from: The old positions of the blocks that stay, rising.

        Raises:
            NotImplementedError: The family has no such model, or its blocks would not compute what
                they did before.
        """
        config = self.source.config
        # Blocks that are given features of images keep their positions.
        fixed = blocks_that_take_images(config)
        moved = next((i for i in range(fixed) if list(made_from[: i + 1]) != [*range(i + 1)]), None)
        if moved is not None:
            raise NotImplementedError(
                f"block {moved} of {self.name} cannot be removed: features of images are "
                f"added after each of the first {fixed} blocks, so these keep their positions"
            )
        changes: dict[str, Any] = {}
        sizes: set[tuple[int, int]] = set()
        if (experts := self.experts) is not None:
            changes = {experts.field: experts.keep}
            sizes = {
                (experts.count // parts, experts.keep // parts) for parts in (1, experts.groups)
            }
        changes |= without_blocks(config.get_text_config(), made_from, len(self.skeleton))
        raw = rewritten(self.raw, config, changes)
        try:
            skeleton = Skeleton(parsed(config, raw), self.dtype, self.options.trust_remote_code)
        except Exception as fault:  # a configuration class may refuse with an error of any kind
            raise NotImplementedError(
                f"the family {config.model_type} has no model with "
                f"{', '.join(f'{name} = {value}' for name, value in changes.items())}: {fault}"
            ) from fault
        if len(skeleton) != len(made_from):
            raise NotImplementedError(
                f"the configuration of the family {config.model_type} does not say how many blocks "
                f"it has: with {changes} it has {len(skeleton)}"
            )
        check_same_blocks(self.skeleton, skeleton, made_from, sizes)
        return SmallerModel(raw, skeleton, list(made_from))

    def smaller_by_one(self, left: Sequence[int], order: Sequence[int]) -> int:
        """The first block that the model can do without.

        Args:
            left: The old positions of the blocks that are left, rising.
            order: The candidates, in the order in which they are tried; not empty.

        Raises:
            NotImplementedError: The family can do without none of them.
        """
        for block in order:
            try:
                self.smaller([index for index in left if index != block])
                break
            except NotImplementedError:
                if block == order[-1]:
                    raise
        return block


def plan_structure(
    model: str | Path,
    recipe: StructureRecipe,
    options: RunOptions,
    session: Session = SILENT,
    decided_dtype: str | None = None,
) -> StructurePlan:
    """Check all that needs neither weights nor text, and decide how much of each part stays.

    Args:
        model: A checkpoint folder or a hub id.
        recipe: What is removed.
        options: How the work is done.
        session: Who hears of a download.
        decided_dtype: What dtype "auto" meant in the run that is resumed; None for a new run.

    Raises:
        ValueError: Nothing is to be removed, a number of the recipe does not fit the model, or
            memory does not suffice.
        NotImplementedError: The family cannot lose these parts.
        FileNotFoundError, OSError: As `open_model`.
    """
    if recipe.experts is None and recipe.blocks is None:
        raise ValueError(
            "nothing is to be removed: give `experts` 0.25 or `blocks` 0.1, for example"
        )
    if options.measure_error:
        raise ValueError("prunus shrink has no option `measure_error`; leave it out")
    opened = open_model(model, options, session)
    require_causal(opened.source.config, "prunus shrink")
    facts = run_facts(
        opened,
        recipe,
        options,
        needs="norms",
        needs_inputs=True,
        adds_ridge=True,
        decided_dtype=decided_dtype,
    )
    window_tokens = opened.skeleton.window_shape(0, recipe.seqlen)[0]
    trains = "repair" if recipe.repair else ""
    every = range(len(opened.skeleton))
    keep_blocks = len(every)
    if recipe.blocks is not None:
        of = f"blocks of {opened.name}"
        keep_blocks = _checked_count("blocks", recipe.blocks, keep_blocks, every[1:], of)
    plan = StructurePlan(
        **facts,
        batch=windows_per_batch(recipe.samples, window_tokens, recipe.batch, trains),
        experts=_plan_experts(opened, recipe.experts) if recipe.experts is not None else None,
        keep_blocks=keep_blocks,
    )
    # Both build models without weights, so that a family which cannot do it is refused now.
    plan.smaller(every)
    if plan.keep_blocks < len(every):
        plan.smaller_by_one(every, every)
    # The windows also run through the old model, whose outputs repair learns.
    return with_memory(
        plan,
        dense=recipe.repair,
        trained=every if recipe.repair else (),
        extra=[0] * len(every),
    )


def _checked_count(name: str, asked: Amount, count: int, possible: Sequence[int], of: str) -> int:
    """How many of `count` parts stay, if that is possible. A share is rounded to whole parts.

    `name` is the option, `possible` the rising numbers that may stay, and `of` names the parts in
    the ValueError for any other number.

    >>> _checked_count("blocks", 0.25, 8, range(1, 8), "blocks"), _checked_count(
    ...     "experts", 6, 8, range(2, 8, 2), "experts")
    (6, 6)
    """
    keep = asked if isinstance(asked, int) else count - round(count * asked)
    if keep not in possible:
        shown = f"{asked} would keep {keep}" if isinstance(asked, float) else f"{keep}"
        numbers = ", ".join(map(str, possible)) or "none"
        if len(possible) > 2:  # all of them are multiples of one number
            step = possible[1] - possible[0]
            numbers = f"{possible[0]} to {possible[-1]}{f' in steps of {step}' if step > 1 else ''}"
        raise ValueError(
            f"`{name}` {shown} of the {count} {of}: possible numbers to keep are {numbers}"
        )
    return keep


def _plan_experts(opened: OpenModel, asked: Amount) -> ExpertPlan:
    """How many experts stay.

    Raises:
        ValueError: The model has none, or the number does not fit.
        NotImplementedError: The configuration does not describe the experts by one number.
    """
    config, name = opened.source.config.get_text_config(), opened.name
    modules = [experts_in(block) for block in opened.skeleton.blocks]
    counts = {module.count for mixtures in modules for module in mixtures}
    if not counts:
        raise ValueError(
            f"{name} is not a mixture of experts, so it has no experts to remove: leave `experts` "
            "out"
        )
    described = expert_count(config)
    if described is None or counts != {described[1]} or max(map(len, modules)) > 1:
        raise NotImplementedError(
            f"the layers of {name} have {', '.join(map(str, sorted(counts)))} experts, which its "
            "configuration does not describe by one number; it cannot lose experts"
        )
    field_name, count = described
    # A token must find enough experts in the groups that it uses. Routers rate a group by its two
    # best experts, so each of several groups keeps two.
    per_token = experts_per_token(config)
    groups, groups_used = expert_groups(config)
    possible = [
        keep
        for keep in range(1, count)
        if keep % groups == 0
        and keep // groups * groups_used >= per_token
        and (groups == 1 or keep // groups >= 2)
    ]
    of = f"experts in each layer of {name}, and a token chooses {per_token} of them"
    if groups > 1:
        of += f" and they form {groups} groups of one size, of which a token uses {groups_used}"
    keep = _checked_count("experts", asked, count, possible, of)
    return ExpertPlan(field_name, count, keep, groups)
