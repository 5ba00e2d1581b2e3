"""The work of a sweep: score each dense model, then prune, recover and score cell after cell.

The folder of a cell contains its record, and in `model` the weights for as long as they are needed.
Each finished step is entered in the results and saved. If a cell fails, its error is recorded and
the other cells run.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from prunus.engine.command import run_verb
from prunus.engine.linear_record import calibration_words
from prunus.engine.progress import LineInterval, Progress
from prunus.engine.run_options import RunOptions
from prunus.engine.run_record import RunRecord
from prunus.engine.session import Session
from prunus.evaluation.eval_options import TaskOptions, TextOptions
from prunus.evaluation.eval_records import task_metrics
from prunus.evaluation.inspection import stored_size
from prunus.evaluation.perplexity import perplexity
from prunus.evaluation.task_scores import evaluate
from prunus.methods import get_method
from prunus.model.adapter import merge_adapter
from prunus.model.checkpoint.files import (
    TEMPORARY_SUFFIX,
    copy_file,
    in_held,
    make_folder,
    remove_temporaries,
)
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.open_folder import OpenFolder
from prunus.pruning.manifest import Manifest
from prunus.pruning.prune import Pruning
from prunus.recovery.recover import recover
from prunus.recovery.recovery_record import RecoveryRecord
from prunus.sweeping.grid import Sweep
from prunus.sweeping.results import (
    CELLS_FOLDER,
    CellResult,
    SweepResults,
    SweptModel,
    dense_name,
)
from prunus.words import reason

_Record = TypeVar("_Record", bound=RunRecord)
#: The name of the folder of weights in the folder of a cell.
_WEIGHTS = "model"


@dataclass
class Runner:
    """Runs the cells of a sweep.

    Attributes:
        sweep: What to do.
        results: What was done; every step is entered here and saved.
        models: The dense models by label.
        output: Folder of the results.
        options: Those of the command, for all cells.
        report: Is called with a line of text after every step.
    """

    sweep: Sweep
    results: SweepResults
    models: Mapping[str, OpenFolder]
    output: Path
    options: RunOptions
    report: Callable[[str], None]

    def run(self) -> SweepResults:
        """Score the dense models, then run cell after cell; a failed one does not end the sweep."""
        # A killed run may have left files half-written. The runs of cells clear the folders of
        # weights themselves.
        folders = [path for path in self.output.glob("*") if path.is_dir()]
        for folder in (self.output, *folders, *self.output.glob(f"{CELLS_FOLDER}/*")):
            remove_temporaries(folder)
        for cell in self.results.cells:
            # Weights from before come with the tokenizer of before.
            if dense_name(cell.model) in self.results.changed:
                _discard_weights(cell.folder(self.output))
        self._save()
        for label, model in self.results.models.items():
            title = f"{label}, dense"
            with self._running(model, title):
                self._score(self.models[label], model, label, title)
        for cell in self.results.cells:
            if cell.recovers is None:
                recoveries = [x for x in self.results.cells if x.recovers == cell.name]
                self._run_with_recoveries(cell, recoveries)
        return self.results

    def _save(self) -> None:
        self.results.save(self.output)

    def _title(self, cell: CellResult) -> str:
        return f"[{self.results.cells.index(cell) + 1}/{len(self.results.cells)}] {cell.name}"

    @contextlib.contextmanager
    def _running(self, record: SweptModel, title: str) -> Iterator[None]:
        """Record how the work on a cell or a dense model ends, so that the sweep continues."""
        record.state = "running"
        record.error = None
        try:
            yield
        except Exception as fault:
            record.error = reason(fault, most=2000)
            self.report(f"{title}: failed: {record.error}")
        record.state = "failed" if record.error else "done"
        self._save()

    def _run_with_recoveries(self, cell: CellResult, recoveries: list[CellResult]) -> None:
        """Run a cell and the cells that recover it. Its weights are deleted when all are done."""
        todo = [recovery for recovery in recoveries if recovery.state != "done"]
        weights: Path | None = None
        if cell.state != "done" or todo:
            with self._running(cell, self._title(cell)):
                weights = self._prune(cell)
                self._score(weights, cell, cell.model, self._title(cell))
        for recovery in todo:
            with self._running(recovery, self._title(recovery)):
                if weights is None or cell.state != "done":
                    raise RuntimeError(f"the cell to recover failed: {cell.error}")
                recovered = self._recover(recovery, weights)
                self._score(recovered, recovery, recovery.model, self._title(recovery))
        for finished in (cell, *recoveries):
            if finished.state == "done" and not self.sweep.keep_checkpoints:
                _discard_weights(finished.folder(self.output))

    # --- the steps of a cell ---

    def _prune(self, cell: CellResult) -> Path:
        """Prune into the cell's folder, and return the folder of the weights.

        A run that was stopped is resumed, and deleted weights are made again, to the same bytes.
        """
        model = self.results.models[cell.model]
        if model.error is not None:
            raise RuntimeError(f"the dense model {cell.model} could not be scored: {model.error}")
        title = self._title(cell)
        interval = LineInterval()
        interval.restart()

        def report_block(step: Progress) -> None:
            if interval.due():
                interval.restart()
                self.report(f"{title}: block {step.done} of {step.total}")

        folder = cell.folder(self.output)
        weights = in_held(folder / _WEIGHTS)
        make_folder(folder)
        command = Pruning(self.models[cell.model], weights, cell.recipe, self.options)
        manifest = self._made(cell, lambda: run_verb(command, Session(report=report_block)))
        copy_file(weights / Manifest.FILE, folder / Manifest.FILE)
        if cell.pruning is None:
            cell.pruning = manifest.summary()
        needs = get_method(cell.recipe.method).needs
        if needs != "none" or self.options.measure_error:
            cell.pruning["calibration"] = calibration_words(manifest)
            cell.pruning["calibration_sha256"] = manifest.inputs.calibration_sha256
        self._save()
        seconds = f"{cell.pruning['block_seconds']:.0f} s"
        self.report(f"{title}: {cell.pruning['sparsity']:.2%} pruned in {seconds}")
        return weights

    def _made(self, cell: CellResult, make: Callable[[], _Record]) -> _Record:
        """Make the weights of a cell, anew if what an earlier run left was made from other things.

        Args:
            cell: The cell.
            make: Makes them, or raises a FileExistsError that says what has changed.
        """
        try:
            return make()
        except FileExistsError as fault:
            self.report(f"{self._title(cell)}: made again: {str(fault).partition(';')[0]}")
            _discard_weights(cell.folder(self.output))
            return make()

    def _recover(self, cell: CellResult, pruned: Path) -> Path:
        """Recover the weights in the folder `pruned`, and return the folder of the result.

        An earlier attempt is resumed. With `teacher = "dense"` in the sweep file, the model before
        pruning is the teacher.
        """
        table = self.sweep.recovery[cell.recovery or ""]
        chosen = {"device": self.options.device, "data": self.options.data} | table
        if table.get("teacher") == "dense":
            chosen["teacher"] = self.models[cell.model]
        folder = cell.folder(self.output)
        weights = in_held(folder / _WEIGHTS)
        make_folder(folder)
        record = self._made(cell, lambda: recover(pruned, weights, progress=False, **chosen))
        copy_file(weights / RecoveryRecord.FILE, folder / RecoveryRecord.FILE)
        cell.recovered = record.totals
        self._save()
        self.report(f"{self._title(cell)}: recovered in {record.totals['seconds']:.0f} s")
        if not OpenFolder(weights).is_adapter:
            return weights
        merge_adapter(weights, pruned, weights / "merged")
        return weights / "merged"

    def _score(
        self, weights: Path | OpenFolder, record: SweptModel, label: str, title: str
    ) -> None:
        """Measure a checkpoint's size, and score it on every text and task that its record lacks.

        Every figure is saved and reported at once.

        Args:
            weights: The checkpoint.
            record: Gets the figures: a cell, or a dense model.
            label: The label of the dense model, which a cell is compared with.
            title: Begins the lines of text.
        """
        scoring = self.sweep.scoring
        model = open_folder(weights, self.options.trust_remote_code)

        def finished(what: str, value: float) -> None:
            self._save()
            self.report(f"{title}: {what} {value:.4g}")

        if record.size is None:
            record.size = stored_size(model)
        # A cell is compared with the dense model, which is compared with nothing.
        reference = self.models[label] if isinstance(record, CellResult) else None
        how = scoring.arguments(TextOptions, self.options)
        for text in scoring.texts:
            if text not in record.scores:
                result = perplexity(model, text, reference=reference, progress=False, **how)
                dense = self.results.models[label].scores.get(text, result)
                if result.windows_sha256 != dense.windows_sha256:
                    raise ValueError(
                        f"the text {text} was changed since the dense model was scored on it; the "
                        "same command scores all models again"
                    )
                record.scores[text] = result
                finished(f"perplexity on {text}", result.perplexity)
                if result.divergence is not None:
                    finished(f"KL divergence on {text}", result.divergence.kl)
        if scoring.tasks and not record.tasks:
            how = scoring.arguments(TaskOptions, self.options)
            results = evaluate(model, scoring.tasks, progress=False, **how)
            rows = (self.results.models[label].tasks or results).get("task_hashes")
            if results.get("task_hashes") != rows:
                raise ValueError(
                    "the rows or prompts of a task have changed since the dense model was scored "
                    "on them: put them back as they were, or choose another folder"
                )
            record.tasks = {key: value for key, value in results.items() if key != "samples"}
            for (task, metric), figure in task_metrics(results).items():
                finished(f"{metric} on {task}", figure.value)


def _discard_weights(folder: Path) -> None:
    """Delete a cell's weights; its record stays.

    The folder is renamed first, so a kill in between leaves nothing that looks like a checkpoint.

    Args:
        folder: The folder of the cell, which need not hold weights.
    """
    weights = in_held(folder / _WEIGHTS)
    doomed = weights.with_name(_WEIGHTS + TEMPORARY_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    if weights.exists():
        weights.rename(doomed)
        shutil.rmtree(doomed)
