"""What structured pruning removes, and how the rest compensates for it: tensor functions."""
