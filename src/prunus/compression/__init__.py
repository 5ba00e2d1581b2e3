"""The verb compress: a checkpoint whose linears take a given number of bits per weight.

recipe.py            bits, and what prune has too
job.py               the checked run: memory, bytes, what can be packed
run.py               compress, and the rounding of each linear
loss_sensitivity.py  how the loss depends on each linear
rate_control.py      the step of each linear, so that all of them take the bits that were asked for
output.py            the folder of the result
record.py, card.py   what was done
"""
