"""Prune large language models after training.

prune        prune a checkpoint or a loaded model
compress     compress a checkpoint to a file size or to bits per weight
shrink       make a model smaller: remove blocks or experts, and repair what is left
recover      train a pruned checkpoint, with its zeros kept
load         a model and its tokenizer: dense, pruned or compressed
perplexity   score a model on text
perplexities score several models on several texts side by side
evaluate     score a model on tasks
compare      test whether two models differ by more than chance
inspect      list the linears of a checkpoint with their sparsity, or compare the zeros of two
masks        which weights of a model are zero, as bits that prune takes
statistics   norms or Gram matrices of the inputs of every linear
sweep        prune and score a grid of models, methods and sparsities
report       show runs, sweeps and evaluations as tables and pages
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# This enters the formats where models are opened.
from prunus.formats import table as _table  # noqa: F401

if TYPE_CHECKING:
    from prunus.cli.plan import plan
    from prunus.compression.compress import compress
    from prunus.evaluation.eval_records import PerplexityResult, compare
    from prunus.evaluation.inspection import Inspection, inspect
    from prunus.evaluation.perplexity import perplexities, perplexity
    from prunus.evaluation.task_scores import evaluate
    from prunus.model.loading import LoadedModel, load
    from prunus.pruning.input_statistics import statistics
    from prunus.pruning.manifest import Manifest
    from prunus.pruning.masks import masks
    from prunus.pruning.prune import prune
    from prunus.pruning.recipe import Recipe
    from prunus.recovery.recover import recover
    from prunus.recovery.recovery_record import RecoveryRecord
    from prunus.reporting.write import report
    from prunus.rounding.compression_recipe import CompressionRecipe
    from prunus.rounding.compression_record import CompressionRecord
    from prunus.structure.shrink import shrink
    from prunus.structure.structure_record import StructureRecipe, StructureRecord
    from prunus.sweeping.sweep import sweep

    __version__: str

__all__ = [
    "CompressionRecipe",
    "CompressionRecord",
    "Inspection",
    "LoadedModel",
    "Manifest",
    "PerplexityResult",
    "Recipe",
    "RecoveryRecord",
    "StructureRecipe",
    "StructureRecord",
    "__version__",
    "compare",
    "compress",
    "evaluate",
    "inspect",
    "load",
    "masks",
    "perplexities",
    "perplexity",
    "plan",
    "prune",
    "recover",
    "report",
    "shrink",
    "statistics",
    "sweep",
]

# Where each public name lives. It is imported on first use: torch and transformers take seconds to
# import, and `prunus --help` needs neither. No module of the package may have a public name's own
# name, because importing it would hide that name: hence the rooms `sweeping` and `reporting`.
_HOMES = {
    "CompressionRecipe": "prunus.rounding.compression_recipe",
    "CompressionRecord": "prunus.rounding.compression_record",
    "Inspection": "prunus.evaluation.inspection",
    "LoadedModel": "prunus.model.loading",
    "Manifest": "prunus.pruning.manifest",
    "PerplexityResult": "prunus.evaluation.eval_records",
    "Recipe": "prunus.pruning.recipe",
    "RecoveryRecord": "prunus.recovery.recovery_record",
    "StructureRecipe": "prunus.structure.structure_record",
    "StructureRecord": "prunus.structure.structure_record",
    "compare": "prunus.evaluation.eval_records",
    "compress": "prunus.compression.compress",
    "evaluate": "prunus.evaluation.task_scores",
    "inspect": "prunus.evaluation.inspection",
    "load": "prunus.model.loading",
    "masks": "prunus.pruning.masks",
    "perplexities": "prunus.evaluation.perplexity",
    "perplexity": "prunus.evaluation.perplexity",
    "plan": "prunus.cli.plan",
    "prune": "prunus.pruning.prune",
    "recover": "prunus.recovery.recover",
    "report": "prunus.reporting.write",
    "shrink": "prunus.structure.shrink",
    "statistics": "prunus.pruning.input_statistics",
    "sweep": "prunus.sweeping.sweep",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("prunus")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})
