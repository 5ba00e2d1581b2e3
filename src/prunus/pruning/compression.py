"""Gets the rate control of a run that compresses: measured once, and kept for a resumed run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch

from prunus.model.stream import Stream
from prunus.pruning.compressed_output import CompressedOutput
from prunus.pruning.job import PruningJob
from prunus.pruning.loss_sensitivity import (
    PROBE_TOKENS,
    PROBE_WINDOWS,
    LinearSensitivity,
    loss_sensitivities,
)
from prunus.pruning.manifest import Manifest
from prunus.pruning.output import Output
from prunus.pruning.rate_control import LinearRate, RateControl

__all__ = ["rate_control"]


def rate_control(
    job: PruningJob, ids: torch.Tensor, output: Output, manifest: Manifest
) -> RateControl | None:
    """The rate control of a run, after the blocks that are finished; None without `bits`.

    Args:
        job: The checked run.
        ids: All calibration windows (windows, tokens); the first ones measure the sensitivities.
        output: Keeps the measurement beside the result until the run is finished.
        manifest: Of the run, with the records of its finished blocks.

    Raises:
        ValueError: The gradients of the loss are not finite.
    """
    if not isinstance(output, CompressedOutput):
        return None
    assert job.recipe.bits is not None

    def measured() -> dict[str, torch.Tensor]:
        known = output.read_measurement()
        if known is None:
            known = _as_tensors(_measure(job, ids))
            output.write_measurement(known)
        return known

    # All ranks must use the same digits, so one of them measures.
    found = _from_tensors(job.ranks.tensors_from_rank_0(measured))
    linears = [
        LinearRate(name, linear.name, linear.shape, found[name])
        for name, linear in job.selected_linears().items()
    ]
    sparsity = job.recipe.sparsity
    sparsities = {linear.name: manifest.allocation.get(linear.name, sparsity) for linear in linears}
    control = RateControl(job.recipe.bits, linears, sparsities)
    for block in manifest.blocks:
        for name, record in block.linears.items():
            assert record.bits is not None and record.log2_step is not None
            control.finish(f"{block.name}.{name}", record.bits, record.log2_step)
    return control


def _measure(job: PruningJob, ids: torch.Tensor) -> dict[str, LinearSensitivity]:
    windows = ids[:PROBE_WINDOWS, :PROBE_TOKENS]
    stream = Stream(job.skeleton, job.source, job.device)
    with torch.no_grad(), contextlib.closing(stream):
        stream.embed([windows], None)
        options = job.linear_settings.options
        return loss_sensitivities(stream, [windows], job.selected, options, job.recipe.seed)


def _as_tensors(found: dict[str, LinearSensitivity]) -> dict[str, torch.Tensor]:
    """The measurement as named tensors: three for each linear."""
    tensors = {}
    for name, each in found.items():
        tensors[f"{name}.loss"] = each.loss_O
        tensors[f"{name}.power"] = torch.tensor(each.power, dtype=torch.float64)
        tensors[f"{name}.deviations"] = each.deviations_Q
    return tensors


def _from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, LinearSensitivity]:
    return {
        name: LinearSensitivity(
            tensors[f"{name}.loss"],
            float(tensors[f"{name}.power"]),
            tensors[f"{name}.deviations"],
        )
        for name in (key.removesuffix(".loss") for key in tensors if key.endswith(".loss"))
    }
