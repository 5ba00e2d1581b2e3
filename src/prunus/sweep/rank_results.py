"""A sweep's records while several ranks work on its cells: each keeps its own, the first puts them together.

All ranks need the sweep's folder. The first rank alone writes `results.json`; the others write the record of a cell into
the cell's folder, so that nothing of theirs is lost in a kill, and the next run finds it there.
"""

from __future__ import annotations

import json
from pathlib import Path

from prunus.distributed import Ranks
from prunus.methods import METHODS
from prunus.model.checkpoint.atomic_files import read_json, write_json
from prunus.pruning.job import RunOptions
from prunus.sweep.calibration_windows import shared_windows
from prunus.sweep.checks import check_sweep
from prunus.sweep.grid import Sweep
from prunus.sweep.results import CellResult, ModelResult, SweepResults

__all__ = ["CELLS", "begin", "collect", "exchange_models", "prepare", "save"]

CELLS = "cells"
_RECORD = "cell.json"


def begin(sweep: Sweep, output: Path, options: RunOptions, file: str, ranks: Ranks) -> SweepResults:
    """What is known before any work, alike on all ranks; nothing is written.

    Raises:
        What `check_sweep` raises.
    """
    found = ranks.on_rank_0(
        lambda: check_sweep(sweep, output, options, file).model_dump(mode="json")
    )
    return SweepResults.model_validate(found)


def prepare(results: SweepResults, output: Path, options: RunOptions, ranks: Ranks) -> SweepResults:
    """What killed ranks left is taken in, and for several ranks the calibration windows are drawn."""

    def settle() -> object:
        _take_in(results, output)
        results.save(output)
        if ranks.size > 1:
            for cell in results.cells:
                if cell.state != "done" and METHODS[cell.recipe.method].needs != "none":
                    model = Path(results.models[cell.model].path)
                    shared_windows(output, results, cell.model, model, cell.recipe, options)
            results.save(output)
        return results.model_dump(mode="json")

    return SweepResults.model_validate(ranks.on_rank_0(settle))


def save(results: SweepResults, cell: CellResult | None, output: Path, ranks: Ranks) -> None:
    """Keep what this rank found: of `cell`, or of a dense model."""
    if ranks.rank == 0:
        results.save(output)
    elif cell is not None:
        folder = output / CELLS / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _RECORD, cell.model_dump(mode="json"))


def exchange_models(results: SweepResults, ranks: Ranks) -> None:
    """Put what each rank found of the dense models into everybody's results."""
    ranks.barrier("the dense models")
    mine = {label: model.model_dump(mode="json") for label, model in results.models.items()}
    for text in ranks.gather_text(json.dumps(mine)):
        for label, content in json.loads(text).items():
            its, known = ModelResult.model_validate(content), results.models[label]
            its.scores, its.tasks = known.scores | its.scores, known.tasks | its.tasks
            its.error = known.error or its.error
            results.models[label] = its


def collect(results: SweepResults, output: Path, ranks: Ranks) -> SweepResults:
    """The results of all ranks, written by the first; on all of them."""
    ranks.barrier("the cells")

    def together() -> object:
        if ranks.size > 1:
            _take_in(results, output)
            results.save(output)
        return results.model_dump(mode="json")

    return SweepResults.model_validate(ranks.on_rank_0(together))


def _take_in(results: SweepResults, output: Path) -> None:
    """Enter what other ranks have left in the cells' folders, now or in a run that was killed."""
    for place, cell in enumerate(results.cells):
        path = output / CELLS / cell.name / _RECORD
        if path.exists():
            its = CellResult.model_validate(read_json(path))
            if its.recipe == cell.recipe and its.recovery == cell.recovery and cell.state != "done":
                results.cells[place] = its
            results.save(output)
            path.unlink()
