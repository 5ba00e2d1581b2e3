"""Pruning methods: pure tensor functions, one file each.

    table.py          the table of methods, and what each supports
    options.py        the options of methods and their ranges; free of torch
    base.py           what a method is and what it returns
    row_shards.py     the rows of a linear split over processes
    patterns.py       which weights compete, and from scores to a mask
    statistics.py     what a method knows of a linear's inputs
    allocation.py     how a sparsity is distributed over layers

    magnitude.py      |W|
    wanda.py          |W| · ‖X‖
    wanda_variant.py  the same score; every row gives up the same share of its total
    ria.py            a weight's share of its row and its column, times a power of ‖X‖
    sparsegpt.py      mask and weight update by the OBS sweep
    obs_ablations.py  a mask from magnitude or Wanda, and the update of the OBS sweep
    alps.py           mask and weights together by ADMM

    composition.py    a method, a refinement of its mask and a weight update as one method
    refine/           better masks and targets: swaps, dense targets
    solvers/          the OBS sweep, least squares on a mask, the ADMM operator

Names are imported when they are first used, so that a recipe can check options without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.methods.base import Method, Pruned
    from prunus.methods.composition import compose
    from prunus.methods.options import MethodOptions
    from prunus.methods.table import METHODS, check_options, default_group, get_method

__all__ = [
    "METHODS",
    "Method",
    "MethodOptions",
    "Pruned",
    "check_options",
    "compose",
    "default_group",
    "get_method",
]

_HOMES = {
    "METHODS": "prunus.methods.table",
    "Method": "prunus.methods.base",
    "MethodOptions": "prunus.methods.options",
    "Pruned": "prunus.methods.base",
    "check_options": "prunus.methods.table",
    "compose": "prunus.methods.composition",
    "default_group": "prunus.methods.table",
    "get_method": "prunus.methods.table",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
