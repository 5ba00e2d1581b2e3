"""Everything that is checked and decided before a model is made smaller.

The checks of a pruning run hold here too: the measurement is a run of its windows. Added are those
of the smaller model, which is built without weights and compared with the old one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.distributed import Ranks
from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.output_folder import check_apart, check_resume, is_vacant
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.config_fields import (
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
from prunus.model.source import CheckpointSource
from prunus.pruning.job import PruningJob
from prunus.pruning.plan import plan_run
from prunus.pruning.reconstruction.batches import step_ranks
from prunus.runs.options import RunOptions
from prunus.structure.layout import check_same_blocks
from prunus.structure.recipe import StructureRecipe, kept_count
from prunus.structure.record import StructureRecord
from prunus.structure.target_plan import TargetPlan
from prunus.structure.width_layout import LayoutFinder
from prunus.structure.width_plan import WidthPlan, plan_width

__all__ = ["ExpertPlan", "SmallerModel", "StructureJob", "find_earlier_run", "plan_structure"]


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


@dataclass
class StructureJob:
    """The decisions of one run.

    Attributes:
        recipe: what goes.
        measuring: the source, its skeleton, the windows and the device.
        raw: the content of the source's config.json.
        experts: None if no expert goes.
        blocks_that_go: how many blocks go.
        width: None if no channel and no head goes; what the search for a target has found.
        target: what that search may choose from; None without a target.
    """

    recipe: StructureRecipe
    measuring: PruningJob
    raw: dict[str, Any]
    experts: ExpertPlan | None
    blocks_that_go: int
    width: WidthPlan | None = None
    target: TargetPlan | None = None

    @property
    def source(self) -> CheckpointSource:
        """The checkpoint that is made smaller."""
        assert isinstance(self.measuring.source, CheckpointSource)
        return self.measuring.source

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.measuring.ranks

    @property
    def measures_blocks(self) -> bool:
        """Whether windows go through the blocks that stay, to choose inside them or to train."""
        return self.experts is not None or self.width is not None or self.recipe.repair

    def step_ranks(self, batches: Sequence[Tensor]) -> Ranks:
        """The ranks that split the windows of one step of repair.

        Args:
            batches: token ids of the windows of all ranks.
        """
        return step_ranks(self.ranks, max(map(len, batches)), self.measuring.device)

    @property
    def skeleton(self) -> Skeleton:
        """The old model without weights."""
        return self.measuring.skeleton

    @functools.cached_property
    def full_width(self) -> Skeleton:
        """The old model without the experts that go: what becomes narrower."""
        if self.experts is None:
            return self.skeleton
        return _build(self.measuring, self.raw, {self.experts.field: self.experts.keep})[1]

    def smaller(self, made_from: Sequence[int]) -> SmallerModel:
        """The model in which only some blocks stay, with all else that the recipe asks for.

        Args:
            made_from: the old blocks that stay, in order.

        Raises:
            NotImplementedError: the family has no such model.
        """
        config = self.source.config
        self._check_images(made_from)
        text = config.get_text_config()
        changes: dict[str, Any] = without_blocks(text, made_from, len(self.skeleton))
        sizes: set[tuple[int, int]] = set()
        if self.experts is not None:
            plan = self.experts
            changes[plan.field] = plan.keep
            sizes |= {
                (plan.count, plan.keep),
                (plan.count // plan.groups, plan.keep // plan.groups),
            }
        if self.width is not None:
            changes |= self.width.changes
            sizes |= self.width.sizes
        raw, skeleton = _build(self.measuring, self.raw, changes)
        if len(skeleton) != len(made_from):
            raise NotImplementedError(
                f"the configuration of the family {config.model_type} does not say how many blocks "
                f"it has: with {changes} it has {len(skeleton)}"
            )
        check_same_blocks(self.skeleton, skeleton, made_from, sizes)
        return SmallerModel(raw, skeleton, list(made_from))

    def _check_images(self, made_from: Sequence[int]) -> None:
        """Check that blocks which are given features of images stay where they are.

        Raises:
            NotImplementedError: one of them does not; names it.
        """
        count = blocks_that_take_images(self.source.config)
        moved = next((i for i in range(count) if list(made_from[: i + 1]) != [*range(i + 1)]), None)
        if moved is not None:
            raise NotImplementedError(
                f"block {moved} of {self.measuring.model_name} cannot go: features of images are "
                f"added behind each of the first {count} blocks, so these stay in their places"
            )


def find_earlier_run(
    output: Path, recipe: StructureRecipe, overwrite: bool, resume: bool | None
) -> StructureRecord | None:
    """The record of the run in the output folder that this run resumes or finds finished.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: the run may not write into the folder.
    """
    earlier = None
    if not is_vacant(output):
        if not (output / StructureRecord.FILE).exists():
            raise FileExistsError(
                f"output {output} exists and holds no result of prunus shrink; it is left as it "
                "is. Choose another folder"
            )
        earlier = None if overwrite else StructureRecord.load(output)
    unfinished = earlier is not None and earlier.state == "running"
    check_resume(output, unfinished, resume)
    if earlier is not None:
        earlier.check_same_run(recipe)
    return earlier


def plan_structure(
    model: str | Path,
    output: Path,
    recipe: StructureRecipe,
    options: RunOptions,
    decided_dtype: str | None = None,
) -> StructureJob:
    """Check everything that needs neither weights nor text.

    Args:
        model: a checkpoint folder or a hub id.
        output: the folder of the result.
        recipe: what goes.
        options: how the work is done.
        decided_dtype: what dtype "auto" meant in the run that is resumed; None for a new run.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, OSError: the message says what was
            given, what is wrong and what is possible.
    """
    folder = resolve_folder(model)
    check_apart(output, folder)
    measuring = plan_run(model, recipe.measuring(), options, decided_dtype=decided_dtype)
    require_causal(measuring.source.config, "prunus shrink")
    raw = read_json(folder / "config.json")
    experts = _plan_experts(recipe, measuring) if recipe.experts is not None else None
    job = StructureJob(recipe, measuring, raw, experts, _blocks_that_go(recipe, measuring))

    if recipe.narrows:
        _plan_width(job)
    job.smaller(range(len(measuring.skeleton)))
    if job.blocks_that_go:
        _check_a_block_can_go(job)
    return job


def _plan_width(job: StructureJob) -> None:
    """Decide how narrow the model becomes, or between which widths a search may choose."""
    recipe, measuring = job.recipe, job.measuring
    finder = LayoutFinder(job.skeleton, job.source, measuring.device)

    def plan(at_width: StructureRecipe) -> WidthPlan:
        config = job.source.config.get_text_config()
        return plan_width(at_width, job.full_width, config, measuring.model_name, build, finder)

    def build(changes: Mapping[str, Any]) -> Skeleton:
        fewer = {job.experts.field: job.experts.keep} if job.experts is not None else {}
        return _build(measuring, job.raw, fewer | dict(changes))[1]

    if recipe.target is not None:
        job.target = TargetPlan(recipe, measuring, build, plan)
        job.target.check()
    else:
        job.width = plan(recipe)


def _build(
    job: PruningJob, raw: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[dict[str, Any], Skeleton]:
    """The content of a config.json with some fields changed, and the model that it describes.

    Raises:
        NotImplementedError: the family has no such model.
    """
    config = job.source.config
    changed = rewritten(raw, config, changes)
    try:
        return changed, Skeleton(parsed(config, changed), job.dtype, job.options.trust_remote_code)
    except Exception as fault:  # a configuration class may refuse with an error of any kind
        raise NotImplementedError(
            f"the family {config.model_type} has no model with "
            f"{', '.join(f'{name} = {value}' for name, value in changes.items())}: {fault}"
        ) from fault


def _blocks_that_go(recipe: StructureRecipe, job: PruningJob) -> int:
    """How many blocks go.

    Raises:
        ValueError: none or all would.
    """
    if recipe.blocks is None:
        return 0
    count = len(job.skeleton)
    keep = kept_count(recipe.blocks, count)
    if not 1 <= keep < count:
        said = (
            f"{recipe.blocks} would keep {keep}" if isinstance(recipe.blocks, float) else f"{keep}"
        )
        raise ValueError(
            f"blocks: {said} of the {count} blocks of {job.model_name}: possible numbers to keep "
            f"are {_ranges(range(1, count))}"
        )
    return count - keep


def _check_a_block_can_go(job: StructureJob) -> None:
    """Check that the configuration can describe the model without some block.

    Raises:
        NotImplementedError: it cannot.
    """
    every, fault = range(len(job.skeleton)), None
    for gone in every:
        try:
            job.smaller([index for index in every if index != gone])
            return
        except NotImplementedError as error:
            fault = error
    assert fault is not None
    raise fault


def _plan_experts(recipe: StructureRecipe, job: PruningJob) -> ExpertPlan:
    """How many experts stay.

    Raises:
        ValueError: the model has none, or the number does not fit; says which numbers do.
    """
    config, name = job.source.config.get_text_config(), job.model_name
    modules = [
        [module for module in block.modules() if isinstance(module, Experts)]
        for block in job.skeleton.blocks
    ]
    counts = {module.count for found in modules for module in found}
    if not counts:
        raise ValueError(
            f"{name} is not a mixture of experts, so there are no experts to remove; leave "
            "experts out"
        )
    described = expert_count(config)
    if described is None or counts != {described[1]} or max(map(len, modules)) > 1:
        raise NotImplementedError(
            f"the layers of {name} have {', '.join(map(str, sorted(counts)))} experts, which its "
            "configuration does not describe by one number; it cannot lose experts"
        )
    field, count = described
    per_token, (groups, groups_used) = experts_per_token(config), expert_groups(config)
    possible = [
        keep
        for keep in range(1, count)
        if keep % groups == 0
        and keep // groups * groups_used >= per_token
        and (groups == 1 or keep // groups >= 2)
    ]
    assert recipe.experts is not None
    keep = kept_count(recipe.experts, count)
    if keep not in possible:
        reasons = [f"a token chooses {per_token} of them"]
        if groups > 1:
            reasons.append(
                f"they form {groups} groups of one size, of which a token uses {groups_used}"
            )
        asked = recipe.experts
        said = f"{asked} would keep {keep}" if isinstance(asked, float) else f"{keep}"
        raise ValueError(
            f"experts: {said} of the {count} experts in each layer of {name}, and "
            f"{' and '.join(reasons)}: possible numbers to keep are {_ranges(possible)}"
        )
    return ExpertPlan(field, count, keep, groups)


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
