"""Pure functions of structured pruning: what to remove, and how the rest compensates for it.

experts.py    saliencies of experts, and the experts that stay
blocks.py     the cosine rule and the KL divergence, for blocks
channels.py   the choice of groups of input columns, and least squares for those that stay
"""
