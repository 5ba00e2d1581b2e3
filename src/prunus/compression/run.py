"""The command compress: what users call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.compression.rounding import type_rounding
from prunus.engine.options import RunOptions
from prunus.engine.result import Result
from prunus.engine.run import LinearCommand, carry_out
from prunus.engine.session import SILENT, Session, shown_session
from prunus.engine.windows import given_windows
from prunus.formats.codec import Codec, codec_for, size_plan
from prunus.formats.recipe import CompressionRecipe
from prunus.formats.records import CompressionRecord
from prunus.options import takes


@takes(CompressionRecipe, RunOptions)
def compress(
    model: str | Path,
    output: str | Path,
    bits: float | None = None,
    *,
    calibration: str | Path | torch.Tensor | Sequence[Any] | None = None,
    recipe: CompressionRecipe | str | Path | None = None,
    progress: Callable[..., None] | bool | None = True,
    announce: Callable[[Any], None] | None = None,
    **options: Any,
) -> CompressionRecord:
    """Compress a checkpoint to a file size or to bits per weight.

    Args:
        model: A checkpoint folder or a hub id; for a GGUF file also one in full precision.
        output: NAME.gguf for a GGUF file, or a folder, of format compressed-tensors or mlx.
        bits: Bits per weight, with all that belongs to them; None if `size` says how large the
            whole file may be. With `format` compressed-tensors, 4 or 8.
        calibration: A source of windows, token ids or texts, as for `prunus.prune`.
        recipe: A `CompressionRecipe`, or a TOML file with any of its options.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called after every block with a `prunus.engine.progress.Progress`.
        announce: Called with what is being prepared before the first block.
        **options: Options of `CompressionRecipe` and of the run.

    Returns:
        The record, which is also the file `prunus-compress.json`; its totals have the bits that the
        linears take.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: As `prune`.
    """
    run_options, recipe_options = RunOptions.pick(options)
    data, described = given_windows(calibration)
    chosen = CompressionRecipe.read(recipe, {"bits": bits} | recipe_options | described)
    with shown_session("compress", progress, announce) as session:
        return run(model, Path(output), chosen, RunOptions(**run_options, **data), session)


def run(
    model: str | Path,
    output: Path,
    recipe: CompressionRecipe,
    options: RunOptions,
    session: Session = SILENT,
    after: Callable[[CompressionRecord, Session], None] | None = None,
) -> CompressionRecord:
    """Carry out a recipe, and return its record. Arguments and errors are those of `compress`.

    `after` is as for `LinearCommand`.
    """
    command, result = command_for(output, recipe, after)
    return carry_out(command, model, result, recipe, options, session)


def command_for(
    output: Path | None,
    recipe: CompressionRecipe,
    after: Callable[[CompressionRecord, Session], None] | None = None,
    codec: type[Codec] | None = None,
) -> tuple[LinearCommand[CompressionRecord], Result[CompressionRecord] | None]:
    """The command as the engine knows it, and where its result is written.

    Args:
        output: The folder or the file of the result; None if that is not known yet.
        recipe: The recipe of the run.
        after: As for `LinearCommand`.
        codec: The format; None for that of the output or of the recipe.
    """
    codec = codec or codec_for(output, recipe)
    result = None if output is None else codec.RESULT(output, CompressionRecord)
    folder = None if result is None else result.folder
    command = LinearCommand(
        CompressionRecord,
        functools.partial(size_plan, codec, recipe, folder),
        functools.partial(type_rounding, codec=codec),
        after,
    )
    return command, result
