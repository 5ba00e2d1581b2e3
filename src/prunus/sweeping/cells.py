"""One cell of a sweep: prune, recover, score. Each finished step is entered in the cell's result.

A cell's folder contains its record, and in `model` the weights for as long as they are needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunus.distributed import SINGLE_PROCESS
from prunus.evaluation.perplexity import perplexity
from prunus.evaluation.reference import Reference
from prunus.evaluation.size import packed_size, stored_size
from prunus.evaluation.task_runner import evaluate
from prunus.model.checkpoint.atomic_files import TEMPORARY_SUFFIX, copy_file, in_held, make_folder
from prunus.pruning.manifest import Manifest
from prunus.pruning.run import run
from prunus.recovery.record import RecoveryRecord
from prunus.recovery.run import recover
from prunus.runs.options import RunOptions
from prunus.runs.progress import Progress
from prunus.sweeping.grid import Scoring
from prunus.sweeping.results import CellResult, SweptModel

WEIGHTS = "model"


def prune_cell(
    cell: CellResult,
    folder: Path,
    model: Path,
    ids: torch.Tensor | None,
    options: RunOptions,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Prune a model into the cell's folder, and return the folder with the pruned weights.

    An earlier attempt is resumed. The cell's `pruning` is filled in. `ids` has the shared
    calibration windows (samples, seqlen); it is None for methods that use only weights.
    """
    weights = in_held(folder / WEIGHTS)
    make_folder(folder)
    own = options.model_copy(update={"input_ids": ids, "report": progress})
    manifest = run(model, weights, cell.recipe, own)
    copy_file(weights / Manifest.FILE, folder / Manifest.FILE)
    totals = manifest.all_totals()
    cell.pruning = {key: totals[key] for key in ("weights", "zeros", "sparsity")} | {
        "mean_relative_output_error": totals["mean_relative_output_error"],
        "mean_removed_energy": totals["mean_removed_energy"],
        "seconds": round(totals["block_seconds"], 2),
        "dtype": manifest.inputs.dtype,
        "calibration_sha256": manifest.inputs.calibration_sha256,
    }
    return weights


def recover_cell(
    cell: CellResult,
    folder: Path,
    pruned: Path,
    dense: Path,
    recovery: dict[str, Any],
    options: RunOptions,
) -> Path:
    """Recover pruned weights into the cell's folder, and return the folder with the weights.

    An earlier attempt is resumed. The cell's `recovered` is filled in. `recovery` is a table of the
    sweep file; with `teacher = "dense"` the model before pruning is the teacher.
    """
    weights = in_held(folder / WEIGHTS)
    make_folder(folder)
    chosen = recovery | ({"teacher": dense} if recovery.get("teacher") == "dense" else {})
    record = recover(
        pruned,
        weights,
        device=options.device,
        data=options.data,
        ranks=SINGLE_PROCESS,
        progress=False,
        **chosen,
    )
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
        dense: the dense model, which cells are compared with. It scores itself with what the
            comparisons need as well.
        finished: called with what was scored and its value, after each text and each metric.
    """
    if record.size is None:
        record.size = stored_size(model, options.trust_remote_code)
        record.packed = packed_size(model, options.trust_remote_code)
    is_cell = isinstance(record, CellResult)
    for text in scoring.texts:
        if text in record.scores:
            continue
        result = perplexity(
            model if is_cell else dense,
            text,
            reference=dense if is_cell else None,
            seqlen=scoring.seqlen,
            samples=scoring.limit,
            bos=scoring.bos,
            batch=scoring.batch,
            dtype=scoring.dtype,
            device=options.device,
            data=options.data,
            trust_remote_code=options.trust_remote_code,
            memory=options.memory,
            progress=False,
        )
        record.scores[text] = result
        finished(f"perplexity on {text}", result.perplexity)
        if result.divergence is not None:
            finished(f"KL divergence on {text}", result.divergence.kl)
    if scoring.tasks and not record.tasks:
        results = evaluate(model, scoring.tasks, progress=False, **task_options(scoring, options))
        for (task, metric), value in results.metrics().items():
            record.tasks.setdefault(task, {})[metric] = value.as_dict()
            finished(f"{metric} on {task}", value.value)


def task_options(scoring: Scoring, options: RunOptions) -> dict[str, Any]:
    """The arguments for tasks, as `evaluate` and `prepare_tasks` take them."""
    return {
        "fewshot": scoring.fewshot,
        "limit": scoring.task_limit,
        "dtype": scoring.dtype,
        "device": options.device,
        "data": options.data,
        "trust_remote_code": options.trust_remote_code,
    }


def discard_weights(folder: Path) -> None:
    """Delete a cell's weights. A kill in between leaves no folder that looks like a checkpoint."""
    weights = in_held(folder / WEIGHTS)
    doomed = weights.with_name(WEIGHTS + TEMPORARY_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    if weights.exists():
        weights.rename(doomed)
        shutil.rmtree(doomed)
