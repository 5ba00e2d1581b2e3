"""Prune large language models after training.

prune        prune a checkpoint or a loaded model
perplexity   score a model
inspect      what is in a checkpoint
"""

from prunus.evaluation import PerplexityResult, perplexity
from prunus.inspection import Inspection, inspect
from prunus.manifest import Manifest
from prunus.prune import prune
from prunus.recipe import Recipe

__all__ = ["Inspection", "Manifest", "PerplexityResult", "Recipe", "inspect", "perplexity", "prune"]
