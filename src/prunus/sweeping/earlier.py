"""What a sweep keeps of an earlier run in its folder, and what it measures again.

What the sweep file says may only grow: with other options, the folder is refused. What lies behind
it may change: a text, weights, code of one's own. Each figure depends on some of them, which are
compared by the hashes that `prune` and `recover` compare before they continue a run:

- of a dense model: its weights, the windows of each text, the version that scores the tasks;
- of a pruned cell: its dense model, and all that its record says of its calibration, its machine
  and code of one's own;
- of a recovered cell: the cell that it recovers, its text and its teacher.

If all are equal, the figures are kept. Otherwise the sweep makes and measures the cell again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunus.calibration.windows import Windows, hash_ids
from prunus.engine.calibration_windows import calibration_windows, run_inputs
from prunus.engine.run_options import RunOptions, WindowOptions
from prunus.engine.run_record import another, first_difference
from prunus.engine.session import SILENT
from prunus.evaluation.eval_options import TextOptions
from prunus.evaluation.perplexity import scoring_windows, window_length
from prunus.model.open_folder import OpenFolder
from prunus.model.tokenizer import load_tokenizer
from prunus.pruning.manifest import Manifest
from prunus.pruning.prune import Pruning
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.recovery.recovery_plan import plan_recovery, recovery_inputs
from prunus.recovery.recovery_record import RecoveryInputs, RecoveryRecord
from prunus.sweeping.grid import Sweep
from prunus.sweeping.results import CellResult, SweepResults, dense_name


def enter_earlier(earlier: SweepResults, today: Today) -> None:
    """Enter into the results what holds of an earlier run, and into `changed` what does not.

    Args:
        earlier: The results of the earlier run.
        today: What the figures depend on now. Its results have all cells, which may be more than
            the earlier ones.

    Raises:
        FileExistsError: The sweep differs in more than further cells, or the earlier results do not
            say what they were measured on.
        ValueError, FileNotFoundError: The record of a cell is damaged, or a text is not at hand.
    """
    now = today.results
    _check_options(earlier, now, today.output)
    for label, model in earlier.models.items():
        fresh = now.models[label]
        texts = {f"text {text}": score.windows_sha256 for text, score in model.scores.items()}
        before = {"checkpoint": model.weights_sha256, "lm_eval": earlier.versions.get("lm_eval")}
        after = {"checkpoint": fresh.weights_sha256, "lm_eval": now.versions.get("lm_eval")}
        after |= {f"text {text}": today.windows_sha256(label, text) for text in model.scores}
        if why := first_difference(before | texts, after):
            now.changed[dense_name(label)] = why
        else:
            # A checkpoint may have moved since: its path is that of now.
            now.models[label] = model.model_copy(update={"path": fresh.path})
    done = {cell.name: cell for cell in earlier.cells}
    for place, cell in enumerate(now.cells):
        if (before_it := done.get(cell.name)) is not None:
            with naming(cell):
                why = now.changed.get(dense_name(cell.model)) or today.why_again(before_it)
            if not why:
                now.cells[place] = before_it
            elif before_it.pruning or before_it.recovered:
                now.changed[cell.name] = why
    states = {model.state for _, _, model in now.every_model()}
    if states == {"done"}:
        now.hardware, now.versions = earlier.hardware, earlier.versions
    elif "done" in states:
        # Figures of this machine and these versions stand next to those of the earlier run.
        now.hardware = _joined(earlier.hardware, now.hardware)
        now.versions = _joined(earlier.versions, now.versions)


@contextlib.contextmanager
def naming(cell: CellResult) -> Iterator[None]:
    """Let the errors of a check say which cell it was."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotImplementedError) as fault:
        raise type(fault)(f"cell {cell.name}: {fault}") from fault


def _check_options(earlier: SweepResults, now: SweepResults, output: Path) -> None:
    """Check that `now` has all models and cells of an earlier run, with the same options.

    Raises:
        FileExistsError: It has not, or it does not say what it measured; names the difference.
    """

    def check(what: str, before: Any, after: Any) -> None:
        if before != after:
            raise FileExistsError(
                f"{output} holds a sweep with {another(what, before, after)}; it is left as it is. "
                "Only cells can be added to a sweep: choose another folder"
            )

    if not all(model.weights_sha256 for model in earlier.models.values()):
        raise FileExistsError(
            f"{output} holds a sweep of an earlier version of prunus, which does not say what its "
            "figures were measured on; it is left as it is. `prunus report` shows it. Choose "
            "another folder"
        )
    if not earlier.models.keys() <= now.models.keys():
        check("set of models", sorted(earlier.models), sorted(now.models))
    for label, model in earlier.models.items():
        check(f"checkpoint {label}", model.fingerprint, now.models[label].fingerprint)
    for key, value in earlier.scoring.items():
        check(f"scoring.{key}", value, now.scoring[key])
    cells, done = ({cell.name: cell for cell in results.cells} for results in (now, earlier))
    for name, cell in done.items():
        check("set of cells", f"with {name}", f"with {name}" if name in cells else "without it")
        recipe = cells[name].recipe.model_dump()
        for key, value in cell.recipe.model_dump().items():
            check(f"{key} in cell {name}", value, recipe[key])
        if (recovery := cell.recovery) is not None:
            check(f"recovery.{recovery}", earlier.recovery[recovery], now.recovery[recovery])


def _joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Facts of two runs; a value that differs says so.

    >>> _joined({"torch": "2.8", "device": "cpu"}, {"torch": "2.9", "device": "cpu"})
    {'torch': '2.8, then 2.9', 'device': 'cpu'}
    """
    return now | {
        key: value
        if now.get(key, value) == value or str(value).endswith(f", then {now[key]}")
        else f"{value}, then {now[key]}"
        for key, value in before.items()
    }


class Today:
    """What the figures of a sweep depend on now.

    Args:
        results: The results of this run, with what is kept of the earlier one so far.
        sweep: The sweep.
        models: The dense models by label.
        output: Folder of the results.
        options: Those of the command.
    """

    def __init__(
        self,
        results: SweepResults,
        sweep: Sweep,
        models: Mapping[str, OpenFolder],
        output: Path,
        options: RunOptions,
    ) -> None:
        self.results, self.sweep, self.models = results, sweep, models
        self.output, self.options = output, options
        # Model and options of windows -> the calibration windows, which cells share.
        self.drawn: dict[str, Windows] = {}
        self.recovery_inputs = functools.cache(self._recovery_inputs)

    def windows_sha256(self, label: str, text: str) -> str:
        """The hash of the windows of a text, cut by the tokenizer of a dense model."""
        how = TextOptions(**self.sweep.scoring.arguments(TextOptions, self.options))
        length = window_length(how, [text])
        windows = scoring_windows(text, lambda: load_tokenizer(self.models[label]), length, how)
        return hash_ids(windows.ids)

    def why_again(self, cell: CellResult) -> str:
        """Why a cell is made again whose dense model is what it was; "" if it stands.

        What an unfinished cell has left decides by its own record whether it goes on.
        """
        kind = Manifest if cell.recovers is None else RecoveryRecord
        folder, dense = cell.folder(self.output), self.models[cell.model]
        if cell.pruning is None and cell.recovered is None:
            return ""
        if not (folder / kind.FILE).exists():
            return f"its {kind.FILE} is gone"
        if cell.recovery is not None:
            pruned = next(x for x in self.results.cells if x.name == cell.recovers)
            if pruned.pruning is None:
                return f"{pruned.name} is made again"
            trained = RecoveryRecord.load(folder)
            found = self.recovery_inputs(dense, cell.recovery)
            # The pruned cell stands, with all its bytes.
            found = found.model_copy(update={"checkpoint": trained.inputs.checkpoint})
            return trained.difference(trained.recipe, found)
        record = Manifest.load(folder)
        command = Pruning(dense, None, cell.recipe, self.options)
        plan = command.plan(SILENT, record.inputs.dtype)
        asked = cell.recipe.model_dump(include={*WindowOptions.model_fields})
        key = repr((cell.model, plan.needs_inputs, asked))
        if key not in self.drawn:
            self.drawn[key] = calibration_windows(plan)
        # The weights are those of the earlier run, so their hashes are too.
        return record.difference(
            cell.recipe, run_inputs(plan, self.drawn[key], record.inputs.outside)
        )

    def _recovery_inputs(self, dense: OpenFolder, recovery: str) -> RecoveryInputs:
        """What a recovery depends on: the text and tokenizer of a pruned model are the dense one's.

        Args:
            dense: The dense model.
            recovery: Name of the table of the recovery.
        """
        table = dict(self.sweep.recovery[recovery])
        teacher = table.pop("teacher", None)
        teacher = dense if teacher == "dense" else teacher
        plan = plan_recovery(dense, RecoveryOptions.read(None, table), self.options, teacher)
        return recovery_inputs(plan)[0]
