"""The calibration windows of a sweep, drawn once per model, source, size, seed and BOS.

All cells with the same settings share one file of windows. Their methods are then compared on the
same text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunus.calibration.files import read_ids
from prunus.calibration.sources import find_source
from prunus.calibration.windows import Wanted, hash_ids
from prunus.model.checkpoint.atomic_files import make_folder
from prunus.model.checkpoint.writer import save_safetensors
from prunus.model.loading import load_model
from prunus.model.tokenizer import load_tokenizer
from prunus.pruning.recipe import Recipe
from prunus.runs.options import RunOptions
from prunus.sweeping.results import CalibrationSet, SweepResults

__all__ = ["shared_windows"]

FOLDER = "calibration"


def shared_windows(
    output: Path,
    results: SweepResults,
    label: str,
    model: Path,
    recipe: Recipe,
    options: RunOptions,
) -> torch.Tensor:
    """The calibration windows for a recipe. They are drawn if no cell has needed them yet.

    New windows are written into `output` and entered in `results`. The caller saves the results.

    Args:
        output: folder of the sweep.
        results: results so far.
        label: name of the model in the sweep.
        model: folder of the model.
        recipe: has source, number of windows, tokens per window, seed and BOS.
        options: data folder, trust in remote code.

    Returns:
        Token ids (samples, seqlen), int64.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, OSError: see
            `prunus.calibration.sources.Source`.
        FileExistsError: the windows differ from those of earlier cells.
    """
    wanted = (
        label,
        recipe.calibration,
        recipe.samples,
        recipe.seqlen,
        recipe.seed,
        recipe.bos,
    )
    known = next((x for x in results.calibration if _key(x) == wanted), None)
    if known is not None and (output / known.file).exists():
        ids = read_ids(output / known.file)
        _check_same(known, hash_ids(ids), f"{output / known.file} was changed")
        return ids
    asked = Wanted(
        samples=recipe.samples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        bos=recipe.bos,
        data=options.data,
        tokenizer=lambda: load_tokenizer(model, options.trust_remote_code),
        model=lambda: load_model(model, trust_remote_code=options.trust_remote_code),
    )
    source = find_source(recipe.calibration)
    source.check(asked)
    windows = source.draw(asked)
    if known is not None:
        _check_same(known, windows.sha256, f"{recipe.calibration} gives other windows than before")
    file = (
        f"{FOLDER}/{label}-{len(results.calibration):02}.safetensors"
        if known is None
        else known.file
    )
    make_folder(output / FOLDER)
    # The ids may be a view of a larger file of ids. save_safetensors writes only the view.
    save_safetensors(
        output / file, {"input_ids": windows.ids.to(torch.int32)}, {"source": windows.source}
    )
    if known is None:
        results.calibration.append(
            CalibrationSet(
                model=label,
                calibration=recipe.calibration,
                samples=recipe.samples,
                seqlen=recipe.seqlen,
                seed=recipe.seed,
                source=windows.source,
                sha256=windows.sha256,
                file=file,
                bos=recipe.bos,
                used_bos=windows.bos,
            )
        )
    return windows.ids


def _key(windows: CalibrationSet) -> tuple[Any, ...]:
    return (
        windows.model,
        windows.calibration,
        windows.samples,
        windows.seqlen,
        windows.seed,
        windows.bos,
    )


def _check_same(known: CalibrationSet, sha256: str, what: str) -> None:
    if known.sha256 != sha256:
        raise FileExistsError(
            f"{what}: cells of this sweep were calibrated on windows with the sha256 "
            f"{known.sha256[:12]}…, these have {sha256[:12]}…. Choose another output folder"
        )
