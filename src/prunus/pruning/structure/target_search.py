"""The search for a target: blocks go and all blocks become narrower, whatever costs least.

A state is a set of blocks and one width of all of them. A step either removes one more block, or
takes the next smaller width. Of each of these models the KL divergence from the dense model is
measured on a few windows, and the step is taken whose divergence grows least per parameter or byte
that the target counts. The search ends at the first state that meets the target.

The narrower models are runs of their own without repair, in folders inside the result that are
removed at the end. What the search has found is then made as in every other run: the blocks that
stay are measured again on what reaches them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.model.stream import Stream
from prunus.pruning.structure.blocks import (
    PROBE_TOKENS,
    PROBE_WINDOWS,
    candidate_states,
    check_room,
    divergences,
    promising,
)
from prunus.pruning.structure.plan import StructureJob
from prunus.pruning.structure.record import BlockStep
from prunus.pruning.structure.target_plan import TargetPlan

__all__ = ["remove_narrower", "search_target", "split_windows"]

#: The key of the model in which no further block goes.
_BASE = -1


def search_target(
    job: StructureJob,
    ids: Tensor,
    steps: list[BlockStep],
    save: Callable[[BlockStep], object],
    narrower: Callable[[float, Path], object],
    folder: Path,
) -> list[int]:
    """Find the model that meets the target, and give the job its width.

    Args:
        job: the checked run, which has a target.
        ids: calibration windows (windows, tokens).
        steps: what an earlier run has found; new steps are added.
        save: called after every step, which has just been added.
        narrower: makes the model with a share of its width removed, in a folder; goes on where it
            was interrupted.
        folder: of the result; narrower models go into folders inside.

    Returns:
        Positions of the blocks that stay, rising.

    Raises:
        NotImplementedError: no further block can go in this family, and it cannot become narrower.
    """
    plan = job.target
    assert plan is not None
    probes = split_windows(ids)[0]
    check_room(job, probes)
    kept, level = list(range(len(job.skeleton))), 0
    for step in steps:
        kept, level = _after(plan, step, kept, level)
    with torch.no_grad():
        dense = _dense(job, probes)
        while not plan.is_met(level, kept):
            step = _step(job, plan, probes, dense, steps, kept, level, narrower, folder)
            steps.append(step)
            save(step)
            kept, level = _after(plan, step, kept, level)
    job.width = plan.levels[level].plan
    return kept


def split_windows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The windows that a search reads, and those that narrower models are made with.

    They have none in common, unless there is only one window.

    >>> [len(part) for part in split_windows(torch.zeros(20, 4))]
    [8, 12]
    >>> [len(part) for part in split_windows(torch.zeros(3, 4))]
    [1, 2]
    """
    count = min(PROBE_WINDOWS, max(1, len(ids) // 2))
    return ids[:count, :PROBE_TOKENS], ids[count:] if len(ids) > 1 else ids


def remove_narrower(folder: Path) -> None:
    """Remove the folders of narrower models from a result."""
    for path in folder.glob("search-*"):
        shutil.rmtree(path)


def _after(plan: TargetPlan, step: BlockStep, kept: list[int], level: int) -> tuple[list[int], int]:
    """Blocks and level behind a step."""
    if step.block is not None:
        return [index for index in kept if index != step.block], level
    return kept, next(i for i, each in enumerate(plan.levels) if each.width == step.width)


def _step(
    job: StructureJob,
    plan: TargetPlan,
    probes: Tensor,
    dense: Tensor,
    steps: list[BlockStep],
    kept: list[int],
    level: int,
    narrower: Callable[[float, Path], object],
    folder: Path,
) -> BlockStep:
    """Measure all candidates of one step, and take the best."""
    job.width = plan.levels[level].plan
    possible = [index for index in promising(steps, kept) if _can_go(job, kept, index)]
    reached = plan.target.shown(plan.target.reached(plan.size(level, kept), plan.whole))
    job.measuring.options.tell(
        f"searching for the target: {reached}, {len(possible)} blocks and the width are candidates"
    )
    found = _measured(job, plan, probes, dense, kept, possible, level, narrower, folder)
    now, cost = found.pop(_BASE), plan.target.cost
    spent = cost(plan.size(level, kept))
    prices = {
        block: (value - now) / (spent - cost(plan.size(level, [i for i in kept if i != block])))
        for block, value in found.items()
    }
    best = min(prices, key=lambda block: (prices[block], block)) if prices else None
    every = [found.get(index) for index in range(len(job.skeleton))]
    if level + 1 < len(plan.levels):
        value = _measured(job, plan, probes, dense, kept, [], level + 1, narrower, folder)[_BASE]
        price = (value - now) / (spent - cost(plan.size(level + 1, kept)))
        if best is None or price < prices[best]:
            width = plan.levels[level + 1].width
            return BlockStep(
                block=None, width=width, value=value, measure="divergence", candidates=every
            )
    if best is None:
        raise NotImplementedError(
            f"the search for {job.recipe.target} has come to {reached}; no further block of "
            f"{job.measuring.model_name} can go, and its width cannot become smaller"
        )
    return BlockStep(block=best, value=found[best], measure="divergence", candidates=every)


def _can_go(job: StructureJob, kept: list[int], block: int) -> bool:
    """Whether the configuration can describe the model without a block."""
    if len(kept) == 1:
        return False
    try:
        job.smaller([index for index in kept if index != block])
    except NotImplementedError:
        return False
    return True


def _dense(job: StructureJob, probes: Tensor) -> Tensor:
    """The hidden states of the dense model behind its last block."""
    with _stream(job.skeleton, job.source, job, probes) as stream:
        return candidate_states(stream, stream.states.get(0), range(len(job.skeleton)), ())[0]


def _measured(
    job: StructureJob,
    plan: TargetPlan,
    probes: Tensor,
    dense: Tensor,
    kept: list[int],
    candidates: list[int],
    level: int,
    narrower: Callable[[float, Path], object],
    folder: Path,
) -> dict[int, float]:
    """The KL divergence without each candidate, and under `_BASE` that with all of them."""
    source, skeleton = job.source, job.skeleton
    if level:
        at_width = folder / f"search-{level}"
        narrower(plan.levels[level].width, at_width)
        source = CheckpointSource(at_width)
        skeleton = Skeleton(source.config, job.measuring.dtype)
        source.bind(skeleton)
    with _stream(skeleton, source, job, probes) as stream:
        base, states = candidate_states(stream, stream.states.get(0), kept, candidates)
        return divergences(stream, probes, dense, {**states, _BASE: base})


@contextlib.contextmanager
def _stream(
    skeleton: Skeleton, source: CheckpointSource, job: StructureJob, probes: Tensor
) -> Iterator[Stream]:
    stream = Stream(skeleton, source, job.measuring.device)
    with contextlib.closing(stream):
        stream.embed([probes], None)
        yield stream
