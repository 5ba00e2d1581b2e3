"""The command plan: what prune, compress or shrink would do and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunus.compression.compress import Compression
from prunus.compression.rounding import write_lists
from prunus.engine.run import planned
from prunus.engine.run_options import RunOptions
from prunus.formats.compression_recipe import CompressionRecipe
from prunus.hardware.sizes import parse_bytes
from prunus.options import takes
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from prunus.structure.shrink import Shrinking
from prunus.structure.structure_record import StructureRecipe

#: Name of a command -> the class of its recipe, and the command as the engine knows it.
_COMMANDS: dict[str, tuple[Any, Any]] = {
    "prune": (Recipe, Pruning),
    "compress": (CompressionRecipe, Compression),
    "shrink": (StructureRecipe, Shrinking),
}


@takes(Recipe, CompressionRecipe, StructureRecipe, RunOptions)
def plan(
    model: str | Path,
    output: str | Path | None = None,
    command: str | None = None,
    *,
    recipe: Any = None,
    fits: str | int | None = None,
    context: int | None = None,
    tensor_types: str | Path | None = None,
    imatrix: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What a command would do and cost; nothing of a model is written.

    It checks all that a run checks first, and reads no weights but those of a dtype trial.

    Args:
        model: A checkpoint folder or a hub id.
        output: Folder or file of the result, which is only checked; None leaves that out.
        command: prune, compress or shrink. None follows from the options: `bits`, `size`, `type`
            and `fits` belong to compress, `blocks` and `experts` to shrink.
        recipe: The recipe of the command, or a TOML file with any of its options.
        fits: Plan the largest GGUF file with which llama.cpp takes at most this memory, as a number
            of bytes or such as "8GB".
        context: With `fits`: tokens of the context; None for the model's.
        tensor_types: Where a list of types for llama-quantize is written. Choosing them measures
            the model.
        imatrix: Where an importance matrix for llama-quantize is written.
        progress: Whether to show a bar of that measurement where a person looks.
        **options: Options of the command's recipe and of the run.

    Returns:
        The plan as JSON values; see `RunPlan.describe`. `needs` has the parts of `fits`, `written`
        the files, and `training` what preset max trains.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: The run would
            fail; says what was given, what is wrong and what to do.
    """
    work, given = RunOptions.pick(options)
    how, output = RunOptions.read(None, work), None if output is None else Path(output)
    lists = [None if path is None else Path(path) for path in (tensor_types, imatrix)]
    written = [str(path) for path in lists if path is not None]
    if trains := given.get("preset") == "max":
        given["preset"] = "best"
    if written:
        # llama-quantize rounds each weight by itself.
        given = {"rounding": "nearest"} | given
    plan: Any
    needs: dict[str, Any] = {}
    if fits is not None:
        from prunus.compression.fit import plan_to_fit

        memory = parse_bytes(fits, 1000) if isinstance(fits, str) else fits
        plan, needs = plan_to_fit(str(model), output, (recipe, given), how, memory, context)
    else:
        kind, build = _COMMANDS[command or _command_of(given, bool(written))]
        chosen = kind.read(recipe, given)
        plan = planned(build(model, output, chosen, how))
    choice = write_lists(plan, lists[0], lists[1], progress) if written else None
    described = plan.describe(choice) | {"written": written, "needs": needs}
    if trains:
        from prunus.recovery.max_preset import plan_training

        described["training"] = plan_training(model, output, plan.recipe, how)
    return described


def _command_of(options: dict[str, Any], writes_lists: bool) -> str:
    """The command that options belong to."""
    if writes_lists or {"bits", "size", "type"} & options.keys():
        return "compress"
    return "shrink" if {"blocks", "experts"} & options.keys() else "prune"
