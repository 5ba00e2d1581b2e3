"""One cell of a sweep: prune, recover, score. Each finished step is entered in the cell's result.

A cell's folder contains its record, and in `model` the weights for as long as they are needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.sources import find_source
from prunus.calibration.windows import Wanted
from prunus.engine.options import RunOptions
from prunus.engine.session import Session
from prunus.evaluation.inspection import packed_size, stored_size
from prunus.evaluation.options import TaskOptions, TextOptions
from prunus.evaluation.perplexity import perplexity
from prunus.evaluation.reference import Reference
from prunus.evaluation.task_runner import evaluate
from prunus.model.checkpoint.atomic_files import TEMPORARY_SUFFIX, copy_file, in_held, make_folder
from prunus.model.loading import load_model
from prunus.model.tokenizer import load_tokenizer
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from prunus.pruning.run import run
from prunus.recovery.record import RecoveryRecord
from prunus.recovery.run import recover
from prunus.sweeping.grid import Scoring
from prunus.sweeping.results import CalibrationSet, CellResult, SweepResults, SweptModel

#: The name of the folder of weights in the folder of a cell.
WEIGHTS = "model"


def windows_of(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe that decide its windows, by name: cells share windows by them."""
    return recipe.model_dump(include={"calibration", "samples", "seqlen", "seed", "bos"})


def draw_windows(
    results: SweepResults, label: str, recipe: Recipe, options: RunOptions
) -> torch.Tensor:
    """The calibration windows for a recipe, (samples, seqlen) int64.

    Args:
        results: Get an entry for the windows, unless they have one from an earlier run.
        label: The label of the dense model, whose tokenizer cuts the windows.
        recipe: Chooses the windows.
        options: The data folder, and whether remote code is trusted.

    Raises:
        FileExistsError: The windows are not those of the entry, so cells could not be compared.
        ValueError, OSError, ModuleNotFoundError: As `Source.check` and `Source.draw`.
    """
    key = windows_of(recipe)
    model = Path(results.models[label].path)
    trust = options.trust_remote_code
    request = Wanted(
        **{name: value for name, value in key.items() if name != "calibration"},
        data=options.data,
        tokenizer=lambda: load_tokenizer(model, trust),
        model=lambda: load_model(model, trust_remote_code=trust),
    )
    source = find_source(recipe.calibration)
    source.check(request)
    windows = source.draw(request)
    entry = next((x for x in results.calibration if (x.model, x.options) == (label, key)), None)
    if entry is None:
        results.calibration.append(
            CalibrationSet(
                model=label,
                options=key,
                source=windows.source,
                sha256=windows.sha256,
                used_bos=windows.bos,
            )
        )
    elif entry.sha256 != windows.sha256:
        raise FileExistsError(
            f"{recipe.calibration} gives other windows than before: cells of this sweep were "
            f"calibrated on windows with the sha256 {entry.sha256[:12]}…, these have "
            f"{windows.sha256[:12]}…. Choose another output folder"
        )
    return windows.ids


def prune_cell(
    cell: CellResult, folder: Path, model: Path, options: RunOptions, session: Session
) -> Path:
    """Prune into the cell's folder.

    A run that was stopped is resumed, and deleted weights are made again, to the same bytes.

    Args:
        cell: Gets the totals of the run in `pruning`, unless it has them.
        folder: The folder of the cell.
        model: The checkpoint of the dense model.
        options: How the run works; its `input_ids` are the calibration windows.
        session: Who hears of each block.

    Returns:
        The folder of the pruned weights.

    Raises:
        ValueError, OSError: As `prunus.prune`.
    """
    weights = in_held(folder / WEIGHTS)
    make_folder(folder)
    manifest = run(model, weights, cell.recipe, options, session)
    copy_file(weights / Manifest.FILE, folder / Manifest.FILE)
    if cell.pruning is None:
        windows = {"calibration_sha256": manifest.inputs.calibration_sha256}
        cell.pruning = manifest.summary() | windows
    return weights


def recover_cell(
    cell: CellResult,
    folder: Path,
    pruned: Path,
    dense: Path,
    recovery: dict[str, Any],
    options: RunOptions,
) -> Path:
    """Recover pruned weights into the cell's folder. An earlier attempt is resumed.

    Args:
        cell: Gets the totals of the run in `recovered`.
        folder: The folder of the cell.
        pruned: The checkpoint of the pruned weights, which belongs to another cell.
        dense: The checkpoint of the model before pruning.
        recovery: A table of the sweep file: options of `prunus recover`. With `teacher = "dense"`
            the model before pruning is the teacher.
        options: Device and data folder, which the table may replace.

    Returns:
        The folder of the recovered weights.

    Raises:
        ValueError, OSError: As `prunus.recover`.
    """
    weights = in_held(folder / WEIGHTS)
    make_folder(folder)
    chosen = {"device": options.device, "data": options.data} | recovery
    if recovery.get("teacher") == "dense":
        chosen["teacher"] = dense
    record = recover(pruned, weights, progress=False, **chosen)
    copy_file(weights / RecoveryRecord.FILE, folder / RecoveryRecord.FILE)
    cell.recovered = record.totals
    return weights


def score_model(
    model: Path,
    scoring: Scoring,
    options: RunOptions,
    record: SweptModel,
    dense: Reference,
    finished: Callable[[str, float], None],
) -> None:
    """Measure a checkpoint's size, and score it on every text and task that its record lacks.

    Args:
        model: The checkpoint.
        scoring: How to score.
        options: Device, memory, data folder and trust in remote code.
        record: Gets the figures: a cell, or a dense model.
        dense: The dense model. It scores itself with what the comparisons of cells need as well.
        finished: Is called with what was scored and its value, after each text and each metric.

    Raises:
        ValueError, OSError: The checkpoint, a text or a task cannot be read.
    """
    if record.size is None:
        record.size = stored_size(model, options.trust_remote_code)
        record.packed = packed_size(model, options.trust_remote_code)
    is_cell = isinstance(record, CellResult)
    # A cell is compared with the dense model, which is compared with nothing.
    scored, reference = (model, dense) if is_cell else (dense, None)
    how = scoring.arguments(TextOptions, options)
    for text in scoring.texts:
        if text not in record.scores:
            result = perplexity(scored, text, reference=reference, progress=False, **how)
            record.scores[text] = result
            finished(f"perplexity on {text}", result.perplexity)
            if result.divergence is not None:
                finished(f"KL divergence on {text}", result.divergence.kl)
    if scoring.tasks and not record.tasks:
        how = scoring.arguments(TaskOptions, options)
        results = evaluate(model, scoring.tasks, progress=False, **how)
        for (task, metric), value in results.metrics().items():
            record.tasks.setdefault(task, {})[metric] = value.as_dict()
            finished(f"{metric} on {task}", value.value)


def discard_weights(folder: Path) -> None:
    """Delete a cell's weights; its record stays.

    The folder is renamed first, so a kill in between leaves nothing that looks like a checkpoint.

    Args:
        folder: The folder of the cell, which need not hold weights.
    """
    weights = in_held(folder / WEIGHTS)
    doomed = weights.with_name(WEIGHTS + TEMPORARY_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    if weights.exists():
        weights.rename(doomed)
        shutil.rmtree(doomed)
