"""The story of a sweep: check everything, score each dense model once, then cell after cell.

`results.json` is rewritten after every step, so a sweep that was killed goes on at the step it was at. What fails
is written down, the rest goes on, and the next run of the same command tries it again.

Several ranks take cells as they are free, each cell being one process' work; see `sharing_out.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from prunus.distributed import SINGLE_PROCESS, Ranks, process_group
from prunus.methods import METHODS
from prunus.model.checkpoint.lock import locked
from prunus.pruning.job import RunOptions
from prunus.pruning.run import Progress
from prunus.sweep.calibration_windows import shared_windows
from prunus.sweep.cells import discard_weights, prune_cell, recover_cell, score_model
from prunus.sweep.grid import Sweep
from prunus.sweep.rank_results import CELLS, begin, collect, exchange_models, prepare, save
from prunus.sweep.results import CellResult, ModelResult, SweepResults

__all__ = ["run_sweep"]

_SECONDS_BETWEEN_LINES = 30.0


def run_sweep(
    sweep: Sweep,
    output: Path,
    options: RunOptions | None = None,
    *,
    file: str = "sweep.toml",
    progress: Callable[[str], None] | None = None,
) -> SweepResults:
    """Carry out a sweep, or what is left of it; failed cells are in the result, see `CellResult.error`.

    Args:
        sweep: see `load_sweep`.
        output: folder for `results.json`, `results.csv`, the calibration windows and the cells.
        options: device, memory, data folder, trust; for all cells.
        file: name of the sweep file, for the records.
        progress: told in a line what was done.

    Raises:
        What `check_sweep` raises, before any work.
    """
    options = options or RunOptions()
    with contextlib.ExitStack() as stack:
        ranks = options.ranks or stack.enter_context(process_group(options.rank_timeout))
        # A cell is one process' work, whoever does it.
        options = replace(options, ranks=SINGLE_PROCESS)
        results = begin(sweep, output, options, file, ranks)
        stack.enter_context(locked(output))
        results = prepare(results, output, options, ranks)
        return _Runner(
            sweep, results, output, options, progress or (lambda line: None), ranks
        ).run()


@dataclass
class _Runner:
    sweep: Sweep
    results: SweepResults
    output: Path
    options: RunOptions
    say: Callable[[str], None]
    ranks: Ranks

    def run(self) -> SweepResults:
        models = list(self.results.models.items())
        for number in self.ranks.claim("models", len(models)):
            label, model = models[number]
            title = f"{label}, dense"
            with self._failures(model, title):
                self._score(Path(model.path), model, title)
            self._save()
        exchange_models(self.results, self.ranks)
        self._save()
        plain = [cell for cell in self.results.cells if cell.recovers is None]
        for number in self.ranks.claim("cells", len(plain)):
            cell = plain[number]
            self._group(cell, [x for x in self.results.cells if x.recovers == cell.name])
        return collect(self.results, self.output, self.ranks)

    def _save(self, cell: CellResult | None = None) -> None:
        """Keep what was found by now: of `cell`, or of a dense model."""
        save(self.results, cell, self.output, self.ranks)

    def _group(self, cell: CellResult, recoveries: list[CellResult]) -> None:
        """A cell and those that recover it: its weights are there for as long as one of them needs them."""
        todo = [one for one in recoveries if one.state != "done"]
        weights: Path | None = None
        if cell.state != "done" or todo:
            with self._step(cell):
                weights = self._prune(cell)
                self._score(weights, cell, self._title(cell))
        for one in todo:
            with self._step(one):
                if weights is None or cell.state != "done":
                    raise RuntimeError(f"the cell that it recovers failed: {cell.error}")
                self._recover(one, weights)
        for one in (cell, *recoveries):
            if one.state == "done" and not self.sweep.keep_checkpoints:
                discard_weights(self._folder(one))

    def _prune(self, cell: CellResult) -> Path:
        """The pruned weights: from an earlier run where they are there, else made, to the same bytes, now."""
        model = self.results.models[cell.model]
        if model.error is not None:
            raise RuntimeError(f"the dense model {cell.model} could not be scored: {model.error}")
        ids = None
        if METHODS[cell.recipe.method].needs != "none":
            ids = shared_windows(
                self.output, self.results, cell.model, Path(model.path), cell.recipe, self.options
            )
            self._save(cell)
        title, before = self._title(cell), cell.pruning
        weights = prune_cell(
            cell, self._folder(cell), Path(model.path), ids, self.options, self._now_and_then(title)
        )
        assert cell.pruning is not None
        cell.pruning = before or cell.pruning
        self._save(cell)
        self.say(f"{title}: {cell.pruning.sparsity:.2%} pruned in {cell.pruning.seconds:.0f} s")
        return weights

    def _recover(self, cell: CellResult, pruned: Path) -> None:
        assert cell.recovery is not None
        title, dense = self._title(cell), Path(self.results.models[cell.model].path)
        table = self.sweep.recovery[cell.recovery]
        weights = recover_cell(cell, self._folder(cell), pruned, dense, table, self.options)
        self._save(cell)
        self.say(f"{title}: recovered in {(cell.recovered or {}).get('seconds', 0):.0f} s")
        self._score(weights, cell, title)

    def _score(self, weights: Path, record: CellResult | ModelResult, title: str) -> None:
        def finished(what: str, figure: float | None) -> None:
            self._save(record if isinstance(record, CellResult) else None)
            self.say(f"{title}: {what} {'infinite' if figure is None else f'{figure:.4g}'}")

        score_model(weights, self.sweep.scoring, self.options, record, finished)

    @contextlib.contextmanager
    def _step(self, cell: CellResult) -> Iterator[None]:
        """The work on one cell, from its first state to its last."""
        cell.state = "running"
        with self._failures(cell, self._title(cell)):
            yield
            cell.state = "done"
        self._save(cell)

    @contextlib.contextmanager
    def _failures(self, record: CellResult | ModelResult, title: str) -> Iterator[None]:
        """Whatever goes wrong with one cell is written down, and the sweep goes on."""
        record.error = None
        try:
            yield
        except Exception as fault:
            reason = " ".join(str(fault).split()) or "no message"
            record.error = f"{type(fault).__name__}: {reason}"
            if isinstance(record, CellResult):
                record.state = "failed"
            self.say(f"{title}: failed: {record.error}")

    def _title(self, cell: CellResult) -> str:
        return f"[{self.results.cells.index(cell) + 1}/{len(self.results.cells)}] {cell.name}"

    def _folder(self, cell: CellResult) -> Path:
        return self.output / CELLS / cell.name

    def _now_and_then(self, title: str) -> Callable[[Progress], None]:
        """Progress of one pruning run, in a line every so often."""
        last = time.monotonic()

        def tell(step: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.say(f"{title}: block {step.done} of {step.total}")

        return tell
