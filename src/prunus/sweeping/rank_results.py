"""Results of a sweep on several ranks, which split the cells. Rank 0 merges their results.

All ranks need access to the sweep's folder. Only rank 0 writes `results.json`. The other ranks
write the result of a cell into the cell's folder. If a rank is killed, the next run finds its
finished cells there.
"""

from __future__ import annotations

import json
from pathlib import Path

from prunus.distributed import Ranks
from prunus.methods import get_method
from prunus.model.checkpoint.atomic_files import read_json, remove_temporaries, write_json
from prunus.model.device import choose_device
from prunus.runs.options import RunOptions
from prunus.sweeping.calibration_windows import shared_windows
from prunus.sweeping.checks import check_sweep
from prunus.sweeping.grid import Sweep
from prunus.sweeping.results import CellResult, ModelResult, SweepResults

__all__ = [
    "CELLS_FOLDER",
    "collect_results",
    "exchange_model_results",
    "initial_results",
    "prepare_results",
    "save_results",
]

CELLS_FOLDER = "cells"
_CELL_FILE = "cell.json"


def initial_results(
    sweep: Sweep, output: Path, options: RunOptions, file: str, ranks: Ranks
) -> SweepResults:
    """Check the sweep on rank 0 and send the results of earlier runs to all ranks.

    Nothing is written.

    Raises:
        See `check_sweep` and `choose_device`.
    """
    choose_device(options.device, processes=ranks.local_size)
    found = ranks.on_rank_0(
        lambda: check_sweep(sweep, output, options, file).model_dump(mode="json")
    )
    return SweepResults.model_validate(found)


def prepare_results(
    results: SweepResults, output: Path, options: RunOptions, ranks: Ranks
) -> SweepResults:
    """Merge what ranks of an earlier run left, and draw the calibration windows for several ranks.

    A single process draws windows when a cell needs them. Several ranks would draw the same windows
    at the same time, so rank 0 draws all of them first.
    """

    def prepare_on_rank_0() -> object:
        # What a killed run left half-written. The runs of cells clear the folders of weights.
        for folder in (output, *(path for path in output.glob("*") if path.is_dir())):
            remove_temporaries(folder)
        for folder in output.glob(f"{CELLS_FOLDER}/*"):
            remove_temporaries(folder)
        _merge_cell_files(results, output)
        results.save(output)
        if ranks.size > 1:
            for cell in results.cells:
                if cell.state != "done" and get_method(cell.recipe.method).needs != "none":
                    model = Path(results.models[cell.model].path)
                    shared_windows(output, results, cell.model, model, cell.recipe, options)
            results.save(output)
        return results.model_dump(mode="json")

    return SweepResults.model_validate(ranks.on_rank_0(prepare_on_rank_0))


def save_results(
    results: SweepResults, cell: CellResult | None, output: Path, ranks: Ranks
) -> None:
    """Save what this rank has found.

    Args:
        results: this rank's copy of the results.
        cell: the cell that has changed; None for a dense model, whose result goes through
            `exchange_model_results`.
        output: folder of the sweep.
        ranks: all ranks of the sweep.
    """
    if ranks.rank == 0:
        results.save(output)
    elif cell is not None:
        folder = output / CELLS_FOLDER / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _CELL_FILE, cell.model_dump(mode="json"))


def exchange_model_results(results: SweepResults, ranks: Ranks) -> None:
    """Enter every rank's scores of dense models into the results of all ranks."""
    ranks.barrier("the dense models")
    own = {label: model.model_dump(mode="json") for label, model in results.models.items()}
    for text in ranks.gather_text(json.dumps(own)):
        for label, content in json.loads(text).items():
            received, known = ModelResult.model_validate(content), results.models[label]
            received.scores = known.scores | received.scores
            received.tasks = known.tasks | received.tasks
            received.size = known.size or received.size
            received.error = known.error or received.error
            results.models[label] = received


def collect_results(results: SweepResults, output: Path, ranks: Ranks) -> SweepResults:
    """The results of all ranks. Rank 0 merges and writes them, and all ranks return them."""
    ranks.barrier("the cells")

    def merge_on_rank_0() -> object:
        if ranks.size > 1:
            _merge_cell_files(results, output)
            results.save(output)
        return results.model_dump(mode="json")

    return SweepResults.model_validate(ranks.on_rank_0(merge_on_rank_0))


def _merge_cell_files(results: SweepResults, output: Path) -> None:
    """Enter what other ranks wrote into the cells' folders, in this run or a killed one."""
    for index, cell in enumerate(results.cells):
        path = output / CELLS_FOLDER / cell.name / _CELL_FILE
        if path.exists():
            found = CellResult.model_validate(read_json(path))
            same = found.recipe == cell.recipe and found.recovery == cell.recovery
            if same and cell.state != "done":
                results.cells[index] = found
            # Saved before the file is deleted, so that a kill in between loses nothing.
            results.save(output)
            path.unlink()
