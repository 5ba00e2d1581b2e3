"""Checkpoints in fewer bytes: the verbs compress, pack and unpack.

run.py               compress: linears take a given number of bits per weight
recipe.py            bits, and what prune has too
job.py               the checked run: memory, bytes, what can be packed
loss_sensitivity.py  how the loss depends on each linear
rate_control.py      the step of each linear, so that all of them take the bits that were asked for
quantize_rows.py     embeddings and heads, rounded without calibration
output.py            the folder of the result
record.py, card.py   what was done

pack.py              pack: the linears of a pruned model as bitmaps
unpack.py            unpack: an ordinary checkpoint again
pack_record.py       their record and their folder
"""
