"""What a sweep found: the records of `results.json` and the table of `results.csv`.

Written by the sweep, read by the report; the two meet on disk only.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prunus.model.checkpoint.atomic_files import write_json, write_text
from prunus.model.checkpoint.records import read_record
from prunus.pruning.recipe import Recipe

__all__ = [
    "RESULTS_NAME",
    "CalibrationSet",
    "CellResult",
    "ModelResult",
    "Pruning",
    "Score",
    "SweepResults",
    "TaskFigure",
    "Tasks",
    "residual_gaps",
]

RESULTS_NAME = "results.json"
TABLE_NAME = "results.csv"
#: Below this share of the dense perplexity, what Wanda loses says nothing of what another method loses.
_LEAST_LOSS = 0.01
#: Options of a recipe that two cells must agree in before their methods are compared; all others make up the method.
_CIRCUMSTANCES = {
    "sparsity",
    "pattern",
    "calibration",
    "samples",
    "seqlen",
    "seed",
    "batch",
    "dtype",
    "propagate",
    "head",
    "only",
    "ignore",
}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Score(_Record):
    """Perplexity on one text, as `prunus.perplexity` gives it; None stands for infinity."""

    source: str
    perplexity: float | None
    loss: float
    windows: int
    tokens: int
    seqlen: int
    protocol: str
    seconds: float
    streamed: bool = False


class TaskFigure(_Record):
    """One metric of a task and its standard error; None where it is not known."""

    value: float | None
    stderr: float | None


#: Task -> metric -> figure; the mean of the paper's seven tasks is among them where all seven are.
Tasks = dict[str, dict[str, TaskFigure]]


class Pruning(_Record):
    """Totals of a pruning run; `seconds` is the sum over its blocks, so that a run in several goes counts whole."""

    weights: int
    zeros: int
    sparsity: float
    mean_relative_output_error: float | None
    mean_removed_energy: float | None
    seconds: float
    dtype: str
    calibration_sha256: str


class CellResult(_Record):
    """One cell. `waiting` cells were not begun, `running` ones are between two steps; a failed one says why."""

    name: str
    model: str
    recipe: Recipe
    recovery: str | None = None
    recovers: str | None = None
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    error: str | None = None
    pruning: Pruning | None = None
    recovered: dict[str, Any] | None = Field(
        default=None, description="what the recovery has to tell"
    )
    scores: dict[str, Score] = Field(default={}, description="scoring text -> perplexity")
    tasks: Tasks = {}
    residual_gap: dict[str, float | None] = Field(
        default={}, description="scoring text -> see `residual_gaps`"
    )


class ModelResult(_Record):
    """A model before anything is done to it."""

    path: str
    fingerprint: str
    scores: dict[str, Score] = {}
    tasks: Tasks = {}
    error: str | None = None


class CalibrationSet(_Record):
    """Calibration windows that cells share; `file` is relative to the sweep's folder."""

    model: str
    calibration: str
    samples: int
    seqlen: int
    seed: int
    source: str
    sha256: str
    file: str


class SweepResults(_Record):
    """Everything a sweep found so far."""

    format: Literal[1] = 1
    file: str = Field(description="name of the sweep file")
    title: str
    description: str = ""
    scoring: dict[str, Any]
    recovery: dict[str, dict[str, Any]] = Field(
        default={}, description="name -> options of `prunus recover`"
    )
    hardware: dict[str, Any]
    versions: dict[str, str]
    models: dict[str, ModelResult]
    calibration: list[CalibrationSet] = []
    cells: list[CellResult]

    def save(self, folder: Path) -> None:
        """Write `results.json` and `results.csv`, each atomically, with the residual gaps as they are now."""
        for cell in self.cells:
            cell.residual_gap = residual_gaps(self, cell)
        write_json(folder / RESULTS_NAME, self.model_dump(mode="json"))
        write_text(folder / TABLE_NAME, self.to_csv())

    @classmethod
    def load(cls, folder: Path) -> SweepResults:
        """Read `results.json`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged or of another version.
        """
        path = folder / RESULTS_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} has no {RESULTS_NAME}: it is not the output of prunus sweep"
            )
        return read_record(path, cls)

    def to_csv(self) -> str:
        """A row per model as it was and per cell; a missing figure is an empty field."""
        texts = self.scoring["texts"]
        dense = [
            {"name": f"{label}-dense", "model": label, "method": "dense", "sparsity": 0.0}
            | {f"perplexity {text}": _perplexity(model.scores, text) for text in texts}
            | _task_columns(model.tasks)
            | {"state": "failed" if model.error else "done", "error": model.error}
            for label, model in self.models.items()
        ]
        rows = dense + [_csv_row(self, cell) for cell in self.cells]
        columns = list(dict.fromkeys(key for row in reversed(rows) for key in row))
        file = io.StringIO()
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()


def residual_gaps(results: SweepResults, cell: CellResult) -> dict[str, float | None]:
    """(ppl − dense) / (ppl of Wanda − dense) per scoring text: Wanda is 1, lossless is 0.

    Wanda is the cell of plain Wanda, by rows, all its options at their defaults and without recovery, that agrees
    with `cell` in model, sparsity, calibration, seed and everything else that is not the method. None where a figure
    is missing, and where Wanda loses less than 1 % of the dense perplexity: a share of next to nothing says nothing.
    """
    wanda = next((other for other in results.cells if _is_wanda_of(other, cell)), None)
    gaps: dict[str, float | None] = {}
    for text in cell.scores:
        mine = _perplexity(cell.scores, text)
        dense = _perplexity(results.models[cell.model].scores, text)
        reference = _perplexity(wanda.scores, text) if wanda is not None else None
        gaps[text] = None
        if (
            mine is not None
            and dense is not None
            and reference is not None
            and reference > dense * (1 + _LEAST_LOSS)
        ):
            gaps[text] = (mine - dense) / (reference - dense)
    return gaps


def _is_wanda_of(other: CellResult, cell: CellResult) -> bool:
    if other.model != cell.model or other.recovery is not None:
        return False
    mine, its = (x.recipe.model_dump(include=_CIRCUMSTANCES) for x in (cell, other))
    plain, method = (
        x.model_dump(exclude=_CIRCUMSTANCES | {"group"})
        for x in (Recipe.model_validate({}), other.recipe)
    )
    return mine == its and method == plain and other.recipe.group in (None, "row")


def _perplexity(scores: dict[str, Score], text: str) -> float | None:
    return scores[text].perplexity if text in scores else None


def _csv_row(results: SweepResults, cell: CellResult) -> dict[str, Any]:
    recipe, pruning = cell.recipe, cell.pruning
    row = {
        "name": cell.name,
        "model": cell.model,
        **{key: _field(value) for key, value in recipe.model_dump().items()},
        "recovery": cell.recovery,
        "sparsity reached": pruning.sparsity if pruning else None,
        "mean relative output error": pruning.mean_relative_output_error if pruning else None,
        "mean removed energy": pruning.mean_removed_energy if pruning else None,
        "pruning seconds": pruning.seconds if pruning else None,
    }
    for text in results.scoring["texts"]:
        row[f"perplexity {text}"] = _perplexity(cell.scores, text)
        row[f"dense perplexity {text}"] = _perplexity(results.models[cell.model].scores, text)
        row[f"residual gap {text}"] = cell.residual_gap.get(text)
    return row | _task_columns(cell.tasks) | {"state": cell.state, "error": cell.error}


def _field(value: Any) -> Any:
    return " ".join(value) if isinstance(value, tuple) else value


def _task_columns(tasks: Tasks) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for task, metrics in tasks.items():
        for metric, figure in metrics.items():
            found |= {f"{task} {metric}": figure.value, f"{task} {metric} stderr": figure.stderr}
    return found
