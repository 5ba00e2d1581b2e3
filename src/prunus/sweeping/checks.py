"""The checks before a sweep does any work: models, texts, tasks, cells, and the output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunus.evaluation.options import TaskOptions
from prunus.evaluation.perplexity import check_text
from prunus.evaluation.task_runner import prepare_tasks
from prunus.hardware.memory import describe_hardware, versions
from prunus.model.checkpoint.output_folder import check_apart, is_vacant
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.device import choose_device
from prunus.model.kinds import require_causal
from prunus.model.source import CheckpointSource
from prunus.pruning.job import plan_run
from prunus.recovery.options import RecoveryOptions
from prunus.runs.options import RunOptions
from prunus.sweeping.grid import Sweep
from prunus.sweeping.results import RESULTS_NAME, DenseResult, SweepResults


def check_sweep(sweep: Sweep, output: Path, options: RunOptions, file: str) -> SweepResults:
    """Check a sweep before any work: models, texts, tasks, cells. Nothing is written.

    Returns:
        The results of an earlier run of the same sweep, with all cells of this one.
    """
    fresh = check_folder(sweep, output)
    models = {}
    for label, name in sweep.labels().items():
        folder = resolve_folder(name)
        check_apart(output, folder)
        source = CheckpointSource(folder, options.trust_remote_code)
        require_causal(source.config, f"a sweep (of {name})")
        models[label] = DenseResult(path=str(folder), fingerprint=source.fingerprint)
    for text in sweep.scoring.texts:
        check_text(text, options.data)
    if sweep.scoring.tasks:
        folders = [model.path for model in models.values()]
        how = sweep.scoring.arguments(TaskOptions, options)
        prepare_tasks(folders, sweep.scoring.tasks, **how)
    for name, table in sweep.recovery.items():
        try:
            RecoveryOptions.read(None, {k: x for k, x in table.items() if k != "teacher"})
        except ValueError as fault:
            raise ValueError(f"recovery.{name}: {fault}") from None
    results = SweepResults(
        file=file,
        title=sweep.title or f"Sweep of {', '.join(models)}",
        description=sweep.description,
        scoring=sweep.scoring.figures_from(),
        recovery=sweep.recovery,
        hardware=describe_hardware(choose_device(options.device)),
        versions=versions(),
        models=models,
        cells=sweep.cells(),
    )
    if not fresh:
        _merge_earlier(SweepResults.load(output), results, output)
    for cell in results.cells:
        if cell.recovers is None and cell.state != "done":
            try:
                # With dtype "auto" plan_run would run the model to choose a dtype, which is work.
                recipe = cell.recipe.model_copy(update={"dtype": "float32"})
                plan_run(models[cell.model].path, recipe, options)
            except (ValueError, FileNotFoundError, NotImplementedError) as fault:
                raise type(fault)(f"cell {cell.name}: {fault}") from fault
    return results


def check_folder(sweep: Sweep, output: Path) -> bool:
    """Check that a sweep may write into a folder; whether the folder holds no sweep yet."""
    for name in sweep.labels().values():
        check_apart(output, Path(name))
    fresh = is_vacant(output)
    if not fresh and not (output / RESULTS_NAME).exists():
        raise FileExistsError(
            f"output {output} exists and is not a sweep's; it is left as it is. "
            "Choose another folder"
        )
    return fresh


def _merge_earlier(earlier: SweepResults, now: SweepResults, output: Path) -> None:
    """Enter the results of an earlier run into `now`, which may add cells and no more."""

    def check(what: str, before: Any, after: Any) -> None:
        if before != after:
            raise FileExistsError(
                f"{output} holds a sweep with another {what} ({before!r}, now {after!r}); it is "
                "left as it is. Only cells can be added to a sweep: choose another folder"
            )

    if not earlier.models.keys() <= now.models.keys():
        check("set of models", sorted(earlier.models), sorted(now.models))
    for label, model in earlier.models.items():
        check(f"checkpoint {label}", model.fingerprint, now.models[label].fingerprint)
    for key, value in earlier.scoring.items():
        check(f"scoring.{key}", value, now.scoring[key])
    cells, done = ({cell.name: cell for cell in each.cells} for each in (now, earlier))
    for name, cell in done.items():
        check("set of cells", f"with {name}", f"with {name}" if name in cells else "without it")
        recipe = cells[name].recipe.model_dump()
        for key, value in cell.recipe.model_dump().items():
            check(f"{key} in cell {name}", value, recipe[key])
        if (own := cell.recovery) is not None:
            check(f"recovery.{own}", earlier.recovery[own], now.recovery[own])
    # A checkpoint may have moved since: its path is that of now.
    for label, model in earlier.models.items():
        now.models[label] = model.model_copy(update={"path": now.models[label].path})
    now.cells = [done.get(cell.name, cell) for cell in now.cells]
    now.calibration = earlier.calibration
    now.hardware, now.versions = earlier.hardware, earlier.versions
