"""The searches for the blocks to remove, and for a target: by what the model predicts without them.

One step of the search for blocks removes one block. Every block that is left is a candidate: the
model without it, and without the blocks of the steps before, reads a few windows, and the KL
divergence of its next tokens from those of the dense model is measured. The candidate with the
smallest divergence is removed. Then the others are measured again, because a block may matter more
when its neighbour is missing. The steps in between measure only the better half of the candidates:
one that was far from the best is not the best one step later.

All candidates run through the model together, so a step reads each block once. A candidate shares
the hidden states of the base model up to its block, skips the block, and has its own afterwards.

A target is met by removing blocks, or by making all blocks narrower, or by some of both. First the
search for blocks runs until they meet it alone. Then models are compared that meet it differently:

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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from prunus.distributed import own_part
from prunus.methods.structured import cosine_sum, divergence_sum
from prunus.model.skeleton import Skeleton
from prunus.model.stream import Stream
from prunus.runs.loop import read_stored
from prunus.runs.plan import check_same_on_all_ranks
from prunus.structure.plan import PROBE_TOKENS, PROBE_WINDOWS, StructureJob, probe_windows
from prunus.structure.records import SearchStep, StructureRecord, TargetModel
from prunus.structure.step import ShrinkStep
from prunus.structure.width_plan import Level, TargetPlan, WidthPlan

# All candidates are measured in every fourth step. The steps in between measure the better half of
# those that the step before measured.
_FULL_STEPS = 4


def choose_blocks(
    job: StructureJob, ids: Tensor, steps: list[SearchStep], save: Callable[[], object]
) -> list[int]:
    """Positions of the blocks that stay, rising, chosen by windows `ids` (windows, tokens)."""
    count = len(job.skeleton)
    wanted = count - job.keep_blocks
    if len(steps) < wanted and job.recipe.block_rule == "cosine":
        influence = _influence(job, ids)
        while len(steps) < wanted:
            _take(job, steps, influence, "influence")
            save()
    elif len(steps) < wanted:
        probes = ids[:PROBE_WINDOWS, :PROBE_TOKENS]
        fault = search_by_divergence(job, probes, steps, save, lambda _: len(steps) == wanted)
        if fault is not None:
            raise NotImplementedError(fault)
    return blocks_left(steps, count)


def blocks_left(steps: Sequence[SearchStep], count: int) -> list[int]:
    """Positions of the blocks that stay after some steps, rising."""
    removed = {step.block for step in steps}
    return [index for index in range(count) if index not in removed]


def search_by_divergence(
    job: StructureJob,
    probes: Tensor,
    steps: list[SearchStep],
    save: Callable[[], object],
    enough: Callable[[Sequence[int]], bool],
) -> str | None:
    """Search greedily by KL divergence on some windows. Rank 0 carries it out; all ranks call it.

    Returns:
        None, or why the search has ended early: no other block of this family can be removed.
    """
    _check_room(job, probes)

    def search() -> tuple[list[dict[str, Any]], str | None]:
        count, reason = len(job.skeleton), None
        stream = Stream(job.skeleton, job.hashed_source, job.device)
        with contextlib.closing(stream):
            stream.embed([probes], None)
            first = stream.states.get(0)
            dense, _ = candidate_states(stream, first, range(count), ())
            while not enough(left := blocks_left(steps, count)):
                measured = _promising(steps, left)
                job.options.tell(
                    f"searching for block {len(steps) + 1} to remove: {len(measured)} candidates"
                )
                _, candidates = candidate_states(stream, first, left, measured)
                values = divergences(stream, probes, dense, candidates)
                try:
                    _take(job, steps, values, "divergence")
                except NotImplementedError as fault:
                    reason = str(fault)
                    break
                save()
        return [step.model_dump() for step in steps], reason

    found, reason = job.ranks.on_rank_0(search)
    steps[:] = [SearchStep.model_validate(step) for step in found]
    return reason


def _take(
    job: StructureJob,
    steps: list[SearchStep],
    values: dict[int, float],
    measure: Literal["divergence", "influence"],
) -> None:
    """Add the step that removes the block of the lowest value which the family can do without."""
    count = len(job.skeleton)
    left = blocks_left(steps, count)
    order = sorted(values.keys() & set(left), key=lambda index: (values[index], index))
    block = job.smaller_by_one(left, order)
    every = [values.get(index) if index in left else None for index in range(count)]
    steps.append(SearchStep(block=block, value=values[block], measure=measure, candidates=every))


def _promising(steps: Sequence[SearchStep], left: Sequence[int]) -> list[int]:
    """The candidates of the next step among the blocks that are left."""
    if len(steps) % _FULL_STEPS == 0:
        return list(left)
    last = steps[-1].candidates
    values = {index: value for index in left if (value := last[index]) is not None}
    return sorted(sorted(values, key=lambda index: values[index])[: max(4, len(left) // 2)])


def candidate_states(
    stream: Stream, first: Tensor, left: Sequence[int], measured: Collection[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The hidden states after the last block: of the base model, and without each candidate."""
    base, candidates = first, dict[int, Tensor]()
    for index in left:
        block = stream.skeleton.fill(index, stream.source.block(index), stream.device)
        run = stream.call(index, block)
        candidates = {other: run(hidden) for other, hidden in candidates.items()}
        if index in measured:
            candidates[index] = base
        base = stream.checked(index, run)(base)
        stream.skeleton.release(index)
    return base, candidates


def divergences(
    stream: Stream, ids: Tensor, dense: Tensor, candidates: dict[int, Tensor]
) -> dict[int, float]:
    """The KL divergence of every candidate on windows (windows, tokens), in nats per token."""
    skeleton, device = stream.skeleton, stream.device
    sums, tokens = dict.fromkeys(candidates, 0.0), 0
    with skeleton.outside_blocks(stream.source.read_outside, device, with_head=True):
        for window in range(len(ids)):  # one by one, because logits are large
            part = slice(window, window + 1)
            shape = ids[part].to(device)
            logp = skeleton.logits(shape, dense[part]).flatten(0, 1).float().log_softmax(dim=-1)
            for block, hidden in candidates.items():
                sums[block] += divergence_sum(
                    logp, skeleton.logits(shape, hidden[part]).flatten(0, 1)
                )
            tokens += len(logp)
    return {block: total / tokens for block, total in sums.items()}


def _influence(job: StructureJob, ids: Tensor) -> dict[int, float]:
    """Position of a block -> 1 less the mean cosine between the hidden states around it."""
    stream, influence = Stream(job.skeleton, job.hashed_source, job.device), dict[int, float]()
    with contextlib.closing(stream):
        own = own_part(job.ranks, ids.split(job.batch))
        stream.embed(own, None, on_device=job.hidden_states_stay)
        for index in range(len(job.skeleton)):
            block = job.skeleton.fill(index, job.source.block(index), job.device)
            forward, total = stream.checked(index, stream.forward(index, block)), 0.0
            for batch in range(len(stream)):
                output = forward(batch)
                total += cosine_sum(stream.states.get(batch), output)
                stream.states.put(batch, output)
            influence[index] = 1 - job.ranks.sum_floats([total])[0] / ids.numel()
            job.skeleton.release(index)
    return influence


def _check_room(job: StructureJob, probes: Tensor) -> None:
    width = job.skeleton.window_shape(0, probes.shape[1])[1]
    needed = (len(job.skeleton) + 3) * probes.numel() * width * job.dtype.itemsize
    if needed > job.budget:
        raise ValueError(
            f"the candidates of the search for blocks hold {needed / 1e9:.1f} GB of hidden states, "
            f"the memory budget is {job.budget / 1e9:.1f} GB: raise `memory`, or choose "
            "`block_rule` cosine"
        )


@dataclass(frozen=True)
class Candidate:
    """A model that meets the target."""

    steps: int  #: of the search for blocks, which it takes
    kept: list[int]
    level: Level | None  #: None for the width of the model

    @property
    def key(self) -> tuple[int, float | None, int | None]:
        """Its number of blocks, and its width and heads as in the recipe that makes it."""
        options = self.level.options if self.level is not None else {}
        return len(self.kept), options.get("width"), options.get("heads")


class TargetSearch:
    """The search of one run. What the record holds is not searched for again."""

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
        count = probe_windows(len(ids))
        # Models are not measured on windows they are made from, unless there are one or two.
        self._probes, self._rest = ids[:count, :PROBE_TOKENS], ids[count:] if len(ids) > 2 else ids

    def run(self) -> tuple[list[int], WidthPlan | None]:
        """The blocks of the best model, rising, and their width; None for that of the model."""

        def enough(left: Sequence[int]) -> bool:
            return len(left) == 1 or self._target.is_met(left)

        # In some families no block can be removed, and in others only a few. Then width must do.
        search_by_divergence(self._job, self._probes, self._record.search, self._save, enough)
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
