"""Steps that improve the mask or the target of any method: swaps and dense targets."""
