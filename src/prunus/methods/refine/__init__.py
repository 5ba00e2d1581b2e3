"""Steps that improve the mask or the targets of any method: swaps, DSnoT, dense targets, permutation."""
