"""The verb compress: prune, with integers instead of float weights at the end of each linear."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from prunus.compression.job import CompressionJob
from prunus.compression.loss_sensitivity import (
    PROBE_TOKENS,
    PROBE_WINDOWS,
    LinearSensitivity,
    loss_sensitivities,
)
from prunus.compression.output import CompressedFolder
from prunus.compression.rate_control import LinearRate, RateControl
from prunus.compression.recipe import CompressionRecipe
from prunus.compression.record import CompressionRecord
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import LinearQuantization, Quantized
from prunus.model.stream import Stream
from prunus.options import takes
from prunus.packed.description import QuantizedShape
from prunus.packed.planes import encode
from prunus.packed.weight import QuantizedWeight
from prunus.pruning.job import PruningJob
from prunus.pruning.manifest import PruningRecord
from prunus.pruning.output import PruningOutput
from prunus.pruning.run import PruneVerb, carry_out
from prunus.runs.options import RunOptions
from prunus.runs.progress import pruning_step, shows_progress
from prunus.runs.windows import given_windows


@shows_progress("compress", pruning_step)
@takes(CompressionRecipe, RunOptions)
def compress(
    model: str | Path,
    output: str | Path,
    bits: float | None = None,
    *,
    calibration: str | Path | torch.Tensor | Sequence[Any] | None = None,
    recipe: CompressionRecipe | str | Path | None = None,
    **options: Any,
) -> CompressionRecord:
    """Compress a checkpoint to a number of bits per weight. The result is a packed checkpoint.

    Args:
        model: A checkpoint folder or a hub id.
        output: Folder of the compressed checkpoint.
        bits: Bits per weight of the linears in the file, with all that belongs to them.
        calibration: A source of windows, token ids or texts, as for `prunus.prune`.
        recipe: A `CompressionRecipe`, or a TOML file with any of its options.
        **options: Options of `CompressionRecipe` and of the run.

    Returns:
        The record, which is also the file `prunus-compress.json`; its totals have the bits that the
        linears take.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: As `prune`.
    """
    how, given = RunOptions.pick(options)
    data, described = given_windows(calibration)
    chosen = CompressionRecipe.read(recipe, {"bits": bits} | given | described)
    return run(model, Path(output), chosen, RunOptions(**how, **data))


def run(
    model: str | Path, output: Path, recipe: CompressionRecipe, options: RunOptions
) -> CompressionRecord:
    """Carry out a recipe. The arguments and errors are those of `compress`."""
    return cast(CompressionRecord, carry_out(model, output, recipe, options, CompressVerb()))


class CompressVerb(PruneVerb):
    """Compress is prune into packed shards, with a rounding that spends the bits it was given."""

    job = CompressionJob

    def output(
        self, folder: Path | None, record: PruningRecord, job: PruningJob
    ) -> CompressedFolder:
        assert folder is not None and isinstance(record, CompressionRecord)
        return CompressedFolder(folder, record, job)

    def finish_linear(
        self, job: PruningJob, ids: torch.Tensor, output: PruningOutput, record: PruningRecord
    ) -> Rounding:
        assert isinstance(job, CompressionJob) and isinstance(output, CompressedFolder)

        def measured() -> dict[str, torch.Tensor]:
            known = output.read_measurement()
            if known is None:
                known = _as_tensors(_measure(job, ids))
                record.save(output.folder)
                output.write_measurement(known)
            return known

        # All ranks must use the same digits, so one of them measures.
        found = _from_tensors(job.ranks.tensors_from_rank_0(measured))
        linears = [
            LinearRate(name, linear.name, linear.shape, found[name])
            for name, linear in job.selected_linears().items()
        ]
        sparsity = job.recipe.sparsity
        sparsities = {x.name: record.allocation.get(x.name, sparsity) for x in linears}
        control = RateControl(job.recipe.bits, linears, sparsities)
        for block in record.blocks:
            for name, done in block.linears.items():
                assert done.bits is not None and done.log2_step is not None
                control.finish(f"{block.name}.{name}", done.bits, done.log2_step)
        return Rounding(control)


class Rounding:
    """Rounds linears to the steps of a rate control; see `prunus.pruning.block.linear`."""

    def __init__(self, control: RateControl) -> None:
        self._control = control
        self._log2_step = 0.0

    def begin(self, name: str, statistics: InputStatistics) -> LinearQuantization:
        quantization, self._log2_step = self._control.begin(name, statistics)
        return quantization

    def end(self, name: str, quantized: Quantized) -> tuple[QuantizedWeight, dict[str, Any]]:
        levels_OI, steps_I, scales_O = (part.cpu() for part in quantized)
        packed = encode(levels_OI, steps_I, scales_O)
        rows, columns = packed.shape
        bits = 8 * packed.nbytes / (rows * columns)
        self._control.finish(name, bits, self._log2_step)
        entry = QuantizedShape.of(packed).to_json()
        return packed, {"bits": bits, "log2_step": self._log2_step, "packed": entry}


def _measure(job: CompressionJob, ids: torch.Tensor) -> dict[str, LinearSensitivity]:
    windows = ids[:PROBE_WINDOWS, :PROBE_TOKENS]
    stream = Stream(job.skeleton, job.hashed_source, job.device)
    with torch.no_grad(), contextlib.closing(stream):
        stream.embed([windows], None)
        options = job.linear_settings.work.options
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
