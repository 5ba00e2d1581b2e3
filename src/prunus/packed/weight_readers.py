"""Linears whose weight the code of a model reads itself, also where it does not call them.

Mamba multiplies with `self.dt_proj.weight`, and Mamba 2 asks for `self.lm_head.weight.dtype`. In a
packed linear `weight` is storage, which such code would take for numbers. So these linears are
dense in memory, although the checkpoint stores them packed.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch

from prunus.packed.embedding import TiedHead, unpack_module
from prunus.packed.linear import PackedLinear

#: Methods that prepare a model, and do not compute with it.
_PREPARING = re.compile(r"_*(init|reset|tie|get_|set_|resize)")

#: BLOOM reads these only with `slow_but_exact`, which repeats the rounding of several GPUs.
_NEVER_IN_PRACTICE = {("BloomAttention", "dense"), ("BloomMLP", "dense_4h_to_h")}


def expand_read_linears(model: Any, dtype: torch.dtype) -> list[str]:
    """Replace packed linears whose weight the model's code reads by dense ones.

    Returns:
        Paths of the packed modules that were replaced.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedLinear | TiedHead):
            continue
        above, _, child = name.rpartition(".")
        kind: Any = type(model.get_submodule(above))
        if (kind.__name__, child) in _NEVER_IN_PRACTICE or not _reads_weight(kind, child):
            continue
        if isinstance(module, TiedHead):
            owner = module.embedding
            name = next(path for path, each in model.named_modules() if each is owner)
        unpack_module(model, name, dtype)
        replaced.append(name)
    return replaced


@functools.cache
def _reads_weight(kind: Any, child: str) -> bool:
    """Whether a method of `kind`, a module's class, reads the weight of its child."""
    read = re.compile(rf"\bself\.{re.escape(child)}\.weight\b(?!\s*=[^=])")
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if _PREPARING.match(name) or method.__module__.startswith("torch."):
            continue
        try:
            text = inspect.getsource(method)
        except (OSError, TypeError):  # code without a file
            continue
        if read.search(text):
            return True
    return False
