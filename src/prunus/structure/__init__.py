"""Structured pruning: remove whole experts, blocks, channels and heads, so that a model is smaller.

run.py        the story of one run
recipe.py     what is removed; imports no torch
record.py     what was removed: the file `prunus-structure.json` next to the result
plan.py       all checks before any work
step.py       the step that makes a block of the smaller model
output.py     the folder of the smaller checkpoint, and card.py its README.md
blocks.py     the search for the blocks to remove
experts.py    the choice of experts
width.py      the choice of channels and heads, and the fit of the rest
repair.py     training of the remaining blocks towards the dense model

layout.py     which tensors of a block become smaller, and along which axis
width_plan.py    how many channels and heads stay
width_layout.py  which tensors of a block they are part of; spans.py: where they are on an axis

target.py     what a target asks for; imports no torch
target_plan.py   the widths that a search for it may choose from
target_search.py blocks and width, by measured KL divergence
"""
