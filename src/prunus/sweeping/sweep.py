"""The story of a sweep: check everything, then let `cells` score the models and run the cells.

`results.json` is written after every step, so a sweep that was killed continues at the step where
it stopped. If a cell fails, its error is recorded and the other cells run. The next run of the
same command tries it again. `earlier` keeps the figures whose texts, weights and code are what they
were, and has the others measured again.

The dense model runs once for each text, and what its last block returns is kept, because every cell
is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.distributed.group import started_by_torchrun
from prunus.engine.folder import locked_output
from prunus.engine.run_options import RunOptions
from prunus.evaluation.eval_options import TaskOptions
from prunus.evaluation.model_input import unchanged
from prunus.evaluation.perplexity import check_text
from prunus.evaluation.task_scores import prepare_tasks
from prunus.hardware.machine import describe_hardware, installed_version, versions
from prunus.methods import get_method
from prunus.model.checkpoint.output_folder import check_apart, holds_result
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.device import choose_device
from prunus.model.kinds import require_causal
from prunus.model.open_folder import OpenFolder
from prunus.model.source import CheckpointSource
from prunus.options import takes
from prunus.pruning.prune import Pruning
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.recovery.recovery_plan import full_fingerprint
from prunus.sweeping.cells import Runner
from prunus.sweeping.earlier import Today, enter_earlier, naming
from prunus.sweeping.grid import Sweep
from prunus.sweeping.results import DenseResult, SweepResults


@takes(RunOptions, without=("overwrite", "resume"))
def sweep(
    grid: str | Path | Sweep,
    output: str | Path,
    *,
    models: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> SweepResults:
    """Prune and score a grid of models, methods and sparsities, as `prunus sweep` does.

    A sweep that was stopped continues when the same call is made again.

    Args:
        grid: The sweep file (TOML), or a `prunus.sweeping.grid.Sweep`.
        output: Folder of the results.
        models: Models to use in place of those in the file.
        progress: Called with a line of text after every step.
        **options: Device, memory, data folder and trust in remote code, for all cells.

    Returns:
        The results. A cell that failed has a message in `CellResult.error`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError: Before any work; says
            what was given, what is wrong and what to do.
    """
    chosen = Sweep.read(grid, {"models": tuple(models) or None})
    folder = Path(output)
    file = "a Sweep object" if isinstance(grid, Sweep) else Path(grid).name
    if started_by_torchrun():
        raise ValueError(
            "a sweep runs in one process, and torchrun started several: call it without torchrun, "
            "or give each process a sweep and a folder of its own"
        )
    run_options = RunOptions.read(None, options)
    # What the folder holds decides what is done, so from here on no other run may change it.
    with locked_output(folder, lambda: check_folder(chosen, folder)):
        opened = open_models(chosen, run_options)
        with unchanged(*opened.values()):
            results = check_sweep(chosen, folder, run_options, file, opened)
            report = progress or (lambda line: None)
            for line in results.kept_and_changed():
                report(line)
            return Runner(chosen, results, opened, folder, run_options, report).run()


def open_models(sweep: Sweep, options: RunOptions) -> dict[str, OpenFolder]:
    """The folders of the dense models of a sweep, by label."""
    models = sweep.labels().items()
    return {label: open_folder(name, options.trust_remote_code) for label, name in models}


def check_sweep(
    sweep: Sweep,
    output: Path,
    options: RunOptions,
    file: str,
    opened: Mapping[str, OpenFolder] | None = None,
) -> SweepResults:
    """Check a sweep before any work.

    Args:
        sweep: The sweep.
        output: Folder of the results, which may hold an earlier run of the sweep.
        options: Those of the command.
        file: Name of the sweep file, for the results.
        opened: What `open_models` returned; None opens the models.

    Returns:
        The results so far, with all cells: those of an earlier run, and new ones to fill in.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: A model, a text, a task, a recovery or a
            cell cannot be used; the message names it.
        FileExistsError: The folder holds something else, or a sweep that differs in more than
            cells.
    """
    fresh = check_folder(sweep, output)
    models, scorer, sources = {}, dict[str, str](), dict[str, CheckpointSource]()
    opened = opened or open_models(sweep, options)
    for label, folder in opened.items():
        check_apart(output, folder.path)
        source = sources[label] = CheckpointSource(folder)
        require_causal(source.config, f"a sweep (of {sweep.labels()[label]})")
        models[label] = DenseResult(
            path=str(folder.path), fingerprint=source.fingerprint, state="waiting"
        )
    for text in sweep.scoring.texts:
        check_text(text, options.data)
    if sweep.scoring.tasks:
        how = sweep.scoring.arguments(TaskOptions, options)
        prepare_tasks([*opened.values()], sweep.scoring.tasks, **how)
        scorer = {"lm_eval": installed_version("lm_eval")}
    for name, table in sweep.recovery.items():
        try:
            RecoveryOptions.read(None, {k: x for k, x in table.items() if k != "teacher"})
        except ValueError as fault:
            raise ValueError(f"recovery.{name}: {fault}") from None
    # All bytes of the weights are read last.
    for label, source in sources.items():
        models[label].weights_sha256 = full_fingerprint(source)
    results = SweepResults(
        file=file,
        title=sweep.title or f"Sweep of {', '.join(models)}",
        description=sweep.description,
        scoring=sweep.scoring.figures_from(),
        recovery=sweep.recovery,
        hardware=describe_hardware(choose_device(options.device)),
        versions=versions() | scorer,
        models=models,
        cells=sweep.cells(),
    )
    if not fresh:
        enter_earlier(SweepResults.load(output), Today(results, sweep, opened, output, options))
    for cell in results.cells:
        if cell.state != "done":
            with naming(cell):
                cell.method_name = get_method(cell.recipe.method).name
                # With dtype "auto" the plan would run the model to choose a dtype, which is work.
                recipe = cell.recipe.model_copy(update={"dtype": "float32"})
                if cell.recovers is None:
                    Pruning(opened[cell.model], None, recipe, options).plan()
    return results


def check_folder(sweep: Sweep, output: Path) -> bool:
    """Check that a sweep may write into a folder.

    Args:
        sweep: The sweep, whose models the folder must not overlap.
        output: Folder of the results.

    Returns:
        Whether the folder holds no sweep yet.

    Raises:
        FileExistsError: The folder holds something that is not a sweep.
        ValueError: The folder is a model of the sweep, or inside one.
    """
    for name in sweep.labels().values():
        check_apart(output, Path(name))
    return not holds_result(output, SweepResults.FILE, "prunus sweep", overwrite=False)
