"""Prune large language models after training.

prune        prune a checkpoint or a loaded model
perplexity   score a model on text
evaluate     score a model on tasks
compare      whether models differ by more than chance
inspect      what is in a checkpoint
recover      win quality of a pruned checkpoint back
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunus.packed.register import register

if TYPE_CHECKING:
    from prunus.evaluation import PerplexityResult, TaskResults, compare, evaluate, perplexity
    from prunus.evaluation.inspection import Inspection, inspect
    from prunus.pruning.manifest import Manifest
    from prunus.pruning.recipe import Recipe
    from prunus.pruning.run import prune
    from prunus.recovery import RecoveryRecord, recover

__all__ = [
    "Inspection",
    "Manifest",
    "PerplexityResult",
    "Recipe",
    "RecoveryRecord",
    "TaskResults",
    "compare",
    "evaluate",
    "inspect",
    "perplexity",
    "prune",
    "recover",
]

# Where each public name lives. It is imported when it is first used: torch and transformers take seconds, which
# `prunus --help` need not wait for. No module may bear a public name, or importing it would hide the name.
_HOMES = {
    "Inspection": "prunus.evaluation.inspection",
    "Manifest": "prunus.pruning.manifest",
    "PerplexityResult": "prunus.evaluation",
    "Recipe": "prunus.pruning.recipe",
    "RecoveryRecord": "prunus.recovery",
    "TaskResults": "prunus.evaluation",
    "compare": "prunus.evaluation",
    "evaluate": "prunus.evaluation",
    "inspect": "prunus.evaluation.inspection",
    "perplexity": "prunus.evaluation",
    "prune": "prunus.pruning.run",
    "recover": "prunus.recovery",
}


# transformers learns to load packed checkpoints, now or when it is imported.
register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
