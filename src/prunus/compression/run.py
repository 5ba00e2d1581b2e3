"""The verb compress: prune, with integers instead of float weights at the end of each linear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from prunus.compression.gguf_run import plan_gguf, run_gguf
from prunus.compression.job import CompressionJob
from prunus.compression.output import CompressedFolder
from prunus.compression.rate_control import LinearRate, RateControl
from prunus.compression.records import CompressionRecipe, CompressionRecord
from prunus.compression.tensors_run import TensorsJob, TensorsVerb
from prunus.methods.group_quantizer import GroupedWeight
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import LinearQuantization, Quantized
from prunus.model.checkpoint.resolve import is_gguf
from prunus.options import takes
from prunus.packed.description import QuantizedShape
from prunus.packed.planes import encode
from prunus.packed.weight import QuantizedWeight
from prunus.pruning.job import PruningJob
from prunus.pruning.loss_sensitivity import LinearSensitivity, measure_loss
from prunus.pruning.manifest import PruningRecord
from prunus.pruning.output import PruningOutput
from prunus.pruning.run import PruneVerb, carry_out, planned
from prunus.runs.options import RunOptions
from prunus.runs.progress import pruning_step, shows_progress
from prunus.runs.windows import given_windows

# A linear is rounded again at most this many times, and each time coarser by at least this log2.
_MOST_TRIALS, _COARSER = 16, 0.002


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
    """Compress a checkpoint to a file size or to bits per weight. The result is packed.

    Args:
        model: A checkpoint folder or a hub id; for a GGUF file also one in full precision.
        output: Folder of the compressed checkpoint, or a GGUF file, NAME.gguf.
        bits: Bits per weight of the linears in the file, with all that belongs to them; None where
            `size` says how large the whole file may be. With `format` compressed-tensors, 4 or 8.
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
    if is_gguf(output):
        return run_gguf(model, output, recipe, options)
    verb = TensorsVerb() if recipe.format == "compressed-tensors" else CompressVerb()
    return cast(CompressionRecord, carry_out(model, output, recipe, options, verb))


def plan_compression(
    model: str | Path, output: Path | None, recipe: CompressionRecipe, options: RunOptions
) -> PruningJob:
    """The job of such a run. Checks what the run checks, and writes nothing."""
    if output is not None and is_gguf(output):
        return plan_gguf(model, output, recipe, options)
    kind = TensorsJob if recipe.format == "compressed-tensors" else CompressionJob
    return planned(model, output, recipe, options, kind)


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

        # All ranks must use the same digits, so one of them measures.
        found = job.ranks.tensors_from_rank_0(lambda: output.measured(lambda: _measure(job, ids)))
        linears = [
            LinearRate(
                name,
                linear.name,
                linear.shape,
                LinearSensitivity(
                    loss_O=found[f"{name}.loss"],
                    power=float(found[f"{name}.power"]),
                    deviations_Q=found[f"{name}.deviations"],
                ),
            )
            for name, linear in job.selected_linears().items()
        ]
        sparsity = job.recipe.sparsity
        sparsities = {x.name: record.allocation.get(x.name, sparsity) for x in linears}
        bits = job.bits
        if job.recipe.size is not None:
            # Embeddings and head are written by now, and take a little less than was planned.
            shard = output.folder / record.outside_shard
            bits = job.bits_next_to(job.ranks.on_rank_0(lambda: shard.stat().st_size))
        control = RateControl(bits, linears, sparsities)
        for block in record.blocks:
            for name, done in block.linears.items():
                assert done.bits is not None and done.log2_step is not None
                control.finish(f"{block.name}.{name}", done.bits, done.log2_step)
        return Rounding(control, exceeds=job.recipe.size is None)


class Rounding:
    """Rounds linears to the steps of a rate control; see `prunus.pruning.block.linear`.

    Args:
        exceeds: Whether the sum may be a little more than the bits of the control. If not, a linear
            that leaves too little for those after it is rounded again, to coarser steps.
    """

    def __init__(self, control: RateControl, exceeds: bool) -> None:
        self._control, self._exceeds = control, exceeds
        self._log2_step, self._coarser, self._trials = 0.0, 0.0, 0

    def begin(self, name: str, statistics: InputStatistics) -> LinearQuantization:
        quantization, self._log2_step = self._control.begin(name, statistics, self._coarser)
        return quantization

    def end(
        self, name: str, quantized: Quantized | GroupedWeight
    ) -> tuple[QuantizedWeight, dict[str, Any]] | None:
        assert isinstance(quantized, Quantized)
        levels_OI, steps_I, scales_O = (part.cpu() for part in quantized)
        packed = encode(levels_OI, steps_I, scales_O)
        rows, columns = packed.shape
        bits = 8 * packed.nbytes / (rows * columns)
        excess = 0.0 if self._exceeds else self._control.excess(name, bits)
        if excess > 0 and self._trials < _MOST_TRIALS:
            self._trials += 1
            # At low rates a step saves less than a bit where it is twice as coarse.
            self._coarser += max(_COARSER, excess) * 1.5**self._trials
            return None
        if excess > 0:
            raise ValueError(
                f"{name} does not fit in what `size` leaves for it: give a larger size"
            )
        self._coarser, self._trials = 0.0, 0
        self._control.finish(name, bits, self._log2_step)
        entry = QuantizedShape.of(packed).to_json()
        return packed, {"bits": bits, "log2_step": self._log2_step, "packed": entry}


def _measure(job: CompressionJob, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The sensitivity of each linear, as three named tensors."""
    options = job.linear_settings.work.options
    found = measure_loss(job, ids, job.selected, options, quantizes=True)
    tensors = {f"{name}.loss": each.loss_O for name, each in found.items()}
    tensors |= {f"{name}.deviations": each.deviations_Q for name, each in found.items()}
    return tensors | {
        f"{name}.power": torch.tensor(each.power, dtype=torch.float64)
        for name, each in found.items()
    }
