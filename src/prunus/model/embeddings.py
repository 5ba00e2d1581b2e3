"""Embeddings that look up rows of a table, which some families multiply by a number."""

from __future__ import annotations

from torch import nn


def is_table(module: nn.Module) -> bool:
    """Whether a module returns rows of its weight, times its `embed_scale` if it has one.

    Classes of transformers that scale rows have a name that ends like this, and one body. Other
    subclasses of `nn.Embedding` may compute anything with their weight.
    """
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and scaled)


def is_plain(module: nn.Module) -> bool:
    """Whether a module does no more with its weight than multiply by it, or look up its rows."""
    return type(module) is nn.Linear or is_table(module)
