"""Structured pruning: remove whole experts, blocks, channels and heads, so a model is smaller."""
