"""Pruning methods: pure tensor functions, one file each.

    table.py          the table of methods: what is known of each before it runs
    options.py        the options of methods
    own_method.py     a method by its name, also from a user's own file
    base.py           what a method gives back
    work.py           how the work on a linear is done, such as the split of its rows
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
    structured/       which channels, heads, experts and blocks to remove

Names are imported when they are first used, so that a recipe can check options without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.methods.base import Pruned, masked
    from prunus.methods.composition import compose
    from prunus.methods.options import MethodOptions
    from prunus.methods.own_method import get_method
    from prunus.methods.patterns import Pattern, keep_mask
    from prunus.methods.statistics import InputStatistics
    from prunus.methods.table import METHODS, Method, check_options
    from prunus.methods.work import Work

__all__ = [
    "METHODS",
    "InputStatistics",
    "Method",
    "MethodOptions",
    "Pattern",
    "Pruned",
    "Work",
    "check_options",
    "compose",
    "get_method",
    "keep_mask",
    "masked",
]

_HOMES = {
    "METHODS": "table",
    "InputStatistics": "statistics",
    "Method": "table",
    "MethodOptions": "options",
    "Pattern": "patterns",
    "Pruned": "base",
    "Work": "work",
    "check_options": "table",
    "compose": "composition",
    "get_method": "own_method",
    "keep_mask": "patterns",
    "masked": "base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"prunus.methods.{_HOMES[name]}"), name)
