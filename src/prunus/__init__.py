"""Prune large language models after training.

prune        prune a checkpoint or a loaded model
compress     compress a checkpoint to a number of bits per weight
perplexity   score a model on text
evaluate     score a model on tasks
compare      test whether two models differ by more than chance
inspect      list the linears of a checkpoint with their sparsity
recover      train a pruned checkpoint, with its zeros kept
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunus.packed.register import register

if TYPE_CHECKING:
    from prunus.evaluation import PerplexityResult, TaskResults, compare, evaluate, perplexity
    from prunus.evaluation.inspection import Inspection, inspect
    from prunus.pruning.manifest import Manifest
    from prunus.pruning.recipe import Recipe
    from prunus.pruning.run import compress, prune
    from prunus.recovery import RecoveryRecord, recover

__all__ = [
    "Inspection",
    "Manifest",
    "PerplexityResult",
    "Recipe",
    "RecoveryRecord",
    "TaskResults",
    "compare",
    "compress",
    "evaluate",
    "inspect",
    "perplexity",
    "prune",
    "recover",
]

# Where each public name lives. It is imported on first use: torch and transformers take seconds to
# import, and `prunus --help` needs neither. No module of the package may have a public name's own
# name, because importing it would hide that name.
_HOMES = {
    "Inspection": "prunus.evaluation.inspection",
    "Manifest": "prunus.pruning.manifest",
    "PerplexityResult": "prunus.evaluation",
    "Recipe": "prunus.pruning.recipe",
    "RecoveryRecord": "prunus.recovery",
    "TaskResults": "prunus.evaluation",
    "compare": "prunus.evaluation",
    "compress": "prunus.pruning.run",
    "evaluate": "prunus.evaluation",
    "inspect": "prunus.evaluation.inspection",
    "perplexity": "prunus.evaluation",
    "prune": "prunus.pruning.run",
    "recover": "prunus.recovery",
}


# After this, transformers loads packed checkpoints, even if it is imported later.
register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
