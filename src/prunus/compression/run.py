"""The command compress: prune, with integers instead of float weights at the end of each linear."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.compression.rounding import rounding_for
from prunus.formats.base import format_for
from prunus.formats.recipe import CompressionRecipe
from prunus.formats.records import CompressionRecord
from prunus.options import takes
from prunus.pruning.job import PruningJob
from prunus.pruning.run import carry_out, planned
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
    stored = format_for(output, recipe)
    rounding = functools.partial(rounding_for, stored)
    return carry_out(CompressionRecord, model, output, recipe, options, stored, rounding)


def plan_compression(
    model: str | Path, output: Path | None, recipe: CompressionRecipe, options: RunOptions
) -> PruningJob:
    """The job of such a run. Checks what the run checks, and writes nothing."""
    return planned(CompressionRecord, model, output, recipe, options, format_for(output, recipe))
