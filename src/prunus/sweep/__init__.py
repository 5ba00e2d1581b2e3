"""Sweeps: a grid of models, methods, sparsities, seeds and recoveries, all scored in the same way.

grid.py                 the sweep file, and the cells that it spans
sweep.py                the story of a sweep: baselines, then one cell after the other
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
    from prunus.sweep.checks import check_sweep
    from prunus.sweep.grid import Cell, Scoring, Sweep, load_sweep
    from prunus.sweep.sweep import run_sweep

__all__ = ["Cell", "Scoring", "Sweep", "check_sweep", "load_sweep", "run_sweep"]

_HOMES = {
    "Cell": "prunus.sweep.grid",
    "Scoring": "prunus.sweep.grid",
    "Sweep": "prunus.sweep.grid",
    "check_sweep": "prunus.sweep.checks",
    "load_sweep": "prunus.sweep.grid",
    "run_sweep": "prunus.sweep.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
