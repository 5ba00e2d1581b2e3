"""The calibration windows of a sweep, drawn once per model, source, size, seed and BOS.

All cells with the same settings share one file of windows. Their methods are then compared on the
same text.
"""

from __future__ import annotations

from pathlib import Path

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

FOLDER = "calibration"


def shared_windows(
    output: Path, results: SweepResults, label: str, recipe: Recipe, options: RunOptions
) -> torch.Tensor:
    """The calibration windows for a recipe. They are drawn if no cell has needed them yet.

    New windows are written into `output` and entered in `results`. The caller saves the results.

    Returns:
        Token ids (samples, seqlen), int64.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, OSError: see
            `prunus.calibration.sources.Source`.
        FileExistsError: the windows differ from those of earlier cells.
    """
    chosen = recipe.model_dump(include={"samples", "seqlen", "seed", "bos"})
    key = {"calibration": recipe.calibration} | chosen
    known = next((x for x in results.calibration if (x.model, x.options) == (label, key)), None)
    if known is not None and (output / known.file).exists():
        ids = read_ids(output / known.file)
        _check_same(known, hash_ids(ids), f"{output / known.file} was changed")
        return ids
    model, trust = Path(results.models[label].path), options.trust_remote_code
    asked = Wanted(
        **chosen,
        data=options.data,
        tokenizer=lambda: load_tokenizer(model, trust),
        model=lambda: load_model(model, trust_remote_code=trust),
    )
    source = find_source(recipe.calibration)
    source.check(asked)
    windows = source.draw(asked)
    if known is not None:
        _check_same(known, windows.sha256, f"{recipe.calibration} gives other windows than before")
    else:
        known = CalibrationSet(
            model=label,
            options=key,
            source=windows.source,
            sha256=windows.sha256,
            file=f"{FOLDER}/{label}-{len(results.calibration):02}.safetensors",
            used_bos=windows.bos,
        )
        results.calibration.append(known)
    make_folder(output / FOLDER)
    # The ids may be a view of a larger file of ids. save_safetensors writes only the view.
    ids = windows.ids.to(torch.int32)
    save_safetensors(output / known.file, {"input_ids": ids}, {"source": windows.source})
    return windows.ids


def _check_same(known: CalibrationSet, sha256: str, what: str) -> None:
    if known.sha256 != sha256:
        raise FileExistsError(
            f"{what}: cells of this sweep were calibrated on windows with the sha256 "
            f"{known.sha256[:12]}…, these have {sha256[:12]}…. Choose another output folder"
        )
