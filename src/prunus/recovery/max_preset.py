"""Preset max: prune with preset best, then train all kept weights towards the dense model.

    dense checkpoint ──► prune (preset best) ──► OUT-pruned ──► train (mode masked) ──► OUT
           └────────────────────── teacher ──────────────────────┘

Both phases are ordinary runs of `prune` and `recover`, so each resumes on its own after a kill. The
pruned checkpoint lies beside the result while it is needed and is removed once the result is in
place. Everything that the training would refuse is refused before the pruning begins.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.sources import find_source
from prunus.calibration.windows import Wanted
from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.model.checkpoint.output_folder import check_apart, check_disk, check_whole, is_vacant
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.source import CheckpointSource
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from prunus.pruning.run import run
from prunus.recovery.job import (
    check_ranks,
    check_teacher,
    draw_training_text,
    find_earlier_recovery,
    open_checkpoint,
)
from prunus.recovery.options import RecoveryOptions, recovery_options
from prunus.recovery.record import RecoveryRecord
from prunus.recovery.run import recover
from prunus.recovery.training import Step
from prunus.runs.options import RunOptions
from prunus.runs.progress import Progress

__all__ = [
    "DEFAULT_MINUTES",
    "MaxRun",
    "max_run",
    "plan_training",
    "prune_and_recover",
    "training_options",
]

#: Minutes of training if no budget is given.
DEFAULT_MINUTES = 20.0

# Windows of up to this many tokens take the faster attention of `recover`.
_SEQLEN = 512
# Bytes per parameter of the training: float32 weights, their gradients and Adam's two moments.
_STATE_BYTES = 16


@dataclass(frozen=True)
class MaxRun:
    """A run of preset max that has passed all checks. Call `prune` first, and then `train`.

    Attributes:
        model: folder or hub id of the dense checkpoint.
        output: folder of the result.
        recipe: how the model is pruned.
        training: how the pruned model is trained.
        options: how the work is done, with the processes of the run.
        overwrite: an earlier result in `output` is replaced.
        earlier: the finished result of this same run in `output`, or None.
    """

    model: str | Path
    output: Path
    recipe: Recipe
    training: RecoveryOptions
    options: RunOptions
    overwrite: bool
    earlier: RecoveryRecord | None

    def prune(
        self,
        progress: Callable[[Progress], None] | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> Manifest:
        """Prune the dense model into the folder beside `output`, and return the manifest.

        Args:
            progress: called after every block.
            announce: called with what is prepared before the first block.
        """
        if self.earlier is not None:
            return Manifest.load(self.output)
        return run(
            self.model,
            pruned_folder(self.output),
            self.recipe,
            self.options.model_copy(
                update={"announce": announce, "report": progress, "overwrite": self.overwrite}
            ),
        )

    def train(self, progress: Callable[[Step], None] | None = None) -> RecoveryRecord:
        """Train the pruned model, remove its folder, and return the record.

        Args:
            progress: called after every step and every evaluation.
        """
        ranks, pruned = _ranks(self.options), pruned_folder(self.output)
        record = self.earlier
        if record is None:
            chosen = self.training.model_dump(exclude={"mode"}, exclude_unset=True)
            record = recover(
                pruned,
                self.output,
                self.training.mode,
                teacher=self.model,
                device=self.options.device,
                data_dir=self.options.data,
                overwrite=self.overwrite,
                ranks=ranks,
                progress=progress,
                **chosen,
            )
        ranks.on_rank_0(lambda: _remove_pruned(pruned))
        return record


def prune_and_recover(
    model: str | Path,
    output: str | Path,
    *,
    minutes: float | None = None,
    tokens: int | None = None,
    recipe: Recipe | str | Path | None = None,
    device: str = "auto",
    memory: int | None = None,
    data_dir: str | Path | None = None,
    overwrite: bool = False,
    resume: bool | None = None,
    rank_timeout: float | None = None,
    pruning_progress: Callable[[Progress], None] | None = None,
    training_progress: Callable[[Step], None] | None = None,
    **recipe_options: Any,
) -> tuple[Manifest, RecoveryRecord]:
    """Prune a checkpoint with preset best, then train its kept weights towards the dense model.

    This is `prunus prune --preset max`. While it runs, the pruned checkpoint lies in
    `<output>-pruned`.

    Args:
        model: folder or hub id of the dense checkpoint. It is not changed.
        output: folder of the result, an ordinary pruned checkpoint.
        minutes, tokens: budget of the training; give one of the two, or none for 20 minutes.
        recipe: a `Recipe` or a TOML file in place of preset best.
        device: auto, cpu, cuda or cuda:i.
        memory: memory budget of the pruning in bytes; default is the free memory.
        data_dir: folder with local copies of the datasets.
        overwrite: replace an earlier result in `output`.
        resume: True requires an unfinished run, False refuses one. By default it is resumed.
        rank_timeout: seconds without a heartbeat after which a rank counts as lost.
        pruning_progress: called after every block.
        training_progress: called after every step and every evaluation of the training.
        **recipe_options: options of a recipe, on top of preset best.

    Returns:
        The manifest of the pruning and the record of the training, `prunus.json` and
        `prunus-recovery.json` of the result.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: before any
            work where possible. The message says what was given, what is wrong and what to do.
    """
    given = recipe_options if recipe is not None else {"preset": "best"} | recipe_options
    options = RunOptions(
        device=device,
        memory=memory,
        data=Path(data_dir) if data_dir is not None else None,
        rank_timeout=rank_timeout,
    )
    with max_run(
        model,
        Path(output),
        Recipe.read(recipe, given),
        options,
        minutes=minutes,
        tokens=tokens,
        overwrite=overwrite,
        resume=resume,
    ) as checked:
        return checked.prune(pruning_progress), checked.train(training_progress)


@contextlib.contextmanager
def max_run(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    options: RunOptions,
    *,
    minutes: float | None = None,
    tokens: int | None = None,
    overwrite: bool = False,
    resume: bool | None = None,
) -> Iterator[MaxRun]:
    """Check a run of preset max, and yield it with the processes that torchrun started.

    The arguments and errors are those of `prune_and_recover`.
    """
    with options.with_ranks() as joint:
        ranks = joint.ranks or SINGLE_PROCESS
        training = training_options(recipe, minutes=minutes, tokens=tokens, ranks=ranks.size)
        check_ranks(training, ranks)
        with ranks.fail_together():
            earlier = _find_earlier(output, recipe, training, overwrite, resume)
            fingerprint = _check_training(model, output, training, options).fingerprint
            if earlier is not None and earlier.inputs.teacher != fingerprint:
                raise FileExistsError(
                    f"{output} holds a result of another dense model ({earlier.teacher}); choose "
                    "another folder, or --overwrite it"
                )
        yield MaxRun(model, output, recipe, training, joint, overwrite, earlier)


def plan_training(
    model: str | Path, output: Path | None, recipe: Recipe, options: RunOptions
) -> dict[str, Any]:
    """Check the training of preset max, and say what it takes. Nothing is written.

    Args:
        model: folder or hub id of the dense checkpoint.
        output: folder of the result, or None to leave it unchecked.
        recipe: how the model is pruned.
        options: of the run.

    Returns:
        JSON values: `minutes`, `text`, `seqlen`, `batch` (windows of a step), and `memory_bytes`
        of the trained model and the dense one, without the activations of a step.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, ModuleNotFoundError, OSError: the
            training could not begin.
    """
    training = training_options(recipe)
    source = _check_training(model, output, training, options)
    stored = source.checkpoint.nbytes(source.checkpoint.tensors)
    state = _STATE_BYTES * stored // source.stored_dtype.itemsize
    return {
        "minutes": training.minutes,
        "text": training.text,
        "seqlen": training.seqlen,
        "batch": training.batch,
        "memory_bytes": state + stored,
    }


def training_options(
    recipe: Recipe, *, minutes: float | None = None, tokens: int | None = None, ranks: int = 1
) -> RecoveryOptions:
    """Return how the pruned model is trained: on the text that it is calibrated on.

    Args:
        recipe: of the pruning. It gives text, seed, BOS and dtype.
        minutes, tokens: the budget.
        ranks: number of processes; each needs a window of every step.

    Raises:
        ValueError: the budget is out of range, or both are given.

    Example:
        >>> options = training_options(Recipe(calibration="wikitext2", seqlen=256))
        >>> options.mode, options.text, options.seqlen, options.minutes
        ('masked', 'wikitext2', 256, 20.0)
    """
    if minutes is None and tokens is None:
        minutes = DEFAULT_MINUTES
    training = recovery_options(
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
        }
    )
    return training.model_copy(update={"batch": max(training.batch, ranks)})


def pruned_folder(output: Path) -> Path:
    """Return where the pruned checkpoint lies until the result is in place.

    Example:
        >>> pruned_folder(Path("/models/small")).name
        'small-pruned'
    """
    here = Path(os.path.abspath(output))
    return here.with_name(f"{here.name}-pruned")


def _ranks(options: RunOptions) -> Ranks:
    assert options.ranks is not None  # `max_run` put them there.
    return options.ranks


def _find_earlier(
    output: Path,
    recipe: Recipe,
    training: RecoveryOptions,
    overwrite: bool,
    resume: bool | None,
) -> RecoveryRecord | None:
    """The finished result of the same run in the output folder; None if there is work to do.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: the run may not write into the folder.
    """
    pruned = pruned_folder(output)
    record = find_earlier_recovery(output, training, overwrite, None)
    if record is not None:
        # The result has the manifest of its pruning, which a training in progress has not yet.
        manifest = output if (output / Manifest.FILE).exists() else pruned
        if (manifest / Manifest.FILE).exists():
            Manifest.load(manifest).check_same_run(recipe)
    if record is not None and record.state == "finished":
        check_whole(output)
        return record
    unfinished = not overwrite and not is_vacant(pruned)
    if resume is True and not unfinished:
        raise FileNotFoundError(
            f"there is no unfinished run of preset max in {output} and {pruned} to resume; leave "
            "--resume out to start one"
        )
    if resume is False and unfinished:
        raise FileExistsError(
            f"{pruned} holds an unfinished run of preset max; --overwrite starts again, --resume "
            "goes on"
        )
    return None


def _check_training(
    model: str | Path, output: Path | None, training: RecoveryOptions, options: RunOptions
) -> CheckpointSource:
    """Check what the training needs, on the dense model, before anything is pruned.

    Returns:
        The dense model.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, ModuleNotFoundError, OSError: the
            training could not begin.
    """
    if options.trust_remote_code:
        raise ValueError(
            "preset max trains the model as transformers defines it, without code from the "
            "checkpoint: drop --trust-remote-code, or prune with --preset best"
        )
    find_source(training.text).check(
        Wanted(samples=1, seqlen=training.seqlen, bos=training.bos, data=options.data)
    )
    folder = resolve_folder(model)
    check_teacher(folder)
    if output is not None:
        check_apart(output, folder)
    source, _ = open_checkpoint(folder)
    if training.text != "self":  # The model would write the text, which is work.
        draw_training_text(training, source, source, torch.device("cpu"), options.data)
    elif training.tokens is None:
        raise ValueError(
            "the source 'self' writes a given number of tokens: give the budget in --tokens"
        )
    if output is not None:
        # The pruned checkpoint, the result, and the state of the training.
        stored = source.checkpoint.nbytes(source.checkpoint.tensors)
        check_disk(output, (2 + _STATE_BYTES // source.stored_dtype.itemsize) * stored)
    return source


def _remove_pruned(folder: Path) -> None:
    """Remove a pruned checkpoint; the manifest goes last, so that a kill leaves a known folder."""
    if not (folder / Manifest.FILE).exists():
        return
    for path in folder.iterdir():
        if path.is_file() and path.name != Manifest.FILE:
            path.unlink()
    (folder / Manifest.FILE).unlink()
    with contextlib.suppress(OSError):  # Something that is not ours keeps the folder.
        folder.rmdir()
