"""Structured pruning: remove whole experts and blocks, so a model is smaller.

structure_record  the recipe of a run, and the file `prunus-structure.json` beside its result
structure_plan    all checks before any work, and the smaller model without weights
tensor_layout     which tensors a smaller block has, and whether it computes the same
search            which blocks are removed
step              one block: choose, cut and repair
shrink            the whole run, and the folder of its result

The scores are in `methods/structured.py`.
"""
