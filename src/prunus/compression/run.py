"""The verb compress: prune, with integers instead of float weights at the end of each linear."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from prunus.compression.file_size import embedding_and_head, file_size, planned_tensors
from prunus.compression.output import CompressedFolder
from prunus.compression.quantize_rows import BYTES_PER_QUANTIZED_WEIGHT
from prunus.compression.rate_control import LinearRate, RateControl, side_bits, zero_bits
from prunus.compression.records import CompressionRecipe, CompressionRecord
from prunus.hardware.sizes import in_bytes
from prunus.methods.grids import GridWeight
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import LinearQuantization, Quantized
from prunus.model.checkpoint.writer import file_nbytes
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
from prunus.runs.record import OUTSIDE_SHARD
from prunus.runs.windows import given_windows

# The most bits per weight of linears. The least that `size` may ask for is this much above the bits
# of zeros, where nearly all weights are 0.
_MOST_BITS, _ABOVE_LEAST = 7.0, 0.1
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
        model: A checkpoint folder or a hub id.
        output: Folder of the compressed checkpoint.
        bits: Bits per weight of the linears in the file, with all that belongs to them; None where
            `size` says how large the whole file may be.
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

    @functools.cached_property
    def weights(self) -> dict[str, int]:
        """Stored name of the weight of each linear to compress -> how many numbers it has."""
        stored, linears = self.checkpoint.stored, self.selected_linears()
        return {stored[f"{name}.weight"]: math.prod(x.shape) for name, x in linears.items()}

    @functools.cached_property
    def packed_outside(self) -> dict[str, list[str]]:
        """`embedding_and_head`, as far as the recipe packs them."""
        packs = self.recipe.packs_head is not None
        return embedding_and_head(self.skeleton.model, self.checkpoint.stored) if packs else {}

    @functools.cached_property
    def bits(self) -> float:
        """Bits per weight of the linears: those asked for, or about what `size` leaves for them."""
        if self.recipe.bits is not None:
            return self.recipe.bits
        return self.bits_next_to(file_nbytes(self.shards(8.0)[0]))

    def bits_next_to(self, outside: int) -> float:
        """The bits per weight that `size` leaves if the shard outside the blocks has this size."""
        assert self.recipe.size is not None
        # With fewer bits the headers are not longer.
        weights, blocks = sum(self.weights.values()), map(file_nbytes, self.shards(8.0)[1:])
        return 8 * (1 + (self.recipe.size - outside - sum(blocks)) / weights)

    def shards(self, bits: float) -> list[dict[str, Any]]:
        """`planned_tensors` of all that lies outside the blocks, and of each block."""
        source, packed = self.checkpoint, dict.fromkeys(self.weights, bits)
        packed |= dict.fromkeys(self.packed_outside, float(self.recipe.packs_head or 0))
        copies = {key for keys in self.packed_outside.values() for key in keys}
        outside = [key for key in source.outside_keys() if key not in copies]
        blocks = map(source.block_keys, range(len(self.skeleton)))
        return [planned_tensors(source, keys, packed) for keys in (outside, *blocks)]

    def bytes_at(self, bits: float) -> int:
        """Bytes of all files with weights if the linears take `bits` bits per weight."""
        return sum(map(file_nbytes, self.shards(bits)))

    def check(self) -> None:
        # If all weights were zeros, a linear would still take a bit plane, steps, scales, classes.
        shapes = [linear.shape for linear in self.selected_linears().values()]
        side = sum(side_bits(shape) * math.prod(shape) for shape in shapes)
        least = 1 + side / sum(self.weights.values())
        if self.recipe.bits is not None and self.recipe.bits <= least:
            raise ValueError(
                f"bits = {self.bits:g} cannot be reached: if all weights were 0, the "
                f"linears of this model would take {least:.2f} bits per weight with their steps "
                "and scales. Give more"
            )
        sparsity, size = self.recipe.sparsity, self.recipe.size
        if size is None:
            return
        most = _MOST_BITS * (1 - sparsity) + zero_bits(sparsity)
        smallest, largest = map(self.bytes_at, (least + _ABOVE_LEAST, most))
        if not smallest <= size <= largest:
            raise ValueError(
                f"size = {in_bytes(size)} is not possible: the file takes {in_bytes(smallest)} to "
                f"{in_bytes(largest)} ({smallest:,} to {largest:,} bytes), of which "
                f"{in_bytes(file_nbytes(self.shards(1.0)[0]))} are embeddings, head and norms; "
                "see `head_bits`"
            )

    def describe(self) -> dict[str, object]:
        tensors = {key: each for shard in self.shards(self.bits) for key, each in shard.items()}
        file = file_size(self.checkpoint, self.skeleton.model, tensors, self.file_bytes())
        return {"bits": self.bits, "head_bits": self.recipe.head_bits, "file": file.model_dump()}

    def peak_bytes(self) -> int:
        # Embedding and head are quantised before the first block is read.
        tensors = self.checkpoint.checkpoint.tensors
        sizes = [math.prod(tensors[key].shape) for key in self.packed_outside]
        return max(super().peak_bytes(), BYTES_PER_QUANTIZED_WEIGHT * max(sizes, default=0))

    def file_bytes(self) -> int:
        # The rate control spends the bits that the recipe asks for, so they say what linears take.
        return self.bytes_at(self.bits)


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
            shard = output.folder / OUTSIDE_SHARD
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
        self, name: str, quantized: Quantized | GridWeight
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
