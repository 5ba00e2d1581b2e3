"""The search for a target: blocks go, or all blocks become narrower, or some of both.

First blocks go one by one, as in every search for blocks, until the target is met by them alone.
Then models are compared that come to the target in different ways:

    all blocks,      narrower: all heads stay, or some go along with channels
    half the steps,  narrower, with the better of these two
    all the steps,   at full width

Each of them is a run of its own, in a folder inside the result that is removed once the model is
measured. It is made on other windows than it is measured on, because on those that it is fitted to
it looks better than it is. The model of the smallest KL divergence from the dense one is then made
again, on all windows.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.model.stream import Stream
from prunus.structure.blocks import (
    PROBE_TOKENS,
    PROBE_WINDOWS,
    BlockSearch,
    blocks_left,
    candidate_states,
    divergences,
)
from prunus.structure.plan import StructureJob
from prunus.structure.recipe import StructureRecipe
from prunus.structure.record import StructureRecord, TargetModel
from prunus.structure.target_plan import Level, TargetPlan

__all__ = ["TargetSearch", "remove_candidates", "split_windows"]


#: Folders of models that are measured begin with this.
_PREFIX = "search-"


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
    def options(self) -> dict[str, Any]:
        """Of the recipe that makes it."""
        width = {"width": None, "heads": None} if self.level is None else self.level.options
        return {"target": None, "blocks": len(self.kept) if self.steps else None, **width}


class TargetSearch:
    """The search of one run.

    Args:
        job: the checked run, which has a target.
        ids: calibration windows (windows, tokens).
        record: of the run. What is in it is not searched for again, and what is found is added.
        save: writes the record.
        make: makes the model of a recipe, given the number of steps of the search for blocks that
            it takes, in a folder; goes on where it was interrupted.
        folder: of the result; other models go into a folder inside.
    """

    def __init__(
        self,
        job: StructureJob,
        ids: Tensor,
        record: StructureRecord,
        save: Callable[[], object],
        make: Callable[[StructureRecipe, int, Path], object],
        folder: Path,
    ) -> None:
        assert job.target is not None
        self._job, self._record, self._save, self._make = job, record, save, make
        self._target: TargetPlan = job.target
        self._probes = split_windows(ids)[0]
        self._folder = folder

    def run(self) -> list[int]:
        """Find the model that meets the target, and give the job its width.

        Returns:
            Positions of the blocks that stay, rising.

        Raises:
            NotImplementedError: the family has no such model.
            ValueError: the search does not fit in memory.
        """
        with torch.no_grad():
            # In some families no block can go, and in others only a few can. Then width must do.
            BlockSearch(self._job, self._record.search, lambda _step: self._save()).by_divergence(
                self._probes, lambda left: len(left) == 1 or self._target.is_met(left)
            )
            best = self._compare()
        self._job.width = best.level.plan if best.level is not None else None
        return best.kept

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
                f"{self._job.measuring.model_name} cannot come to {self._job.recipe.target}: "
                f"without {last} blocks no further one can go, and it cannot become narrow enough"
            )
        return self._best(candidates)

    def _kept(self, steps: int) -> list[int]:
        return blocks_left(self._record.search[:steps], len(self._job.skeleton))

    def _narrower(self, steps: int) -> list[Candidate]:
        """The narrower models without the blocks of some steps."""
        kept = self._kept(steps)
        return [Candidate(steps, kept, level) for level in self._target.widths(kept)]

    def _best(self, candidates: list[Candidate]) -> Candidate:
        """The candidate of the smallest KL divergence; of equal ones the first."""
        return min(candidates, key=self._value) if len(candidates) > 1 else candidates[0]

    def _value(self, candidate: Candidate) -> float:
        """The KL divergence of a candidate: as it was recorded, or measured now."""
        options = candidate.options
        key = (len(candidate.kept), options["width"], options["heads"])
        for known in self._record.targets:
            if (known.blocks, known.width, known.heads) == key:
                return known.value
        if candidate.level is None and not self._job.recipe.repair:
            value = self._record.search[-1].value
        else:
            value = self._measure(candidate)
        blocks, width, heads = key
        self._record.targets.append(
            TargetModel(blocks=blocks, width=width, heads=heads, value=value)
        )
        self._save()
        self._job.ranks.on_rank_0(lambda: remove_candidates(self._folder))
        return value

    def _measure(self, candidate: Candidate) -> float:
        """Make a candidate and measure its KL divergence."""
        job, options = self._job, candidate.options
        width = "full width" if candidate.level is None else f"width {options['width']} less"
        job.measuring.options.tell(
            f"searching for the target: {len(candidate.kept)} blocks at {width}"
        )
        folder = self._folder / f"{_PREFIX}{len(self._record.targets)}"
        self._make(job.recipe.model_copy(update=options), candidate.steps, folder)

        def divergence() -> float:
            source = CheckpointSource(folder)
            skeleton = Skeleton(source.config, job.measuring.dtype)
            source.bind(skeleton)
            with self._stream(skeleton, source) as stream:
                return divergences(stream, self._probes, self._dense, {0: _output(stream)})[0]

        found: float = job.ranks.on_rank_0(divergence)
        return found

    @functools.cached_property
    def _dense(self) -> Tensor:
        """The hidden states of the dense model behind its last block."""
        with self._stream(self._job.skeleton, self._job.source) as stream:
            return _output(stream)

    @contextlib.contextmanager
    def _stream(self, skeleton: Skeleton, source: CheckpointSource) -> Iterator[Stream]:
        stream = Stream(skeleton, source, self._job.measuring.device)
        with contextlib.closing(stream):
            stream.embed([self._probes], None)
            yield stream


def split_windows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The windows that a search measures on, and those that its models are made with.

    They have none in common, unless there are only one or two windows.

    >>> [len(part) for part in split_windows(torch.zeros(20, 4))]
    [8, 12]
    >>> [len(part) for part in split_windows(torch.zeros(3, 4))]
    [1, 2]
    """
    count = min(PROBE_WINDOWS, max(1, len(ids) // 2))
    return ids[:count, :PROBE_TOKENS], ids[count:] if len(ids) > 2 else ids


def remove_candidates(folder: Path) -> None:
    """Remove the folders of models that a search has measured from a result."""
    for path in folder.glob(f"{_PREFIX}*"):
        shutil.rmtree(path)


def _output(stream: Stream) -> Tensor:
    """The hidden states of the first batch behind the last block."""
    return candidate_states(stream, stream.states.get(0), range(len(stream.skeleton)), ())[0]
