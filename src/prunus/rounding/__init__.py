"""Weights in few bits: how they are rounded, what it costs, and which type each weight gets.

One word for each thing:

- type: what a weight is stored as, such as Q4_K: values, scales and bytes. In code it is a
  quantizer, a `GroupQuantizer`, because `type` is a word of Python.
- round: give a weight values of its type, with feedback (later columns correct the errors of
  earlier ones) or to nearest (each weight by itself).
- fit: choose the scales of a group, so that its rounded weights are near.
- sweep: the pass over the columns of a linear that rounds with feedback.
- code: the small integer that scales a group. level: the index of a value of the type.
- encode: turn a rounded weight into the tensors of a file. decode: the inverse.
- trial: a piece of a run that is timed, to say how long the run takes.

"Quantised" is said of models and files of any program, as their users say it.

group_quantizer.py     the values of weights whose columns share scales in groups
group_fits.py          scales that fit the weights of a group, and rounding without feedback
codebooks.py           several columns share a row of a grid: their fit
group_sweep.py         rounding with feedback: the OBS sweep of methods/solvers
output_gain.py         factors of rows that keep the length of outputs
lattice.py             weights that have the values of a type already
rounding_method.py     rounding as a method, which compress uses
loss_sensitivity.py    how the loss of the dense model grows with errors in each linear
measuring_trial.py     how long that measurement takes
type_choice.py         the type of each weight, by its loss, bytes and time
size_plan.py           which weights have types, and how large the result becomes
compression_recipe.py  the options of compress
compression_record.py  its record
cards.py               model cards
llama_cpp.py           names that llama.cpp knows: types, presets, times
llama_cpp_losses.py    what llama.cpp's formats lose, for comparison
"""
