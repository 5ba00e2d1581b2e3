"""Sweeps: a grid of models, methods, sparsities, seeds and recoveries, scored in the same way."""
