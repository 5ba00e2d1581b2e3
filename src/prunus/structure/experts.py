"""Which experts of a block stay: measured on all windows as they reach the smaller model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunus.methods.structured.experts import ExpertSums, kept_experts, magnitude
from prunus.model.experts import Experts
from prunus.model.stream import Stream
from prunus.structure.plan import StructureJob
from prunus.structure.record import ExpertChange

__all__ = ["choose_experts"]


def choose_experts(
    job: StructureJob, stream: Stream, place: int, index: int, stored: Mapping[str, Tensor]
) -> ExpertChange | None:
    """Choose the experts of a block; None for a block without experts.

    Args:
        job: the checked run.
        stream: the windows of the smaller model, before its block `place`. They stay there.
        place: position of the block in the smaller model.
        index: its position in the old model.
        stored: its tensors, by relative name.
    """
    plan, old = job.experts, job.skeleton
    assert plan is not None
    found = [(n, m) for n, m in old.blocks[index].named_modules() if isinstance(m, Experts)]
    if not found:
        return None
    ((path, experts),) = found
    sums = ExpertSums(plan.count)
    if len(stream):
        block = old.fill(index, stored, stream.device)
        _run(stream, place, block, experts, sums)
        old.release(index)
    sums.complete(job.ranks)
    saliency_E = {
        "reap": sums.reap_E,
        "contribution": sums.contribution_E,
        "frequency": sums.frequency_E,
    }.get(job.recipe.saliency)
    if job.recipe.saliency == "random":
        # Each block draws numbers of its own, whether or not a run was interrupted before it.
        drawing = torch.Generator().manual_seed(job.recipe.seed * 1_000_003 + index)
        saliency_E = torch.rand(plan.count, generator=drawing, dtype=torch.float64)
    if saliency_E is None:
        saliency_E = torch.tensor(
            [
                magnitude(stored[f"{path}.{number}.{leaf}.weight"] for leaf in _leaves(experts))
                for number in range(plan.count)
            ],
            dtype=torch.float64,
        )
    return ExpertChange(
        kept=kept_experts(saliency_E, plan.keep, plan.groups),
        saliency=saliency_E.tolist(),
        tokens=sums.tokens_E.tolist(),
    )


def _run(stream: Stream, place: int, block: nn.Module, experts: Experts, sums: ExpertSums) -> None:
    """Run the old block on all windows, and add what its experts return."""
    forward = stream.forward(place, block)
    experts.on_output = sums.add
    try:
        for batch in range(len(stream)):
            forward(batch)
    finally:
        experts.on_output = None


def _leaves(experts: Experts) -> tuple[str, ...]:
    return experts.leaves if experts.gated else experts.leaves[1:]
