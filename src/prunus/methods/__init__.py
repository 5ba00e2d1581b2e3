"""Pruning methods: pure tensor functions, one file each. Rounding has a room of its own.

    table.py          methods by their names, also a user's own: what each needs and supports
    own_code.py       what users write themselves and name as FILE.py:NAME
    method_options.py  the options of methods
    work.py           what is asked of a method, how its rows are split, and what it returns
    patterns.py       which weights compete, and from scores to a mask
    statistics.py     what a method knows of a linear's inputs
    allocation.py     how a sparsity is distributed over layers
    structured.py     which experts and blocks to remove
    divergence.py     the KL divergence: for figures, for the order of candidates, for training

    magnitude.py      |W|
    wanda.py          |W| · ‖X‖
    wanda_variant.py  the same score; every row gives up the same share of its total
    ria.py            a weight's share of its row and its column, times a power of ‖X‖
    sparsegpt.py      mask and weight update by the OBS sweep
    sparsegpt_score.py  its score alone
    obs_ablations.py  a mask from magnitude or Wanda, and the update of the OBS sweep
    alps.py           mask and weights together by ADMM
    given_mask.py     the zeros of masks that the user gives

    composition.py    a method, targets of the dense model and a weight update as one method
    dense_targets.py  weights whose outputs approximate those of the dense model
    solvers/          the OBS sweep, least squares on a mask

Names are imported when they are first used, so that a recipe can check options without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.methods.composition import compose
    from prunus.methods.method_options import MethodOptions
    from prunus.methods.patterns import Pattern, keep_mask
    from prunus.methods.statistics import InputStatistics
    from prunus.methods.table import METHODS, Method, check_options, get_method
    from prunus.methods.work import LinearPlace, Pruned, Work, masked

__all__ = [
    "METHODS",
    "InputStatistics",
    "LinearPlace",
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

# Module -> the public names that it defines. `__getattr__` imports the module at the first use.
_HOMES = {
    "composition": ("compose",),
    "method_options": ("MethodOptions",),
    "patterns": ("Pattern", "keep_mask"),
    "statistics": ("InputStatistics",),
    "table": ("METHODS", "Method", "check_options", "get_method"),
    "work": ("LinearPlace", "Pruned", "Work", "masked"),
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used.

    Raises:
        AttributeError: The package has no such name.
    """
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
