"""Pure functions of structured pruning: saliencies, what is removed, and what compensates for it.

experts.py    saliencies of experts, and the experts that stay
blocks.py     the cosine rule and the KL divergence, for blocks
channels.py   groups of input columns that go, and least squares for those that stay
"""
