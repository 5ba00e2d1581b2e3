"""Structured pruning: whole experts, blocks, channels and heads leave; the result is smaller.

recipe.py     what goes, validated; free of torch
record.py     what went: the file `prunus-structure.json` beside the result
config.py     the configuration of the smaller model
layout.py     which tensors of a block become smaller, and along which axis
plan.py       all checks before any work
experts.py    which experts go
blocks.py     which blocks go
target.py     what a target asks for; free of torch
target_plan.py   the widths that a search for it may choose from
target_search.py blocks and width, by measured KL divergence per byte
width_plan.py how many channels and heads stay
width_layout.py which tensors of a block they are part of
spans.py      where channels and heads lie on an axis, also of joined linears
layout_trial.py which of several layouts it is, found by running a block
width.py      which of them go, and what makes up for them
repair.py     what makes up for what went: training towards the dense model
output.py     the folder of the smaller checkpoint
run.py        the story of one run
"""
