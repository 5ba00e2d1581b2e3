"""Sweeps: a grid of models, methods, sparsities, seeds and recoveries, judged alike.

grid.py      the sweep file and the cells that it spans
sweep.py     the story of a sweep: baselines, cell after cell
checks.py    what is looked at before any work
cells.py     one cell: prune, recover, score
windows.py   calibration windows, drawn once and shared
"""

from prunus.sweep.checks import check_sweep
from prunus.sweep.grid import Cell, Scoring, Sweep, load_sweep
from prunus.sweep.sweep import run_sweep

__all__ = ["Cell", "Scoring", "Sweep", "check_sweep", "load_sweep", "run_sweep"]
