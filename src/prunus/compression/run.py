"""The verb compress: prune, with integers instead of float weights at the end of each linear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from prunus.compression.output import CompressedFolder, embedding_and_head
from prunus.compression.rate_control import LinearRate, RateControl, side_bits
from prunus.compression.records import CompressionRecipe, CompressionRecord
from prunus.methods.grids import GridWeight
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import LinearQuantization, Quantized
from prunus.model.kinds import require_causal
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.options import takes
from prunus.packed.description import QuantizedShape
from prunus.packed.planes import encode
from prunus.packed.weight import QuantizedWeight
from prunus.pruning.job import LinearSelection, PruningJob
from prunus.pruning.loss_sensitivity import LinearSensitivity, measure_loss
from prunus.pruning.manifest import PruningRecord
from prunus.pruning.output import PruningOutput
from prunus.pruning.run import PruneVerb, carry_out
from prunus.runs.options import RunOptions
from prunus.runs.progress import pruning_step, shows_progress
from prunus.runs.windows import given_windows

# A tensor's entry in the header of a shard, without its name.
_HEADER_BYTES = 75
# Classes, steps and scales: the tensors of a quantised weight next to its data.
_SIDE_TENSORS = 3


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


@dataclass(kw_only=True)
class CompressionJob(PruningJob):
    """The decisions of one run of compress."""

    RECORD: ClassVar[type[PruningRecord]] = CompressionRecord
    QUANTIZES: ClassVar[bool] = True

    recipe: CompressionRecipe

    @classmethod
    def select(
        cls, found: LinearSelection, source: CheckpointSource | ModuleSource, skeleton: Skeleton
    ) -> LinearSelection:
        if isinstance(source, ModuleSource):
            raise ValueError(
                "a compressed model is a packed checkpoint: give the folder of a checkpoint "
                "instead of a loaded model"
            )
        require_causal(source.config, "prunus compress")
        return _packable(found, skeleton, source)

    def check(self) -> None:
        # If all weights were zeros, a linear would still take a bit plane, steps, scales, classes.
        shapes = [linear.shape for linear in self.selected_linears().values()]
        weights = [rows * columns for rows, columns in shapes]
        least = sum(
            (1 + side_bits(shape)) * count for shape, count in zip(shapes, weights, strict=True)
        ) / sum(weights)
        if self.recipe.bits <= least:
            raise ValueError(
                f"bits = {self.recipe.bits:g} cannot be reached: if all weights were 0, the "
                f"linears of this model would take {least:.2f} bits per weight with their steps "
                "and scales. Give more"
            )

    def describe(self) -> dict[str, object]:
        return {"bits": self.recipe.bits, "head_bits": self.recipe.head_bits}

    def file_bytes(self) -> int:
        # The rate control spends the bits that the recipe asks for, so they say what linears take.
        checkpoint = self.checkpoint.checkpoint
        bits = dict.fromkeys(self.selected_linears(), self.recipe.bits)
        if self.recipe.head_bits is not None:
            bits |= dict.fromkeys(embedding_and_head(self.skeleton.model), self.recipe.head_bits)
        total = float(checkpoint.nbytes(checkpoint.tensors))
        total += sum(len(name) + _HEADER_BYTES for name in checkpoint.tensors)
        for name, each in bits.items():
            key = self.checkpoint.stored[f"{name}.weight"]
            total += math.prod(checkpoint.tensors[key].shape) * each / 8 - checkpoint.nbytes([key])
            total += _SIDE_TENSORS * (len(key) + _HEADER_BYTES)
        return round(total)


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

    def end(
        self, name: str, quantized: Quantized | GridWeight
    ) -> tuple[QuantizedWeight, dict[str, Any]]:
        assert isinstance(quantized, Quantized)
        levels_OI, steps_I, scales_O = (part.cpu() for part in quantized)
        packed = encode(levels_OI, steps_I, scales_O)
        rows, columns = packed.shape
        bits = 8 * packed.nbytes / (rows * columns)
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


def _packable(
    found: LinearSelection, skeleton: Skeleton, source: CheckpointSource
) -> LinearSelection:
    """The part of a selection that a compressed checkpoint can store as integers."""
    stored = source.stored
    kept: list[list[str]] = []
    left_dense = dict(found.left_dense)
    for index, names in enumerate(found.selected):
        kept.append([])
        for linear in skeleton.linears(index):
            if linear.name not in names:
                continue
            full_name = f"{skeleton.block_name(index)}.{linear.name}.weight"
            own = stored.get(full_name, "").endswith(".weight")
            if own and type(linear.module) is nn.Linear:
                kept[-1].append(linear.name)
            else:
                left_dense[full_name] = linear.shape
    if not any(kept):
        raise NotImplementedError(
            "none of the chosen linears can be stored as integers: they are transposed, special, "
            "or experts in one tensor; such a checkpoint cannot be compressed yet"
        )
    return LinearSelection(kept, left_dense)
