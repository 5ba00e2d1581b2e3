"""One run of any verb.

options.py       the options that every run has
record.py        what was done and how far it is, as JSON next to the result
folder.py        the folder of a result: lock, earlier run, shards, index
card.py          the model card of a result
overlap.py       reading the next block and writing the last one meanwhile
compute_dtype.py, batch_size.py, block_memory.py   what follows from model and machine
progress.py, progress_bar.py                       how far a run is, for people
"""
