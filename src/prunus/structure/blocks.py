"""Which blocks go: found by measuring what the model says without them.

One step of the search removes one block. Every block that is left is a candidate: the model without
it, and without the blocks that are gone, reads a few windows, and the KL divergence of its next
tokens from those of the dense model is measured. The candidate with the smallest one goes. Then all
are measured again, because a block may be worth more when its neighbour is gone. The worse half of
the candidates sits out the steps in between: who was far behind is not the best one step later.

All candidates travel through the model together, so a step reads each block once. A candidate's
windows are those of the base model up to its block, jump over it, and then run on their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from prunus.distributed import own_part
from prunus.methods.structured.blocks import cosine_sum, divergence_sum
from prunus.model.stream import Stream
from prunus.structure.plan import StructureJob
from prunus.structure.record import BlockStep

__all__ = [
    "PROBE_TOKENS",
    "PROBE_WINDOWS",
    "BlockSearch",
    "blocks_left",
    "candidate_states",
    "choose_blocks",
    "divergences",
]

#: A search reads this many windows, cut to this many tokens, as one batch.
PROBE_WINDOWS, PROBE_TOKENS = 8, 128
# All candidates are measured in every fourth step. The steps in between measure the better half of
# those that the step before measured.
_FULL_STEPS = 4


def choose_blocks(
    job: StructureJob,
    ids: Tensor,
    steps: list[BlockStep],
    save: Callable[[BlockStep], object],
) -> list[int]:
    """Choose the blocks that stay.

    Args:
        job: the checked run.
        ids: calibration windows (windows, tokens).
        steps: what an earlier run has found; new steps are added.
        save: called after every step, which has just been added.

    Returns:
        Positions of the blocks that stay, rising.

    Raises:
        NotImplementedError: no more blocks can go in this family.
        ValueError: the candidates do not fit in memory.
    """
    search, stay = BlockSearch(job, steps, save), len(job.skeleton) - job.blocks_that_go
    if len(search.left) > stay:
        with torch.no_grad():
            if job.recipe.block_rule == "cosine":
                search.by_cosine(ids)
            else:
                probes = ids[:PROBE_WINDOWS, :PROBE_TOKENS]
                fault = search.by_divergence(probes, lambda left: len(left) == stay)
                if fault is not None:
                    raise NotImplementedError(fault)
    return search.left


def blocks_left(steps: Sequence[BlockStep], count: int) -> list[int]:
    """Positions of the blocks that stay behind some steps, rising."""
    gone = {step.block for step in steps}
    return [index for index in range(count) if index not in gone]


class BlockSearch:
    """The search of one run.

    Args:
        job: the checked run.
        steps: what an earlier run has found; new steps are added.
        save: called after every step, which has just been added.
    """

    def __init__(
        self, job: StructureJob, steps: list[BlockStep], save: Callable[[BlockStep], object]
    ) -> None:
        self._job, self._steps, self._save = job, steps, save

    @property
    def left(self) -> list[int]:
        """Positions of the blocks that stay, rising."""
        return blocks_left(self._steps, len(self._job.skeleton))

    def by_divergence(self, probes: Tensor, enough: Callable[[Sequence[int]], bool]) -> str | None:
        """Search greedily by KL divergence. Rank 0 carries it out; all ranks call it.

        Args:
            probes: the windows that are read (windows, tokens).
            enough: whether the search ends with the blocks that are left.

        Returns:
            None, or why the search has ended early: no further block can go in this family.

        Raises:
            ValueError: the candidates do not fit in memory.
        """
        _check_room(self._job, probes)

        def search() -> tuple[list[dict[str, Any]], str | None]:
            reason = None
            try:
                self._take_steps(probes, enough)
            except NotImplementedError as fault:
                reason = str(fault)
            return [step.model_dump() for step in self._steps], reason

        found, reason = self._job.ranks.on_rank_0(search)
        self._steps[:] = [BlockStep.model_validate(step) for step in found]
        return reason

    def by_cosine(self, ids: Tensor) -> None:
        """ShortGPT's rule: one pass over all windows, and the blocks of the lowest influence go.

        Args:
            ids: calibration windows (windows, tokens).

        Raises:
            NotImplementedError: no more blocks can go in this family.
        """
        influence = _influence(self._job, ids)
        while len(self._steps) < self._job.blocks_that_go:
            self._take(influence, "influence")

    def _take_steps(self, probes: Tensor, enough: Callable[[Sequence[int]], bool]) -> None:
        """The steps of the search by KL divergence.

        Raises:
            NotImplementedError: no further block can go.
        """
        job = self._job
        stream = Stream(job.skeleton, job.source, job.measuring.device)
        with contextlib.closing(stream):
            stream.embed([probes], None)
            first = stream.states.get(0)
            dense, _ = candidate_states(stream, first, range(len(job.skeleton)), ())
            while not enough(left := self.left):
                measured = _promising(self._steps, left)
                number = len(self._steps) + 1
                job.measuring.options.tell(
                    f"searching for block {number} to remove: {len(measured)} candidates"
                )
                _, candidates = candidate_states(stream, first, left, measured)
                self._take(divergences(stream, probes, dense, candidates), "divergence")

    def _take(self, values: dict[int, float], measure: Literal["divergence", "influence"]) -> None:
        """Take the candidate of the lowest value whose model the configuration can describe.

        Raises:
            NotImplementedError: there is none.
        """
        left, fault = self.left, None
        for block in sorted(values.keys() & set(left), key=lambda index: (values[index], index)):
            try:
                self._job.smaller([index for index in left if index != block])
            except NotImplementedError as error:
                fault = error
                continue
            count = len(self._job.skeleton)
            every = [values.get(index) if index in left else None for index in range(count)]
            step = BlockStep(block=block, value=values[block], measure=measure, candidates=every)
            self._steps.append(step)
            self._save(step)
            return
        assert fault is not None
        raise fault


def _promising(steps: Sequence[BlockStep], left: Sequence[int]) -> list[int]:
    """The candidates of the next step among the blocks that are left."""
    if len(steps) % _FULL_STEPS == 0:
        return list(left)
    last = steps[-1].candidates
    values = {index: value for index in left if (value := last[index]) is not None}
    return sorted(sorted(values, key=lambda index: values[index])[: max(4, len(left) // 2)])


def candidate_states(
    stream: Stream, first: Tensor, left: Sequence[int], measured: Collection[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The hidden states behind the last block: of the base model, and without each block.

    Args:
        stream: the windows of the dense model.
        first: the hidden states before its first block.
        left: the blocks of the base model.
        measured: the candidates.
    """
    base, candidates = first, dict[int, Tensor]()
    for index in left:
        block = stream.skeleton.fill(index, stream.source.block(index), stream.device)
        run = stream.call(index, block)
        candidates = {other: run(hidden) for other, hidden in candidates.items()}
        if index in measured:
            candidates[index] = base
        base = run(base)
        stream.skeleton.release(index)
    return base, candidates


def divergences(
    stream: Stream, ids: Tensor, dense: Tensor, candidates: dict[int, Tensor]
) -> dict[int, float]:
    """The KL divergence of every candidate, in nats per token.

    Windows come one after the other, because logits are large.
    """
    skeleton, device = stream.skeleton, stream.device
    sums, tokens = dict.fromkeys(candidates, 0.0), 0
    with skeleton.outside_blocks(
        stream.source.read_outside, device, with_head=True, with_embedding=False
    ):
        for window in range(len(ids)):
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
    measuring = job.measuring
    stream, influence = Stream(job.skeleton, job.source, measuring.device), dict[int, float]()
    with contextlib.closing(stream):
        batches = ids.split(measuring.batch)
        stream.embed(own_part(job.ranks, batches), None, on_device=measuring.hidden_states_stay)
        for index in range(len(job.skeleton)):
            block = job.skeleton.fill(index, job.source.block(index), measuring.device)
            forward, total = stream.forward(index, block), 0.0
            for batch in range(len(stream)):
                output = forward(batch)
                total += cosine_sum(stream.states.get(batch), output)
                stream.states.put(batch, output)
            influence[index] = 1 - job.ranks.sum_floats([total])[0] / ids.numel()
            job.skeleton.release(index)
    return influence


def _check_room(job: StructureJob, probes: Tensor) -> None:
    """Check that the hidden states of all candidates fit in memory.

    Raises:
        ValueError: they do not.
    """
    measuring = job.measuring
    width = job.skeleton.window_shape(0, probes.shape[1])[1]
    needed = (len(job.skeleton) + 3) * probes.numel() * width * measuring.dtype.itemsize
    if needed > measuring.budget:
        raise ValueError(
            f"the candidates of the search for blocks hold {needed / 1e9:.1f} GB of hidden states, "
            f"the memory budget is {measuring.budget / 1e9:.1f} GB: raise memory, or give "
            "block_rule='cosine'"
        )
