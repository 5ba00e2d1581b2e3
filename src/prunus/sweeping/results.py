"""The results of a sweep: the records of `results.json` and the table of `results.csv`.

The sweep writes them and the report reads them. The two share only this file and the files on disk.
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
from prunus.runs.document import Table, table_of

__all__ = [
    "RESULTS_NAME",
    "CalibrationSet",
    "CellResult",
    "Divergence",
    "ModelResult",
    "Pruning",
    "Score",
    "Size",
    "SweepResults",
    "TaskValue",
    "Tasks",
    "residual_gap",
    "residual_gaps",
]

RESULTS_NAME = "results.json"
TABLE_NAME = "results.csv"
#: Smallest loss of Wanda, as a share of the dense perplexity, for which a residual gap is computed.
_MIN_WANDA_LOSS = 0.01
#: Recipe options that must be equal in two cells whose methods are compared. All others belong to
#: the method.
_CONDITIONS = {
    "sparsity",
    "pattern",
    "calibration",
    "samples",
    "seqlen",
    "seed",
    "bos",
    "batch",
    "dtype",
    "propagate",
    "head",
    "only",
    "ignore",
}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Divergence(_Record):
    """How far a cell is from its dense model, see `prunus.evaluation.Divergence`.

    None stands for infinity, and for the standard errors of a single window.
    """

    reference: str
    kl: float
    kl_stderr: float | None
    kl_q999: float
    same_top: float
    same_top_stderr: float | None
    reference_perplexity: float | None
    perplexity_ratio: float | None
    perplexity_ratio_stderr: float | None


class Score(_Record):
    """Perplexity on one text, see `prunus.PerplexityResult`. None stands for infinity.

    Dense models have no divergence, and neither have cells that an earlier version scored.
    """

    source: str
    perplexity: float | None
    loss: float
    windows: int
    tokens: int
    seqlen: int
    protocol: str
    seconds: float
    streamed: bool = False
    bos: Literal["yes", "no", "given"] = "no"
    divergence: Divergence | None = None


class Size(_Record):
    """The size of a result, see `prunus.evaluation.size.ModelSize`: as stored, and packed.

    The packed size is that of `prunus pack` without loss; None where it packs nothing.
    """

    file_bytes: int
    bits_per_weight: float | None
    packed_file_bytes: int | None = None
    packed_bits_per_weight: float | None = None

    @property
    def smallest(self) -> tuple[int, float | None]:
        """File bytes and bits per weight, packed where that is possible."""
        if self.packed_file_bytes is None:
            return self.file_bytes, self.bits_per_weight
        return self.packed_file_bytes, self.packed_bits_per_weight


class TaskValue(_Record):
    """One metric of a task, and its standard error. None stands for unknown."""

    value: float | None
    stderr: float | None


#: Task -> metric -> value. If all seven tasks of the paper are there, their mean is too.
Tasks = dict[str, dict[str, TaskValue]]


class Pruning(_Record):
    """Totals of a pruning run. `seconds` sums over blocks, so a resumed run counts in full."""

    weights: int
    zeros: int
    sparsity: float
    mean_relative_output_error: float | None
    mean_removed_energy: float | None
    seconds: float
    dtype: str
    calibration_sha256: str


class CellResult(_Record):
    """One cell. A `waiting` cell was not started, a `running` one is between two steps.

    A `failed` cell has an error message.
    """

    name: str
    model: str
    recipe: Recipe
    recovery: str | None = None
    recovers: str | None = None
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    error: str | None = None
    pruning: Pruning | None = None
    recovered: dict[str, Any] | None = Field(default=None, description="totals of the recovery")
    size: Size | None = None
    scores: dict[str, Score] = Field(default={}, description="scoring text -> perplexity")
    tasks: Tasks = {}
    residual_gap: dict[str, float | None] = Field(
        default={}, description="scoring text -> see `residual_gaps`"
    )


class ModelResult(_Record):
    """A dense model, before it is pruned."""

    path: str
    fingerprint: str
    size: Size | None = None
    scores: dict[str, Score] = {}
    tasks: Tasks = {}
    error: str | None = None


class CalibrationSet(_Record):
    """Calibration windows that cells share. `file` is relative to the sweep's folder."""

    model: str
    calibration: str
    samples: int
    seqlen: int
    seed: int
    source: str
    sha256: str
    file: str
    bos: Literal["auto", "yes", "no"] = Field(default="no", description="as in the recipe")
    used_bos: Literal["yes", "no", "given"] = Field(
        default="no", description="whether every window begins with BOS"
    )


class SweepResults(_Record):
    """Everything that a sweep has found so far."""

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
        """Write `results.json` and `results.csv` atomically, with the current residual gaps."""
        for cell in self.cells:
            cell.residual_gap = residual_gaps(self, cell)
        write_json(folder / RESULTS_NAME, self.model_dump(mode="json"))
        write_text(folder / TABLE_NAME, self.to_csv())

    @classmethod
    def load(cls, folder: Path) -> SweepResults:
        """Read `results.json`.

        Raises:
            FileNotFoundError: the folder has no results.
            ValueError: the file is damaged or of another version.
        """
        path = folder / RESULTS_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} has no {RESULTS_NAME}: it is not the output of prunus sweep"
            )
        return read_record(path, cls)

    def table(self) -> Table:
        """The dense models and the cells, with their scores."""
        texts = self.scoring.get("texts", ())
        forms = {"zeros": ".2%"}

        def row(name: str, zeros: float, found: CellResult | ModelResult, state: str) -> Any:
            values: dict[str, Any] = {"cell": name, "zeros": zeros}
            for text in texts:
                score = found.scores.get(text)
                values[f"perplexity {text}"] = getattr(score, "perplexity", None)
                values[f"KL {text}"] = getattr(getattr(score, "divergence", None), "kl", None)
            for task, metrics in found.tasks.items():
                values |= {f"{task} {name}": metric.value for name, metric in metrics.items()}
            forms.update(dict.fromkeys(list(values)[2:], ".4g"))
            return values | {"state": found.error or state}

        rows = [row(f"{label}, dense", 0.0, each, "") for label, each in self.models.items()]
        for cell in self.cells:
            zeros = cell.pruning.sparsity if cell.pruning else cell.recipe.sparsity
            rows.append(row(cell.name, zeros, cell, cell.state))
        return table_of(self.title, rows, forms, self.description)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_csv(self) -> str:
        """One row per dense model and per cell. A missing value is an empty field."""
        texts = self.scoring["texts"]
        dense = [
            {"name": f"{label}-dense", "model": label, "method": "dense", "sparsity": 0.0}
            | {f"perplexity {text}": _perplexity(model.scores, text) for text in texts}
            | _size_columns(model.size)
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


def residual_gap(perplexity: float, dense: float, wanda: float) -> float | None:
    """The loss of a method as a share of what Wanda loses: 1 is Wanda, 0 is lossless.

    gap = (ppl − ppl_dense) / (ppl_wanda − ppl_dense)

    >>> residual_gap(perplexity=25.0, dense=20.0, wanda=30.0)
    0.5
    >>> residual_gap(perplexity=20.1, dense=20.0, wanda=20.1) is None
    True

    Returns:
        The gap, or None if Wanda loses less than 1 % of the dense perplexity: a share of almost
        nothing means nothing.
    """
    if wanda <= dense * (1 + _MIN_WANDA_LOSS):
        return None
    return (perplexity - dense) / (wanda - dense)


def residual_gaps(results: SweepResults, cell: CellResult) -> dict[str, float | None]:
    """The residual gap of a cell per scoring text, see `residual_gap`.

    It is None if a perplexity is missing or infinite.

    The cell is compared to plain Wanda: by rows, all options at their defaults, without recovery.
    Model, sparsity, calibration, seed and all other options that do not belong to the method must
    be equal.
    """
    wanda = next((other for other in results.cells if _is_wanda_of(other, cell)), None)
    gaps: dict[str, float | None] = {}
    for text in cell.scores:
        own = _perplexity(cell.scores, text)
        dense = _perplexity(results.models[cell.model].scores, text)
        reference = _perplexity(wanda.scores, text) if wanda is not None else None
        if own is None or dense is None or reference is None:
            gaps[text] = None
        else:
            gaps[text] = residual_gap(own, dense, reference)
    return gaps


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
        row |= _divergence_columns(cell.scores.get(text), text)
    return (
        row
        | _size_columns(cell.size)
        | _task_columns(cell.tasks)
        | {"state": cell.state, "error": cell.error}
    )


_DIVERGENCE_COLUMNS = {
    "KL": "kl",
    "KL stderr": "kl_stderr",
    "KL 99.9 % quantile": "kl_q999",
    "same top token": "same_top",
    "same top token stderr": "same_top_stderr",
}


def _divergence_columns(score: Score | None, text: str) -> dict[str, float | None]:
    found = score.divergence if score is not None else None
    return {
        f"{title} {text}": getattr(found, name, None) for title, name in _DIVERGENCE_COLUMNS.items()
    }


def _size_columns(size: Size | None) -> dict[str, float | None]:
    return {name.replace("_", " "): getattr(size, name, None) for name in Size.model_fields}


def _field(value: Any) -> Any:
    return " ".join(value) if isinstance(value, tuple) else value


def _task_columns(tasks: Tasks) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            found |= {f"{task} {metric}": value.value, f"{task} {metric} stderr": value.stderr}
    return found
