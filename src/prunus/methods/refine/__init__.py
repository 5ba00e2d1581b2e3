"""Steps that improve the mask or the target of any method.

swaps.py          swap kept against pruned weights while that lowers the output error
dense_targets.py  approximate the outputs of the dense model
"""
