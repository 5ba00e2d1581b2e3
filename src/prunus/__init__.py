"""Prune large language models after training."""
