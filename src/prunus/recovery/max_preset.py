"""Preset max: prune with preset best, then train all kept weights towards the dense model.

    dense checkpoint ──► prune (preset best) ──► OUT/.prunus-pruned ──► train (mode masked) ──► OUT
           └────────────────────── teacher ──────────────────────────────┘

Both steps are ordinary runs of `prune` and `recover`, so each resumes on its own after a kill. The
pruned checkpoint is a folder inside OUT, and is removed once the result is in place. OUT has no
index before, so no loader takes it for a model. One lock holds OUT during both steps. Everything
that the training would refuse is refused before the pruning begins.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prunus.distributed import fail_together, on_rank_0, process_group, ranks
from prunus.engine.folder import find_earlier, held, remove_result
from prunus.engine.progress import Progress
from prunus.engine.run import carry_out, carry_out_held
from prunus.engine.run_options import RunOptions
from prunus.engine.run_plan import check_known
from prunus.engine.session import Session
from prunus.model.checkpoint.output_folder import (
    check_apart,
    check_disk,
    check_folder_name,
    check_resume,
    check_whole,
    is_vacant,
)
from prunus.model.checkpoint.resolve import resolve_folder
from prunus.model.checkpoint.tensor_files import INDEX_NAME
from prunus.model.source import tensors_digest
from prunus.options import takes
from prunus.pruning.manifest import Manifest
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from prunus.recovery.recover import Recovering
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.recovery.recovery_plan import (
    RecoveryPlan,
    draw_training_text,
    full_fingerprint,
    plan_recovery,
)
from prunus.recovery.recovery_record import RecoveryRecord
from prunus.recovery.training import Step

#: Name of the folder inside the result that holds the pruned checkpoint during the work.
PRUNED = ".prunus-pruned"
#: Minutes of training if no budget is given.
_DEFAULT_MINUTES = 20.0
# Windows of up to this many tokens take the faster attention of `recover`.
_SEQLEN = 512


@takes(Recipe, RunOptions)
def prune_and_recover(
    model: str | Path,
    output: str | Path,
    *,
    minutes: float | None = None,
    tokens: int | None = None,
    recipe: Recipe | str | Path | None = None,
    pruning_progress: Callable[[Progress], None] | None = None,
    training_progress: Callable[[Step], None] | None = None,
    **options: Any,
) -> tuple[Manifest, RecoveryRecord]:
    """Prune a checkpoint with preset best, then train its kept weights towards the dense model.

    This is `prunus prune --preset max`. While it runs, the pruned checkpoint is the folder
    `.prunus-pruned` inside `output`.

    Args:
        model: Folder or hub id of the dense checkpoint. It is not changed.
        output: Folder of the result, an ordinary pruned checkpoint.
        minutes: Budget of the training in minutes; 20 if neither budget is given.
        tokens: Budget of the training in tokens, instead of minutes.
        recipe: A `Recipe` or a TOML file in place of preset best; options override it.
        pruning_progress: Called after every block.
        training_progress: Called after every step and every evaluation of the training.
        **options: Options of `Recipe` and of the run.

    Returns:
        The manifest of the pruning and the record of the training, `prunus.json` and
        `prunus-recovery.json` of the result.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: Before any
            work where possible. The message says what was given, what is wrong and what to do.
    """
    work, overrides = RunOptions.pick(options)
    if recipe is None:
        overrides = {"preset": "best"} | overrides
    chosen = Recipe.read(recipe, overrides)
    shown = [
        contextlib.nullcontext({"report": progress})
        for progress in (pruning_progress, training_progress)
    ]
    budget = {"minutes": minutes, "tokens": tokens}
    return max_run(model, Path(output), chosen, RunOptions.read(None, work), shown, budget)


def max_run(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    options: RunOptions,
    shown: Sequence[AbstractContextManager[dict[str, Any]]],
    budget: dict[str, Any],
) -> tuple[Manifest, RecoveryRecord]:
    """Carry out preset max.

    Args:
        model: Folder or hub id of the dense checkpoint.
        output: Folder of the result.
        recipe: How the model is pruned.
        options: How the work is done.
        shown: For the pruning and for the training, what is entered while it lasts. Each yields
            fields of a `Session`: `report` is called after every block or step, and `announce`,
            with what is prepared before the first block.
        budget: `minutes` and `tokens` of the training, of which one at least is None.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: As
            `prune_and_recover`.
    """
    pruned = output / PRUNED
    with process_group(options.rank_timeout):
        training = training_options(recipe, processes=ranks().size, **budget)
        with fail_together():
            source = _check_training(model, output, training, options).source

        find = functools.partial(
            _find_earlier, output, recipe, training, options, source.checkpoint.folder
        )
        with held(RecoveryRecord, output, find) as earlier:
            finished = earlier if earlier is not None and earlier.state == "finished" else None
            if finished is None:
                # What a run finished in the folder `pruned` is taken over.
                was_pruned = not options.overwrite and (pruned / INDEX_NAME).exists()
                either = options.model_copy(update={"resume": None})
                with shown[0] as callbacks:
                    command = Pruning(model, pruned, recipe, either)
                    manifest = carry_out(command, Session(**callbacks))
                # The student must not learn from another model than it was pruned from.
                with fail_together():
                    for index, block in enumerate(manifest.blocks if was_pruned else ()):
                        digest = tensors_digest(source.block(index))
                        check_known({block.name: block.input_sha256}, block.name, digest)
            else:
                with fail_together():
                    same = {"teacher": full_fingerprint(source)}
                    finished.check_same_run(training, finished.inputs.model_copy(update=same))
                on_rank_0(lambda: check_whole(output))
                manifest = Manifest.load(output)
            with shown[1] as callbacks:
                training_run = Recovering(pruned, output, training, options, model, str(model))
                session = Session(**callbacks)
                record = finished or carry_out_held(training_run, session, earlier)
            on_rank_0(lambda: remove_result(pruned, Manifest.FILE))
            return manifest, record


def plan_training(
    model: str | Path, output: Path | None, recipe: Recipe, options: RunOptions
) -> dict[str, Any]:
    """Check the training of preset max, and say what it takes. Nothing is written.

    Args:
        model: Folder or hub id of the dense checkpoint.
        output: Folder of the result; None leaves it unchecked.
        recipe: How the model is pruned.
        options: How the work is done.

    Returns:
        JSON values: `minutes`, `text`, `seqlen` (tokens per window), `batch` (windows per step),
        and `memory_bytes` of the model in training and the dense one, without activations.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ModuleNotFoundError, OSError: The
            training could not begin.
    """
    described = _check_training(model, output, training_options(recipe), options).describe()
    shown = ("minutes", "text", "seqlen", "batch", "memory_bytes")
    return {name: described[name] for name in shown}


def training_options(
    recipe: Recipe, *, minutes: float | None = None, tokens: int | None = None, processes: int = 1
) -> RecoveryOptions:
    """How the pruned model is trained: on the text that it is calibrated on.

    Args:
        recipe: How the model is pruned. It gives text, seqlen, seed, BOS and dtype.
        minutes: Budget in minutes; 20 if neither budget is given.
        tokens: Budget in tokens, instead of minutes.
        processes: Their number. Each needs a window of every step.

    Raises:
        ValueError: A budget is out of range, or both are given.

    >>> options = training_options(Recipe(calibration="wikitext2", seqlen=256))
    >>> options.mode, options.text, options.seqlen, options.minutes
    ('masked', 'wikitext2', 256, 20.0)
    """
    if minutes is None and tokens is None:
        minutes = _DEFAULT_MINUTES
    training = RecoveryOptions.read(
        None,
        {
            "mode": "masked",
            "text": recipe.calibration,
            "minutes": minutes,
            "tokens": tokens,
            "seqlen": min(_SEQLEN, recipe.seqlen),
            "seed": recipe.seed,
            "bos": recipe.bos,
            # Training has no float16; what is left open is decided by the device.
            "dtype": recipe.dtype if recipe.dtype != "float16" else "auto",
        },
    )
    return training.model_copy(update={"batch": max(training.batch, processes)})


def _find_earlier(
    output: Path, recipe: Recipe, training: RecoveryOptions, options: RunOptions, model: Path
) -> RecoveryRecord | None:
    """The record of the same run in the output folder; None if the training has not begun.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: The run may not write into the folder.
    """
    pruned = output / PRUNED
    if pruned.is_symlink():
        raise FileExistsError(f"{pruned} is a link; remove it, or choose another folder")
    # Whether there is something to resume shows in both folders, and is checked at the end.
    either = options.model_copy(update={"resume": None})
    earlier = find_earlier(RecoveryRecord, output, training, either, model, inside=PRUNED)
    if earlier is not None:
        # The result has the manifest of its pruning, which a training in progress has not yet.
        manifest = output if (output / Manifest.FILE).exists() else pruned
        if (manifest / Manifest.FILE).exists():
            Manifest.load(manifest).check_same_run(recipe)
        if earlier.state == "finished":
            return earlier
    check_resume(output, not options.overwrite and not is_vacant(pruned), options.resume)
    return earlier


def _check_training(
    model: str | Path,
    output: Path | None,
    training: RecoveryOptions,
    options: RunOptions,
) -> RecoveryPlan:
    """The plan of the training, before anything is pruned: the dense model stands for the pruned.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ModuleNotFoundError, OSError: The
            training could not begin.
    """
    if options.trust_remote_code:
        raise ValueError(
            "preset max trains the model as transformers defines it, without code from the "
            "checkpoint: drop `trust_remote_code`, or prune with preset best"
        )
    plan = plan_recovery(resolve_folder(model), training, options, model)
    if output is not None:
        check_folder_name(output)
        check_apart(output, plan.source.checkpoint.folder)
        # The pruned checkpoint beside the result and the state of the training.
        check_disk(output, plan.stored_bytes + plan.disk_bytes())
    draw_training_text(plan)
    return plan
