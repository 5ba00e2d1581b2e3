"""Zeros in place of weights: the command prune, with its options, record and allocation."""
