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
from typing import Any, Literal

from torch import Tensor

from prunus.distributed import own_part
from prunus.methods.structured import cosine_sum, divergence_sum
from prunus.model.stream import Stream
from prunus.structure.plan import PROBE_TOKENS, PROBE_WINDOWS, StructureJob
from prunus.structure.records import SearchStep

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
        _search_by_divergence(job, ids[:PROBE_WINDOWS, :PROBE_TOKENS], steps, save)
    return _blocks_left(steps, count)


def _blocks_left(steps: Sequence[SearchStep], count: int) -> list[int]:
    """Positions of the blocks that stay after some steps, rising."""
    removed = {step.block for step in steps}
    return [index for index in range(count) if index not in removed]


def _search_by_divergence(
    job: StructureJob, probes: Tensor, steps: list[SearchStep], save: Callable[[], object]
) -> None:
    """Search greedily by KL divergence on some windows. All ranks call it, rank 0 does it."""
    _check_room(job, probes)

    def search() -> list[dict[str, Any]]:
        count = len(job.skeleton)
        stream = Stream(job.skeleton, job.hashed_source, job.device)
        with contextlib.closing(stream):
            stream.embed([probes], None)
            first = stream.states.get(0)
            dense, _ = _candidate_states(stream, first, range(count), ())
            while len(left := _blocks_left(steps, count)) > job.keep_blocks:
                measured = _promising(steps, left)
                job.options.tell(
                    f"searching for block {len(steps) + 1} to remove: {len(measured)} candidates"
                )
                _, candidates = _candidate_states(stream, first, left, measured)
                _take(job, steps, divergences(stream, probes, dense, candidates), "divergence")
                save()
        return [step.model_dump() for step in steps]

    steps[:] = [SearchStep.model_validate(step) for step in job.ranks.on_rank_0(search)]


def _take(
    job: StructureJob,
    steps: list[SearchStep],
    values: dict[int, float],
    measure: Literal["divergence", "influence"],
) -> None:
    """Add the step that removes the block of the lowest value which the family can do without."""
    count = len(job.skeleton)
    left = _blocks_left(steps, count)
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


def _candidate_states(
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
