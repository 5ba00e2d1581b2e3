"""The results of a sweep: the records of `results.json` and the table of `results.csv`.

The sweep writes them and the report reads them. The two share only this file and the files on disk.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from prunus.evaluation.records import FORMS, ModelSize, PerplexityResult
from prunus.model.checkpoint.atomic_files import write_json, write_text
from prunus.pruning.manifest import mean_error
from prunus.pruning.recipe import Recipe
from prunus.runs.document import Measured, Table, table_of
from prunus.runs.record import Part, UsedBos, read_record

RESULTS_NAME = "results.json"
TABLE_NAME = "results.csv"
#: Smallest loss of Wanda, as a share of the dense perplexity, for which a residual gap is computed.
_MIN_WANDA_LOSS = 0.01
#: Recipe options that must be equal in two cells whose methods are compared. All others belong to
#: the method.
_CONDITIONS = Recipe.names_of(lambda option: option.is_condition)


class SweptModel(Part):
    """A model of a sweep, dense or a cell, and what was measured of it."""

    size: ModelSize | None = None  #: as it is stored
    #: As `prunus pack` would store it without loss; None where it packs nothing.
    packed: ModelSize | None = None
    #: Text -> perplexity. Cells have a divergence from the dense model.
    scores: dict[str, PerplexityResult] = Field(default={})
    #: Task -> metric -> value and stderr, None where they are unknown. If all seven tasks of the
    #: paper are there, their mean is too.
    tasks: dict[str, dict[str, dict[str, float | None]]] = Field(default={})
    #: pruning, recovered: Totals of the runs that made a cell.
    pruning: dict[str, Any] | None = None
    recovered: dict[str, Any] | None = None
    #: Text -> see `residual_gaps`; empty for dense models.
    residual_gap: dict[str, float | None] = Field(default={})
    error: str | None = None

    def figures(self, text: str) -> dict[str, Any]:
        """Its figures on one text, and its size: packed where that is possible."""
        size, score = self.packed or self.size, self.scores.get(text)
        gap = {"residual gap": self.residual_gap.get(text)}
        return (score.figures() if score else {}) | gap | (size.figures() if size else {})

    def totals(self) -> dict[str, Any]:
        """The zeros, the error of the linears in words, and the seconds of the work."""
        pruning, recovered = self.pruning or {}, self.recovered or {}
        name, error = mean_error(pruning) if pruning else ("", None)
        mark = " (E)" if name == "removed energy" else ""
        return {
            "zeros": pruning.get("sparsity", recovered.get("sparsity")),
            "error": None if error is None else f"{error:.2%}{mark}",
            "pruning seconds": pruning.get("block_seconds"),
            "recovery seconds": recovered.get("seconds"),
        }

    def task_figures(self) -> dict[str, Measured | None]:
        """Task and metric -> figure, or None where it is unknown."""
        return {
            f"{task}, {metric}": None if value is None else Measured(value, figure["stderr"])
            for task, metrics in self.tasks.items()
            for metric, figure in metrics.items()
            for value in (figure["value"],)
        }


class CellResult(SweptModel):
    name: str  #: unique name, which is also the name of the cell's folder
    model: str  #: label of the model
    recipe: Recipe
    recovery: str | None = None
    recovers: str | None = None  #: name of the cell whose weights are recovered, or None
    #: A `waiting` cell was not started, a `running` one is between two steps.
    state: Literal["waiting", "running", "done", "failed"] = "waiting"


class DenseResult(SweptModel):
    """A dense model, before it is pruned."""

    path: str
    fingerprint: str


class CalibrationSet(Part):
    """Calibration windows that cells share, by the recipe's options for windows."""

    model: str
    options: dict[str, Any]
    source: str
    sha256: str
    used_bos: UsedBos


class SweepResults(Part):
    """Everything that a sweep has found so far."""

    format: Literal[3] = 3
    #: Name of the sweep file.
    file: str
    title: str
    description: str = ""
    scoring: dict[str, Any]
    recovery: dict[str, dict[str, Any]] = Field(default={})
    hardware: dict[str, Any]
    versions: dict[str, str]
    models: dict[str, DenseResult]
    calibration: list[CalibrationSet] = Field(default=[])
    cells: list[CellResult]

    def save(self, folder: Path) -> None:
        """Write `results.json` and `results.csv` atomically, with the current residual gaps."""
        for cell in self.cells:
            cell.residual_gap = residual_gaps(self, cell)
        write_json(folder / RESULTS_NAME, self.model_dump(mode="json"))
        write_text(folder / TABLE_NAME, self.to_csv())

    @classmethod
    def load(cls, folder: Path) -> SweepResults:
        path = folder / RESULTS_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} has no {RESULTS_NAME}: it is not the output of prunus sweep"
            )
        return read_record(path, cls)

    def every_model(self) -> Iterator[tuple[str, str, SweptModel]]:
        """Name, label and figures of the dense models, then of the cells."""
        for label, dense in self.models.items():
            yield f"{label}-dense", label, dense
        for cell in self.cells:
            yield cell.name, cell.model, cell

    def state_of(self, found: SweptModel) -> str:
        """The state of a cell, or of a dense model: done when every text and task is scored."""
        if isinstance(found, CellResult):
            return found.state
        if found.error:
            return "failed"
        tasks_done = bool(found.tasks) or not self.scoring.get("tasks")
        return "done" if tasks_done and set(self.scoring["texts"]) <= {*found.scores} else "waiting"

    def table(self, speeds: Mapping[str, float] | None = None) -> Table:
        """One row per dense model and per cell. `speeds` has decoding speeds by name."""
        forms = FORMS | {"zeros": ".2%", "pruning seconds": ",.1f", "recovery seconds": ",.1f"}
        rows = [
            {"model": name}
            | self._row(found, forms)
            | {"decoded tokens/s": (speeds or {}).get(name), "reason": found.error}
            for name, _, found in self.every_model()
        ]
        note = (
            "Error: mean relative output error, or mean removed energy (E), which assumes "
            "uncorrelated inputs.\nKL divergence: from the dense model, in nats per token; ± one "
            "standard error over windows.\nFile: as prunus pack would write it without loss, with "
            "the bits per weight of its linears in the blocks; as stored where it packs nothing."
        )
        return table_of("Models", rows, forms, note)

    def _row(self, found: SweptModel, forms: dict[str, str]) -> dict[str, Any]:
        """All figures of a model. `forms` gets the formats of those on texts and tasks."""
        row: dict[str, Any] = {}
        for text in self.scoring["texts"]:
            for title, figure in found.figures(text).items():
                own = title if title in ("file, GB", "bits per weight") else f"{title}, {text}"
                row[own], forms[own] = figure, FORMS[title]
        for title, figure in found.task_figures().items():
            row[title], forms[title] = figure, ".4g"
        return row | found.totals() | {"state": self.state_of(found)}

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_csv(self) -> str:
        """One row per dense model and per cell. A missing value is an empty field."""
        rows = []
        for name, label, found in self.every_model():
            row: dict[str, Any] = {"name": name, "model": label, "method": "dense", "sparsity": 0.0}
            if isinstance(found, CellResult):
                values = found.recipe.model_dump().items()
                row |= {k: " ".join(x) if isinstance(x, tuple) else x for k, x in values}
                row["recovery"] = found.recovery
            for title, figure in self._row(found, {}).items():
                if isinstance(figure, Measured):
                    row[f"{title} stderr"], figure = figure.stderr, figure.value
                row[title] = figure
            rows.append(row | {"reason": found.error})
        columns = list(dict.fromkeys(key for row in reversed(rows) for key in row))
        file = io.StringIO()
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()


def residual_gap(perplexity: float, dense: float, wanda: float) -> float | None:
    """The loss of a method as a share of what Wanda loses: 1 is Wanda, 0 is lossless.

    gap = (ppl − ppl_dense) / (ppl_wanda − ppl_dense)

    It is None if a perplexity is infinite, or if Wanda loses less than 1 % of the dense perplexity:
    a share of almost nothing means nothing.

    >>> residual_gap(perplexity=25.0, dense=20.0, wanda=30.0)
    0.5
    >>> residual_gap(perplexity=20.1, dense=20.0, wanda=20.1) is None
    True
    """
    if math.inf in (perplexity, dense, wanda) or wanda <= dense * (1 + _MIN_WANDA_LOSS):
        return None
    return (perplexity - dense) / (wanda - dense)


def residual_gaps(results: SweepResults, cell: CellResult) -> dict[str, float | None]:
    """The residual gap of a cell per scoring text, or None where a perplexity is missing.

    It is compared to plain Wanda by rows, at default options, without recovery, that is equal in
    model, sparsity, calibration, seed and all options that do not belong to the method.
    """
    wanda = next((other.scores for other in results.cells if _is_wanda_of(other, cell)), {})
    dense = results.models[cell.model].scores
    return {
        text: residual_gap(own.perplexity, dense[text].perplexity, wanda[text].perplexity)
        if text in dense and text in wanda
        else None
        for text, own in cell.scores.items()
    }


def _is_wanda_of(other: CellResult, cell: CellResult) -> bool:
    """Whether `other` is plain Wanda under the conditions of `cell`."""
    if other.model != cell.model or other.recovery is not None:
        return False
    conditions, other_conditions = (x.recipe.model_dump(include=_CONDITIONS) for x in (cell, other))
    plain, method = (
        x.model_dump(exclude=_CONDITIONS | {"group"})
        for x in (Recipe.model_validate({}), other.recipe)
    )
    return (
        conditions == other_conditions and method == plain and other.recipe.group in (None, "row")
    )
