"""The choice of the experts of a block: measured on all windows as they reach the smaller model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from prunus.methods.structured import ExpertSums, kept_experts
from prunus.model.experts import Experts
from prunus.model.stream import Stream
from prunus.structure.plan import StructureJob
from prunus.structure.record import ExpertChange


def choose_experts(
    job: StructureJob, stream: Stream, place: int, index: int, stored: Mapping[str, Tensor]
) -> ExpertChange | None:
    """Choose the experts of a block that stay; None for a block without experts.

    Args:
        stream: the windows of the smaller model, before its block `place`. They do not move.
    """
    plan, old = job.experts, job.skeleton
    assert plan is not None
    found = [module for module in old.blocks[index].modules() if isinstance(module, Experts)]
    if not found:
        return None
    (experts,) = found
    sums = ExpertSums(plan.count)
    forward = stream.forward(place, old.fill(index, stored, stream.device))
    experts.on_output = sums.add
    try:
        for batch in range(len(stream)):
            forward(batch)
    finally:
        experts.on_output = None
    old.release(index)
    sums.complete(job.ranks)
    saliency_E = sums.reap_E if job.recipe.saliency == "reap" else sums.contribution_E
    return ExpertChange(
        kept=kept_experts(saliency_E, plan.keep, plan.groups),
        saliency=saliency_E.tolist(),
        tokens=sums.tokens_E.tolist(),
    )
