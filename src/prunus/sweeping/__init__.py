"""Sweeps: a grid of models, methods, sparsities, seeds and recoveries, all scored in the same way.

grid.py                 the sweep file, and the cells that it spans
run.py                  the story of a sweep: baselines, then one cell after the other
checks.py               what is checked before any work
cells.py                one cell: prune, recover, score
calibration_windows.py  calibration windows, drawn once and shared by the cells
results.py              results.json and results.csv
rank_results.py         the results of several ranks, merged by rank 0

Names are imported when they are first used, so that a report can read results without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.sweeping.checks import check_sweep
    from prunus.sweeping.grid import Cell, Scoring, Sweep, load_sweep
    from prunus.sweeping.run import run_sweep, sweep

__all__ = ["Cell", "Scoring", "Sweep", "check_sweep", "load_sweep", "run_sweep", "sweep"]

_HOMES = {
    "Cell": "prunus.sweeping.grid",
    "Scoring": "prunus.sweeping.grid",
    "Sweep": "prunus.sweeping.grid",
    "check_sweep": "prunus.sweeping.checks",
    "load_sweep": "prunus.sweeping.grid",
    "run_sweep": "prunus.sweeping.run",
    "sweep": "prunus.sweeping.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
