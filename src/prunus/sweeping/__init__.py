"""Sweeps: a grid of models, methods, sparsities, seeds and recoveries, all scored in the same way.

grid.py     the sweep file, and the cells that it spans
run.py      the story of a sweep: baselines, then one cell after the other
checks.py   what is checked before any work
cells.py    one cell: windows, pruning, recovery, scores
results.py  results.json and results.csv, which a report reads without torch
"""
