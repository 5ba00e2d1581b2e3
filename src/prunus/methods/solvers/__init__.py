"""Linear algebra that methods share.

obs.py                  the OBS sweep: prune column by column, and correct the columns after it
obs_reference_order.py  the same sweep in the order of operations of the original code
least_squares.py        the best weights for a mask
admm_operator.py        the matrix of an ADMM step
"""
