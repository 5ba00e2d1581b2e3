"""The story of a sweep: check everything, score each dense model, then run cell after cell.

`results.json` is written after every step, so a sweep that was killed continues at the step where
it stopped. If a cell fails, its error is recorded and the other cells go on. The next run of the
same command tries it again.

The dense model runs once for each text. What its last block returns stays in the folder `reference`
until all cells are done, because every cell is compared with it.

On several ranks, a rank that is free takes the next cell. One process does all work of a cell; see
`rank_results.py`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prunus.distributed import SINGLE_PROCESS, Ranks, process_group
from prunus.evaluation.reference import Reference
from prunus.hardware.sizes import parse_bytes
from prunus.methods import get_method
from prunus.runs.lock import locked_output
from prunus.runs.options import RunOptions
from prunus.runs.progress import LineInterval, Progress
from prunus.sweeping.calibration_windows import shared_windows
from prunus.sweeping.cells import discard_weights, prune_cell, recover_cell, score_model
from prunus.sweeping.checks import check_folder
from prunus.sweeping.grid import Sweep, load_sweep
from prunus.sweeping.rank_results import (
    CELLS_FOLDER,
    collect_results,
    exchange_model_results,
    initial_results,
    prepare_results,
    save_results,
)
from prunus.sweeping.results import CellResult, ModelResult, SweepResults

__all__ = ["run_sweep", "sweep"]

_REFERENCE_FOLDER = "reference"


def sweep(
    grid: str | Path | Sweep,
    output: str | Path,
    *,
    models: Sequence[str] = (),
    device: str = "auto",
    memory: str | int | None = None,
    data_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    rank_timeout: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> SweepResults:
    """Prune and score a grid of models, methods and sparsities, as `prunus sweep` does.

    A sweep that was stopped continues when the same call is made again.

    Args:
        grid: The sweep file (TOML), or a `prunus.sweeping.Sweep`.
        output: Folder of the results.
        models: Models to use in place of those in the file.
        device: auto, cpu, cuda or cuda:i.
        memory: Memory budget, such as "8GB" or a number of bytes; default is the free memory.
        data_dir: Folder with local copies of the datasets.
        trust_remote_code: Run model code that comes with a checkpoint.
        rank_timeout: Under torchrun, a process without a sign of life counts as lost after this
            many seconds; default 600.
        progress: Called with a line of text after every step.

    Returns:
        The results. A cell that failed has a message in `CellResult.error`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError: Before any work; says
            what was given, what is wrong and what to do.
    """
    chosen = grid if isinstance(grid, Sweep) else load_sweep(Path(grid), tuple(models))
    if isinstance(grid, Sweep) and models:
        raise ValueError("models= is for a sweep file; a Sweep names its models itself")
    options = RunOptions(
        device=device,
        memory=parse_bytes(memory) if isinstance(memory, str) else memory,
        data=Path(data_dir) if data_dir is not None else None,
        trust_remote_code=trust_remote_code,
        rank_timeout=rank_timeout,
    )
    file = "a Sweep object" if isinstance(grid, Sweep) else Path(grid).name
    return run_sweep(chosen, Path(output), options, file=file, progress=progress)


def run_sweep(
    sweep: Sweep,
    output: Path,
    options: RunOptions | None = None,
    *,
    file: str = "sweep.toml",
    progress: Callable[[str], None] | None = None,
) -> SweepResults:
    """Run a sweep, or what an earlier run has left of it.

    Args:
        sweep: see `load_sweep`.
        output: folder for `results.json`, `results.csv`, the calibration windows and the cells.
        options: device, memory, data folder and trust in remote code, for all cells.
        file: name of the sweep file, for the results.
        progress: called with a line of text after every step.

    Returns:
        The results. A cell that failed has a message in `CellResult.error`.

    Raises:
        See `check_sweep`; it runs before any work.
    """
    options = options or RunOptions()
    with contextlib.ExitStack() as stack:
        ranks = options.ranks or stack.enter_context(process_group(options.rank_timeout))
        # One process does all work of a cell, so runs inside a cell must not look for other ranks.
        options = options.model_copy(update={"ranks": SINGLE_PROCESS})
        # What the folder holds decides what is done, so from here on no other run may change it.
        stack.enter_context(locked_output(output, ranks, lambda: check_folder(sweep, output)))
        results = initial_results(sweep, output, options, file, ranks)
        results = prepare_results(results, output, options, ranks)
        report = progress or (lambda line: None)
        return _Runner(sweep, results, output, options, report, ranks).run()


@dataclass
class _Runner:
    """Runs the cells of a sweep on one rank. `report` is called with lines of text."""

    sweep: Sweep
    results: SweepResults
    output: Path
    options: RunOptions
    report: Callable[[str], None]
    ranks: Ranks
    #: Label -> the dense model, which cells are compared with.
    references: dict[str, Reference] = field(default_factory=dict)

    def run(self) -> SweepResults:
        models = list(self.results.models.items())
        for number in self.ranks.claim("models", len(models)):
            label, model = models[number]
            title = f"{label}, dense"
            with self._recording_failure(model, title):
                self._score(Path(model.path), model, label, title)
            self._save()
        exchange_model_results(self.results, self.ranks)
        self._save()
        # A recovery needs the weights of its cell, so the same rank runs both.
        pruned = [cell for cell in self.results.cells if cell.recovers is None]
        for number in self.ranks.claim("cells", len(pruned)):
            cell = pruned[number]
            recoveries = [x for x in self.results.cells if x.recovers == cell.name]
            self._run_with_recoveries(cell, recoveries)
        for reference in self.references.values():
            reference.close()
        found = collect_results(self.results, self.output, self.ranks)
        if self.ranks.rank == 0 and all(cell.state == "done" for cell in found.cells):
            shutil.rmtree(self.output / _REFERENCE_FOLDER, ignore_errors=True)
        return found

    def _save(self, cell: CellResult | None = None) -> None:
        """Save what was found so far for a cell, or for a dense model."""
        save_results(self.results, cell, self.output, self.ranks)

    def _run_with_recoveries(self, cell: CellResult, recoveries: list[CellResult]) -> None:
        """Run a cell and the cells that recover it. Its weights are deleted when all are done."""
        todo = [one for one in recoveries if one.state != "done"]
        weights: Path | None = None
        if cell.state != "done" or todo:
            with self._running(cell):
                weights = self._prune(cell)
                self._score(weights, cell, cell.model, self._title(cell))
        for one in todo:
            with self._running(one):
                if weights is None or cell.state != "done":
                    raise RuntimeError(f"the cell to recover failed: {cell.error}")
                self._recover(one, weights)
        for one in (cell, *recoveries):
            if one.state == "done" and not self.sweep.keep_checkpoints:
                discard_weights(self._folder(one))

    def _prune(self, cell: CellResult) -> Path:
        """The folder with the pruned weights. Deleted weights are made again, to the same bytes."""
        model = self.results.models[cell.model]
        if model.error is not None:
            raise RuntimeError(f"the dense model {cell.model} could not be scored: {model.error}")
        ids = None
        if get_method(cell.recipe.method).needs != "none":
            ids = shared_windows(
                self.output, self.results, cell.model, Path(model.path), cell.recipe, self.options
            )
            self._save(cell)
        title, before = self._title(cell), cell.pruning
        weights = prune_cell(
            cell, self._folder(cell), Path(model.path), ids, self.options, self._block_lines(title)
        )
        assert cell.pruning is not None
        cell.pruning = before or cell.pruning
        self._save(cell)
        self.report(f"{title}: {cell.pruning.sparsity:.2%} pruned in {cell.pruning.seconds:.0f} s")
        return weights

    def _recover(self, cell: CellResult, pruned: Path) -> None:
        assert cell.recovery is not None
        title, dense = self._title(cell), Path(self.results.models[cell.model].path)
        table = self.sweep.recovery[cell.recovery]
        weights = recover_cell(cell, self._folder(cell), pruned, dense, table, self.options)
        self._save(cell)
        self.report(f"{title}: recovered in {(cell.recovered or {}).get('seconds', 0):.0f} s")
        self._score(weights, cell, cell.model, title)

    def _score(
        self, weights: Path, record: CellResult | ModelResult, label: str, title: str
    ) -> None:
        if label not in self.references:
            self.references[label] = Reference(
                Path(self.results.models[label].path), keep_in=self.output / _REFERENCE_FOLDER
            )

        def finished(what: str, value: float | None) -> None:
            self._save(record if isinstance(record, CellResult) else None)
            self.report(f"{title}: {what} {'infinite' if value is None else f'{value:.4g}'}")

        score_model(
            weights, self.sweep.scoring, self.options, record, self.references[label], finished
        )

    @contextlib.contextmanager
    def _running(self, cell: CellResult) -> Iterator[None]:
        """Mark a cell as running, and as done at the end of the block."""
        cell.state = "running"
        with self._recording_failure(cell, self._title(cell)):
            yield
            cell.state = "done"
        self._save(cell)

    @contextlib.contextmanager
    def _recording_failure(self, record: CellResult | ModelResult, title: str) -> Iterator[None]:
        """Record an error of a cell or a dense model, so that the sweep goes on."""
        record.error = None
        try:
            yield
        except Exception as fault:
            reason = " ".join(str(fault).split()) or "no message"
            record.error = f"{type(fault).__name__}: {reason}"
            if isinstance(record, CellResult):
                record.state = "failed"
            self.report(f"{title}: failed: {record.error}")

    def _title(self, cell: CellResult) -> str:
        return f"[{self.results.cells.index(cell) + 1}/{len(self.results.cells)}] {cell.name}"

    def _folder(self, cell: CellResult) -> Path:
        return self.output / CELLS_FOLDER / cell.name

    def _block_lines(self, title: str) -> Callable[[Progress], None]:
        """A function that reports the progress of one pruning run, but not for every block."""
        lines = LineInterval()
        lines.restart()

        def report_block(step: Progress) -> None:
            if lines.due():
                lines.restart()
                self.report(f"{title}: block {step.done} of {step.total}")

        return report_block
