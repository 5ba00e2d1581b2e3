"""Everything that is checked and decided before a model is made smaller.

The smaller model is built without weights and compared with the old one, block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunus.methods.statistics import Needs
from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.config import (
    blocks_that_take_images,
    expert_count,
    expert_groups,
    experts_per_token,
    parsed,
    rewritten,
    without_blocks,
)
from prunus.model.experts import Experts
from prunus.model.kinds import require_causal
from prunus.model.skeleton import Skeleton
from prunus.pruning.reconstruction.reconstruct_block import training_bytes
from prunus.runs.job import RunJob, windows_per_batch
from prunus.runs.options import RunOptions
from prunus.runs.plan import check_memory, open_model
from prunus.structure.layout import check_same_blocks
from prunus.structure.recipe import StructureRecipe, kept_count
from prunus.structure.target_plan import Level, TargetPlan
from prunus.structure.width_layout import LayoutFinder
from prunus.structure.width_plan import WidthPlan, WidthPlanner

#: A search reads this many windows, cut to this many tokens, as one batch.
PROBE_WINDOWS, PROBE_TOKENS = 8, 128


def probe_windows(windows: int) -> int:
    """How many windows a search for a target reads; it makes its models from the others."""
    return min(PROBE_WINDOWS, max(1, windows // 2))


@dataclass(frozen=True)
class ExpertPlan:
    """How many experts stay in every layer.

    Attributes:
        field: the canonical name of their number in the configuration.
        count, keep: experts before and after.
        groups: groups of neighbouring experts, each of which keeps the same number.
    """

    field: str
    count: int
    keep: int
    groups: int


@dataclass(frozen=True)
class SmallerModel:
    """The model that the run writes.

    Attributes:
        config: the content of its config.json.
        skeleton: the model without weights.
        made_from: the old block of each of its blocks.
    """

    config: dict[str, Any]
    skeleton: Skeleton
    made_from: list[int]


@dataclass(kw_only=True)
class StructureJob(RunJob):
    """The decisions of one run of shrink.

    Attributes:
        raw: the content of the source's config.json.
        experts: None if all experts stay.
        keep_blocks: how many blocks stay.
        width: None if all channels and heads stay; what the search for a target has found.
        target: what that search may choose from; None without a target.
    """

    recipe: StructureRecipe
    raw: dict[str, Any] = field(default_factory=dict)
    experts: ExpertPlan | None = None
    keep_blocks: int = 0
    width: WidthPlan | None = None
    target: TargetPlan | None = None

    @property
    def runs_dense_stream(self) -> bool:
        return self.recipe.repair

    def training_bytes(self, index: int) -> tuple[int, int]:
        return training_bytes(self, index) if self.recipe.repair else (0, 0)

    @property
    def measures_blocks(self) -> bool:
        """Whether windows run through the blocks that stay, to choose inside them or to train."""
        return self.experts is not None or self.width is not None or self.recipe.repair

    @functools.cached_property
    def full_width(self) -> Skeleton:
        """The old model with only the experts that stay: what becomes narrower."""
        return self.skeleton if self.experts is None else self.build({})[1]

    def build(self, changes: Mapping[str, Any]) -> tuple[dict[str, Any], Skeleton]:
        """The model with fewer experts and other changes of the configuration.

        Args:
            changes: canonical name of a field -> its new value.

        Returns:
            The content of its config.json, and the model without weights.
        """
        fewer = {self.experts.field: self.experts.keep} if self.experts is not None else {}
        config, changes = self.source.config, fewer | dict(changes)
        changed, trust = rewritten(self.raw, config, changes), self.options.trust_remote_code
        try:
            return changed, Skeleton(parsed(config, changed), self.dtype, trust)
        except Exception as fault:  # a configuration class may refuse with an error of any kind
            raise NotImplementedError(
                f"the family {config.model_type} has no model with "
                f"{', '.join(f'{name} = {value}' for name, value in changes.items())}: {fault}"
            ) from fault

    def smaller(self, made_from: Sequence[int]) -> SmallerModel:
        """The model in which only some blocks stay, with all else that the recipe asks for."""
        config = self.source.config
        self._check_images(made_from)
        changes: dict[str, Any] = without_blocks(
            config.get_text_config(), made_from, len(self.skeleton)
        )
        sizes: set[tuple[int, int]] = set()
        if (plan := self.experts) is not None:
            sizes |= {
                (plan.count, plan.keep),
                (plan.count // plan.groups, plan.keep // plan.groups),
            }
        if self.width is not None:
            changes |= self.width.changes
            sizes |= self.width.sizes
        raw, skeleton = self.build(changes)
        if len(skeleton) != len(made_from):
            raise NotImplementedError(
                f"the configuration of the family {config.model_type} does not say how many blocks "
                f"it has: with {changes} it has {len(skeleton)}"
            )
        check_same_blocks(self.skeleton, skeleton, made_from, sizes)
        return SmallerModel(raw, skeleton, list(made_from))

    def _check_images(self, made_from: Sequence[int]) -> None:
        """Check that blocks which are given features of images keep their positions."""
        count = blocks_that_take_images(self.source.config)
        moved = next((i for i in range(count) if list(made_from[: i + 1]) != [*range(i + 1)]), None)
        if moved is not None:
            raise NotImplementedError(
                f"block {moved} of {self.model_name} cannot be removed: features of images are "
                f"added after each of the first {count} blocks, so these keep their positions"
            )

    def at_level(self, level: Level | None, samples: int) -> StructureJob:
        """The job of making a model of one width from some windows, without a search.

        Args:
            level: its width; None for that of the model.
        """
        recipe = self.recipe.model_copy(update={"samples": samples})
        width = level.plan if level is not None else None
        job = replace(self, recipe=recipe, width=width, target=None)
        job.batch = _batch(job)
        job.measure_memory()
        return job


def plan_structure(
    model: str | Path,
    recipe: StructureRecipe,
    options: RunOptions,
    decided_dtype: str | None = None,
) -> StructureJob:
    """Check everything that needs neither weights nor text.

    Args:
        decided_dtype: what dtype "auto" meant in the run that is resumed; None for a new run.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, OSError: the message says what was
            given, what is wrong and what is possible.
    """
    needs: Needs = "gram" if recipe.narrows else "norms"
    job = StructureJob(
        **open_model(
            model,
            recipe,
            options,
            needs=needs,
            needs_inputs=True,
            adds_ridge=True,
            decided_dtype=decided_dtype,
            check=lambda source, _: require_causal(source.config, "prunus shrink"),
        )
    )
    job.batch = _batch(job)
    job.raw = read_json(job.checkpoint.checkpoint.folder / "config.json")
    job.experts = _plan_experts(job) if recipe.experts is not None else None
    job.keep_blocks = _kept_blocks(job)
    if recipe.narrows:
        _plan_width(job)
    job.smaller(range(len(job.skeleton)))
    if job.keep_blocks < len(job.skeleton):
        _check_a_block_can_be_removed(job)
    job.measure_memory()
    check_memory(job)
    return job


def _batch(job: StructureJob) -> int:
    """Windows per forward pass. Repair takes a step per batch, so by default one window."""
    recipe, window_tokens = job.recipe, job.skeleton.window_shape(0, job.recipe.seqlen)[0]
    by_default = 1 if recipe.repair else windows_per_batch(recipe.samples, window_tokens)
    batch = recipe.batch if recipe.batch is not None else by_default
    if recipe.repair and recipe.samples <= batch:
        raise ValueError(
            "repair trains on some batches and validates on others: "
            f"{recipe.samples} windows in batches of {batch} are one batch; give more `samples` or "
            "a smaller `batch`"
        )
    return batch


def _plan_width(job: StructureJob) -> None:
    """Decide how narrow the model becomes, or between which widths a search may choose."""
    planner = WidthPlanner(
        old=job.full_width,
        config=job.source.config.get_text_config(),
        name=job.model_name,
        build=lambda changes: job.build(changes)[1],
        finder=LayoutFinder(job.skeleton, job.source, job.device),
    )
    if job.recipe.target is not None:
        job.target = TargetPlan(job, job.recipe, planner)
        job.target.check()
        # The models of the search are made from fewer windows, of which repair needs two batches.
        job.at_level(None, max(2, job.recipe.samples - probe_windows(job.recipe.samples)))
    else:
        job.width = planner.plan(job.recipe)


def _kept_blocks(job: StructureJob) -> int:
    """How many blocks stay, apart from those that a search for a target removes."""
    asked, count = job.recipe.blocks, len(job.skeleton)
    if asked is None:
        return count
    keep = kept_count(asked, count)
    if not 1 <= keep < count:
        raise ValueError(
            f"`blocks` {_asked(asked, keep)} of the {count} blocks of {job.model_name}: possible "
            f"numbers to keep are {_ranges(range(1, count))}"
        )
    return keep


def _check_a_block_can_be_removed(job: StructureJob) -> None:
    """Check that the configuration can describe the model without some block."""
    every, fault = range(len(job.skeleton)), None
    for removed in every:
        try:
            job.smaller([index for index in every if index != removed])
            return
        except NotImplementedError as error:
            fault = error
    assert fault is not None
    raise fault


def _plan_experts(job: StructureJob) -> ExpertPlan:
    """How many experts stay."""
    config, name, asked = job.source.config.get_text_config(), job.model_name, job.recipe.experts
    modules = [
        [module for module in block.modules() if isinstance(module, Experts)]
        for block in job.skeleton.blocks
    ]
    counts = {module.count for found in modules for module in found}
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
    known, count = described
    per_token, (groups, groups_used) = experts_per_token(config), expert_groups(config)
    possible = [
        keep
        for keep in range(1, count)
        if keep % groups == 0
        and keep // groups * groups_used >= per_token
        and (groups == 1 or keep // groups >= 2)
    ]
    assert asked is not None
    keep = kept_count(asked, count)
    if keep not in possible:
        reasons = [f"a token chooses {per_token} of them"]
        if groups > 1:
            reasons.append(
                f"they form {groups} groups of one size, of which a token uses {groups_used}"
            )
        raise ValueError(
            f"`experts` {_asked(asked, keep)} of the {count} experts in each layer of {name}, and "
            f"{' and '.join(reasons)}: possible numbers to keep are {_ranges(possible)}"
        )
    return ExpertPlan(known, count, keep, groups)


def _asked(amount: float | int, keep: int) -> str:
    return f"{amount} would keep {keep}" if isinstance(amount, float) else f"{keep}"


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as people write them.

    >>> _ranges([2, 3, 4, 5, 6]), _ranges([4, 8, 12]), _ranges([])
    ('2 to 6', '4, 8, 12', 'none')
    """
    if not numbers:
        return "none"
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "…", *shown[-3:]])
