"""Structured pruning: remove whole experts, blocks, channels and heads, so a model is smaller.

records       the recipe of a run, and the file `prunus-structure.json` beside its result
plan          all checks before any work, and the smaller model without weights
layout        which tensors of a block become smaller, and along which axis
width_plan    how many channels and heads stay
width_layout  which rows and columns of the tensors are channels and heads
search        which blocks are removed
step          one block: choose, cut and repair
run           the whole run, and the folder of its result

The scores and the least-squares fits are in `methods/structured.py`.
"""
