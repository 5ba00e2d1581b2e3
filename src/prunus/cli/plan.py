"""The command plan: what a command that writes a model would do and cost."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

from prunus.engine.run_options import RunOptions
from prunus.options import one_of, takes
from prunus.pruning.recipe import Recipe
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.structure.structure_record import StructureRecipe
from prunus.words import parse_bytes

#: Name of a command -> its class, a `Command` of the engine, as "module:class".
COMMANDS = {
    "prune": "prunus.pruning.prune:Pruning",
    "compress": "prunus.compression.compress:Compression",
    "shrink": "prunus.structure.shrink:Shrinking",
    "recover": "prunus.recovery.recover:Recovering",
    "import": "prunus.formats.gguf.import_checkpoint:Importing",
}
# Name of a command -> its options, of commands that take a file of them.
_RECIPES = {"prune": Recipe, "compress": CompressionRecipe, "shrink": StructureRecipe}
# Options that belong to one command: the first of these that is given says which one is planned.
_TELLING = {
    "compress": ("bits", "size", "type", "types_from"),
    "shrink": ("blocks", "experts"),
    "recover": ("mode", "text", "teacher"),
}


@takes(Recipe, CompressionRecipe, StructureRecipe, RecoveryOptions, RunOptions)
def plan(
    model: str | Path,
    output: str | Path | None = None,
    command: str | None = None,
    *,
    recipe: Any = None,
    teacher: str | Path | None = None,
    fits: str | int | None = None,
    context: int | None = None,
    tensor_types: str | Path | None = None,
    imatrix: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What a command would do and cost; nothing of a model is written.

    It checks all that a run checks first. For the time of the run it tries a block or two.

    Args:
        model: A checkpoint folder or a hub id; for import a GGUF file.
        output: Folder or file of the result, which is only checked; None leaves that out.
        command: prune, compress, shrink, recover or import. None follows from the options: `bits`,
            `size`, `type` and `fits` belong to compress, `blocks` and `experts` to shrink, `mode`,
            `text` and `teacher` to recover. Without any of them it is prune.
        recipe: The recipe of the command, or a TOML file with any of its options.
        teacher: For recover, the dense model whose logits are learned.
        fits: Plan the largest GGUF file with which llama.cpp takes at most this memory, as a number
            of bytes or such as "8GB".
        context: With `fits`: tokens of the context; None for the model's.
        tensor_types: Where a list of types for llama-quantize is written. Choosing them measures
            the model.
        imatrix: Where an importance matrix for llama-quantize is written.
        progress: Whether to show a bar of that measurement where a person looks.
        **options: Options of the command's recipe and of the run.

    Returns:
        The plan as JSON values; see `describe` of the plan of each command. `needs` has the parts
        of `fits`, and `written` the files. `seconds` is how long the run takes, from a trial of a
        few windows; None if that is unknown. `preset_seconds` has the same of each preset of
        compress, if none was given.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: The run would
            fail; says what was given, what is wrong and what to do.
    """
    started = time.perf_counter()
    work, given = RunOptions.pick(options)
    of_command = {} if teacher is None else {"teacher": teacher}
    if of_command and command not in (None, "recover"):
        raise ValueError(f"{command} takes no `teacher`: leave it out, or plan recover")
    how, output = RunOptions.read(None, work), None if output is None else Path(output)
    lists = [None if path is None else Path(path) for path in (tensor_types, imatrix)]
    written = [str(path) for path in lists if path is not None]
    if written:
        # llama-quantize rounds each weight by itself.
        given = {"rounding": "nearest"} | given
    default = "compress" if written or fits is not None else _command_of(given | of_command)
    one_of([*COMMANDS]).check("command", command or default)
    if fits is None and (command or default) in _RECIPES:
        # Before what is imported for a model: an error of a value comes at once.
        checked = _RECIPES[command or default].read(recipe, given)
        if isinstance(checked, CompressionRecipe):
            checked.check_early(model)
    # These import torch, which takes seconds.
    from prunus.compression.fit import plan_to_fit
    from prunus.compression.type_rounding import write_lists
    from prunus.engine.command import run_verb

    plan: Any
    needs: dict[str, Any] = {}
    if fits is not None:
        memory = parse_bytes(fits, 1000) if isinstance(fits, str) else fits
        plan, needs = plan_to_fit(str(model), output, (recipe, given), how, memory, context)
    else:
        module, _, name = COMMANDS[command or default].partition(":")
        kind = getattr(import_module(module), name)
        run = kind.of(model, output, recipe, {**work, **given}, **of_command)
        plan = run_verb(run, plan_only=True)
    if written:
        described = plan.describe(write_lists(plan, lists[0], lists[1], progress))
    else:
        described = plan.describe()
    described |= {"command": command or default, "written": written, "needs": needs}
    described |= {"seconds": None, "preset_seconds": {}}
    if not (written or needs):
        # What was planned until now is planned by the run too.
        planning = time.perf_counter() - started
        working = run.forecast(plan)
        described["seconds"] = working and round(planning + working, 1)
        if (command or default) == "compress" and recipe is None and given.get("preset") is None:
            for preset in CompressionRecipe.PRESETS if working else ():
                seconds = working
                if preset != run.recipe.preset:
                    options = {**work, **given, "preset": preset}
                    other = kind.of(plan.checkpoint.folder, output, None, options)
                    seconds = other.forecast(run_verb(other, plan_only=True))
                described["preset_seconds"][preset] = seconds and round(planning + seconds, 1)
    return described


def _command_of(options: dict[str, Any]) -> str:
    """The command that options belong to.

    >>> _command_of({"bits": 4}), _command_of({"text": "c4"}), _command_of({"sparsity": 0.5})
    ('compress', 'recover', 'prune')
    """
    given = (name for name, telling in _TELLING.items() if options.keys() & telling)
    return next(given, "prune")
