"""The search for the blocks to remove: by what the model predicts without them.

One step removes one block. Every block that is left is a candidate: the model without it, and
without the blocks of the steps before, reads a few windows, and the KL divergence of its next
tokens from those of the dense model is measured. The candidate with the smallest divergence is
removed. Then the others are measured again, because a block may matter more when its neighbour is
missing. The steps in between measure only the better half of the candidates: one that was far from
the best is not the best one step later.

All candidates run through the model together, so a step reads each block once. A candidate shares
the hidden states of the base model up to its block, skips the block, and has its own afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from prunus.distributed import on_rank_0
from prunus.engine.run_plan import HashedSource
from prunus.engine.session import Session
from prunus.methods.divergence import kl_sum, log_probabilities
from prunus.model.stream import Stream
from prunus.structure.structure_plan import StructurePlan
from prunus.structure.structure_record import SearchStep, StructureRecord

# The search reads this many windows, cut to this many tokens, as one batch.
_PROBE_WINDOWS, _PROBE_TOKENS = 8, 128
# All candidates are measured in every fourth step. The steps in between measure the better half of
# those that the step before measured.
_FULL_STEPS = 4


def choose_blocks(
    plan: StructurePlan,
    session: Session,
    ids: Tensor,
    record: StructureRecord,
    save: Callable[[], object],
) -> list[int]:
    """Search greedily for the blocks to remove. All processes call it.

    Args:
        plan: The checked run.
        session: Who hears of the search.
        ids: Calibration windows, (windows, tokens).
        record: The record of the run, with the steps that an earlier run has taken; new ones are
            added.
        save: Called after each new step, which the record holds by then.

    Returns:
        The old positions of the blocks that stay, rising.

    Raises:
        NotImplementedError: The family cannot do without any further block.
        ValueError: The hidden states of the candidates do not fit in the memory budget.
    """
    count, steps = len(plan.skeleton), record.search
    if len(steps) >= count - plan.keep_blocks:
        return _blocks_left(steps, count)
    probes = ids[:_PROBE_WINDOWS, :_PROBE_TOKENS]
    width = plan.skeleton.window_shape(0, probes.shape[1])[1]
    # Memory holds the hidden states of all at once: of a candidate per block, of the dense model,
    # of the base model, and one output.
    needed = (count + 3) * probes.numel() * width * plan.dtype.itemsize
    if needed > plan.memory.budget:
        raise ValueError(
            f"the candidates of the search for blocks hold {needed / 1e9:.1f} GB of hidden states, "
            f"the memory budget is {plan.memory.budget / 1e9:.1f} GB: raise `memory`"
        )

    def search() -> list[dict[str, Any]]:
        source = HashedSource(plan.source, plan.skeleton, record.measured)
        stream = Stream(plan.skeleton, source, plan.device)
        with contextlib.closing(stream):
            stream.embed([probes], None)
            first = stream.states.get(0)
            dense, _ = _candidate_states(stream, first, range(count), ())
            while len(left := _blocks_left(steps, count)) > plan.keep_blocks:
                measured = _promising(steps, left)
                session.tell(
                    f"searching for block {len(steps) + 1} to remove: {len(measured)} candidates"
                )
                _, candidates = _candidate_states(stream, first, left, measured)
                values = divergences(stream, probes, dense, candidates)
                order = sorted(values, key=lambda index: (values[index], index))
                # The family may not be able to do without the block of the lowest value.
                block = plan.smaller_by_one(left, order)
                by_block = [values.get(index) for index in range(count)]
                steps.append(SearchStep(block=block, value=values[block], candidates=by_block))
                save()
        return [step.model_dump() for step in steps]

    # Rank 0 searches, and the others get its steps.
    steps[:] = [SearchStep.model_validate(step) for step in on_rank_0(search)]
    return _blocks_left(steps, count)


def _blocks_left(steps: Sequence[SearchStep], count: int) -> list[int]:
    """Positions of the blocks that stay after some steps, rising."""
    removed = {step.block for step in steps}
    return [index for index in range(count) if index not in removed]


def _promising(steps: Sequence[SearchStep], left: Sequence[int]) -> list[int]:
    """The candidates of the next step among the blocks that are left."""
    if len(steps) % _FULL_STEPS == 0:
        return list(left)
    last = steps[-1].candidates
    values = {index: value for index in left if (value := last[index]) is not None}
    return sorted(sorted(values, key=lambda index: values[index])[: max(4, len(left) // 2)])


def _candidate_states(
    stream: Stream, first: Tensor, left: Sequence[int], measured: Collection[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The hidden states after the last block: of the base model, and without each candidate.

    Args:
        stream: The old model.
        first: The hidden states before its first block.
        left: The old positions of the blocks of the base model, rising.
        measured: The candidates among them.

    Returns:
        Those of the base model, and candidate -> those of the base model without it.
    """
    base = first
    candidates: dict[int, Tensor] = {}
    for index in left:
        block = stream.skeleton.fill(index, stream.source.block(index), stream.device)
        run = stream.call(index, block)
        # The candidates before this block have hidden states of their own.
        candidates = {other: run(hidden) for other, hidden in candidates.items()}
        if index in measured:
            candidates[index] = base
        base = stream.checked(index, run)(base)
        stream.skeleton.release(index)
    return base, candidates


def divergences(
    stream: Stream, ids: Tensor, dense: Tensor, candidates: dict[int, Tensor]
) -> dict[int, float]:
    """The KL divergence of every candidate from the dense model, in nats per token.

    Args:
        stream: The old model, for its head.
        ids: The windows, (windows, tokens).
        dense: The hidden states after the last block of the dense model, (windows, tokens, hidden).
        candidates: Candidate -> the same without it.
    """
    skeleton = stream.skeleton
    sums = dict.fromkeys(candidates, 0.0)
    tokens = 0
    with skeleton.outside_blocks(stream.source.read_outside, stream.device, with_head=True):
        for window in range(len(ids)):  # one by one, because logits are large
            part = slice(window, window + 1)
            ids_1T = ids[part].to(stream.device)
            logp = log_probabilities(skeleton.logits(ids_1T, dense[part]).flatten(0, 1))
            for block, hidden in candidates.items():
                logq = log_probabilities(skeleton.logits(ids_1T, hidden[part]).flatten(0, 1))
                sums[block] += float(kl_sum(logp.exp(), logp - logq))
            tokens += len(logp)
    return {block: total / tokens for block, total in sums.items()}
