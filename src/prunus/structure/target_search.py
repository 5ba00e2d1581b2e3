"""The search for a target: remove blocks, or make all blocks narrower, or some of both.

First blocks are removed one by one, as in every search for blocks, until the target is met by them
alone. Then models are compared that meet the target in different ways:

    all blocks,      narrower: all heads stay, or some are removed with channels
    half the steps,  narrower, with the better of these two
    all the steps,   at full width

Each of them is made block by block, and is not written. It is made from other windows than it is
measured on, because it looks better than it is on those that it is fitted to. The model with the
smallest KL divergence from the dense one is then made again, from all windows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from prunus.model.skeleton import Skeleton
from prunus.model.stream import Stream
from prunus.runs.loop import read_stored
from prunus.runs.plan import check_same_on_all_ranks
from prunus.structure.blocks import (
    blocks_left,
    candidate_states,
    divergences,
    search_by_divergence,
)
from prunus.structure.plan import PROBE_TOKENS, StructureJob, probe_windows
from prunus.structure.record import StructureRecord, TargetModel
from prunus.structure.step import ShrinkStep
from prunus.structure.target_plan import Level, TargetPlan
from prunus.structure.width_plan import WidthPlan


@dataclass(frozen=True)
class Candidate:
    """A model that meets the target.

    Attributes:
        steps: how many steps of the search for blocks it takes.
        kept: positions of its blocks.
        level: their width; None for that of the model.
    """

    steps: int
    kept: list[int]
    level: Level | None

    @property
    def key(self) -> tuple[int, float | None, int | None]:
        """Its number of blocks, and its width and heads as in the recipe that makes it."""
        options = self.level.options if self.level is not None else {}
        return len(self.kept), options.get("width"), options.get("heads")


class TargetSearch:
    """The search of one run.

    Args:
        ids: calibration windows (windows, tokens).
        record: of the run. What it holds is not searched for again, and what is found is added.
    """

    def __init__(
        self,
        job: StructureJob,
        ids: Tensor,
        record: StructureRecord,
        save: Callable[[], object],
        spill_to: Path,
    ) -> None:
        assert job.target is not None
        self._job, self._record, self._save, self._spill_to = job, record, save, spill_to
        self._target: TargetPlan = job.target
        self._probes, self._rest = split_windows(ids)

    def run(self) -> tuple[list[int], WidthPlan | None]:
        """Find the model that meets the target.

        Returns:
            Positions of the blocks that stay, rising, and their width; None for that of the model.

        Raises:
            NotImplementedError: the family has no such model.
            ValueError: the search does not fit in memory.
        """
        # In some families no block can be removed, and in others only a few. Then width must do.
        search_by_divergence(
            self._job,
            self._probes,
            self._record.search,
            self._save,
            lambda left: len(left) == 1 or self._target.is_met(left),
        )
        best = self._compare()
        return best.kept, best.level.plan if best.level is not None else None

    def _compare(self) -> Candidate:
        """The best model; see above which ones are compared."""
        last = len(self._record.search)
        every = (self._narrower(steps) for steps in range(last + 1))
        candidates = next((found for found in every if found), [])
        if candidates:
            best = self._best(candidates)
            middle = (best.steps + last) // 2
            way = candidates.index(best)
            candidates = [best]
            if best.steps < middle:
                candidates += self._narrower(middle)[way : way + 1]
        if self._target.is_met(kept := self._kept(last)):
            candidates.append(Candidate(last, kept, None))
        if not candidates:
            raise NotImplementedError(
                f"{self._job.model_name} cannot reach {self._job.recipe.target}: after {last} "
                "blocks no other one can be removed, and it cannot become narrow enough"
            )
        return self._best(candidates)

    def _kept(self, steps: int) -> list[int]:
        return blocks_left(self._record.search[:steps], len(self._job.skeleton))

    def _narrower(self, steps: int) -> list[Candidate]:
        """The narrower models without the blocks of some steps."""
        kept = self._kept(steps)
        return [Candidate(steps, kept, level) for level in self._target.widths(kept)]

    def _best(self, candidates: list[Candidate]) -> Candidate:
        """The candidate with the smallest KL divergence; of equal ones the first."""
        return min(candidates, key=self._value) if len(candidates) > 1 else candidates[0]

    def _value(self, candidate: Candidate) -> float:
        """The KL divergence of a candidate: as it was recorded, or measured now."""
        blocks, width, heads = candidate.key
        for known in self._record.targets:
            if (known.blocks, known.width, known.heads) == candidate.key:
                return known.value
        if candidate.level is None and not self._job.recipe.repair:
            value = self._record.search[-1].value
        else:
            value = self._measure(candidate)
        found = TargetModel(blocks=blocks, width=width, heads=heads, value=value)
        self._record.targets.append(found)
        self._save()
        return value

    def _measure(self, candidate: Candidate) -> float:
        """Make a candidate and measure its KL divergence."""
        blocks, width, _ = candidate.key
        narrower = "full width" if width is None else f"width {width} less"
        self._job.options.tell(f"searching for the target: {blocks} blocks at {narrower}")
        job = self._job.at_level(candidate.level, len(self._rest))
        walks = check_same_on_all_ranks(job, self._record)
        smaller = job.smaller(candidate.kept)
        step = ShrinkStep(job, smaller, self._rest, walks, self._spill_to)
        with contextlib.closing(step), self._probing(smaller.skeleton) as probes:
            for place, index in enumerate(candidate.kept):
                name = job.skeleton.block_name(index)
                made = step.make(place, read_stored(name, job.source.block(index)))
                probes.propagate(place, made.tensors)

            def divergence() -> float:
                hidden = probes.states.get(0)
                return divergences(probes, self._probes, self._dense, {0: hidden})[0]

            found: float = job.ranks.on_rank_0(divergence)
        return found

    @functools.cached_property
    def _dense(self) -> Tensor:
        """The hidden states of the dense model after its last block."""
        with self._probing(self._job.skeleton) as stream:
            every = range(len(stream.skeleton))
            return candidate_states(stream, stream.states.get(0), every, ())[0]

    @contextlib.contextmanager
    def _probing(self, skeleton: Skeleton) -> Iterator[Stream]:
        """The windows on which models are compared, before the first block of one of them."""
        stream = Stream(skeleton, self._job.source, self._job.device)
        with contextlib.closing(stream):
            stream.embed([self._probes], None)
            yield stream


def split_windows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The windows that a search measures on, and those that its models are made from.

    They have none in common, unless there are only one or two windows.

    >>> import torch
    >>> [len(part) for part in split_windows(torch.zeros(20, 4))]
    [8, 12]
    >>> [len(part) for part in split_windows(torch.zeros(3, 4))]
    [1, 2]
    """
    count = probe_windows(len(ids))
    return ids[:count, :PROBE_TOKENS], ids[count:] if len(ids) > 2 else ids
