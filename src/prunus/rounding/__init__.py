"""Weights in few bits: how they are rounded, what it costs, and which type each weight gets."""
