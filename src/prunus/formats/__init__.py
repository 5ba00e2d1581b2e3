"""Formats of files: how the values of a model become bytes, and how many."""
