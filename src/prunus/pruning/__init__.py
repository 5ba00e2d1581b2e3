"""Zeros in place of weights: the verb prune, with its options, record and allocation."""
