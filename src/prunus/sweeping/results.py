"""The results of a sweep: the records of `results.json`, and their table.

The sweep writes them and the report reads them. The two share only this file and the files on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from prunus.document import Measured, Table, plain_rows, short_names, table_of
from prunus.engine.run_record import RecordPart, read_record
from prunus.evaluation.eval_records import FORMS, ModelSize, PerplexityResult, task_metrics
from prunus.model.checkpoint.files import SWEEP_FILE, write_json
from prunus.pruning.recipe import Recipe
from prunus.words import require_library

# Smallest loss of Wanda, as a share of the dense perplexity, for which a residual gap is computed.
_MIN_WANDA_LOSS = 0.01
# Recipe options that must be equal in two cells whose methods are compared. All others belong to
# the method.
_CONDITIONS = Recipe.names_of(lambda option: option.is_condition)


#: The folder of the folders of cells, in the folder of a sweep.
CELLS_FOLDER = "cells"
#: The name of a dense model among the methods.
DENSE = "dense"
#: The options that every row of results names; other options are there if they vary.
_ALWAYS = ("method", "pattern", "sparsity", "seed")
#: How far the work on a model is.
State = Literal["waiting", "running", "done", "failed"]


class SweptModel(RecordPart):
    """A model of a sweep, dense or a cell, and what was measured of it.

    Attributes:
        size: Its size as it is stored; None until it is measured.
        scores: Text -> perplexity. Those of cells have a divergence from the dense model.
        tasks: The content of lm-eval's file of results; empty before it.
        pruning: Totals of the run that pruned a cell, and where its calibration windows come from,
            with their hash; None before it, and for dense models.
        recovered: Totals of the run that recovered a cell; None before it, and for other models.
        residual_gap: Text -> see `residual_gaps`; empty for dense models.
        state: A `waiting` model was not started, and a `running` one is between two steps. A
            `failed` one is tried again by the next run.
        error: Why the work on it failed, in one line; None where it did not.
    """

    size: ModelSize | None = None
    scores: dict[str, PerplexityResult] = Field(default={})
    tasks: dict[str, Any] = Field(default={})
    pruning: dict[str, Any] | None = None
    recovered: dict[str, Any] | None = None
    residual_gap: dict[str, float | None] = Field(default={})
    state: State = "waiting"
    error: str | None = None

    def figures(self, text: str) -> dict[str, Any]:
        """Title -> its figure on one text, and its size."""
        score = self.scores.get(text)
        gap = {"residual gap": self.residual_gap.get(text)}
        return (score.figures() if score else {}) | gap | (self.size.figures() if self.size else {})

    def totals(self) -> dict[str, Any]:
        """Title -> value: the zeros, the errors of the linears, the seconds of the work.

        A value is None where the model has none.
        """
        pruning, recovered = self.pruning or {}, self.recovered or {}
        return {
            "zeros": pruning.get("sparsity", recovered.get("sparsity")),
            "relative output error": pruning.get("mean_relative_output_error"),
            "removed energy": pruning.get("mean_removed_energy"),
            "pruning seconds": pruning.get("block_seconds"),
            "recovery seconds": recovered.get("seconds"),
        }

    def task_figures(self) -> dict[str, Measured]:
        """Task and metric -> figure."""
        metrics = task_metrics(self.tasks) if self.tasks else {}
        return {", ".join(key): Measured(each.value, each.stderr) for key, each in metrics.items()}


class CellResult(SweptModel):
    """A cell of a sweep: a pruned model, or one that is recovered after that.

    Attributes:
        name: Unique name, which is also the name of the cell's folder.
        model: Label of the dense model.
        recipe: How it is pruned.
        method_name: The name of its method, which a recipe with a method of one's own does not
            have; empty in results of versions before 0.5.
        recovery: Name of the table of the recovery; None for a cell without one.
        recovers: Name of the cell whose weights are recovered; None for a cell without a recovery.
    """

    name: str
    model: str
    recipe: Recipe
    method_name: str = ""
    recovery: str | None = None
    recovers: str | None = None

    def folder(self, output: Path) -> Path:
        """Its folder in the folder `output` of the sweep."""
        return output / CELLS_FOLDER / self.name

    def options(self) -> dict[str, Any]:
        """The options of the recipe with those of a method of one's own, and the method's name."""
        values = self.recipe.model_dump()
        own = values.pop("method_options")
        return values | own | {"method": self.method_name or self.recipe.method}


class DenseResult(SweptModel):
    """A dense model, before it is pruned.

    Attributes:
        path: Its checkpoint folder.
        fingerprint: See `CheckpointSource.fingerprint`; tells checkpoints apart.
        weights_sha256: SHA-256 over its configuration and all bytes of its weights; "" in results
            of versions before 0.5.
    """

    path: str
    fingerprint: str
    weights_sha256: str = ""
    # Earlier versions recorded no state of a dense model.
    state: State = "done"


class SweepResults(RecordPart):
    """Everything that a sweep has measured so far.

    Attributes:
        format: The version of this record.
        file: Name of the sweep file.
        title: The title of the report.
        description: Text for the report.
        scoring: All that decides the figures, see `Scoring.figures_from`.
        recovery: Name -> options of the recoveries.
        hardware: See `memory.describe_hardware`.
        versions: See `memory.versions`.
        models: Label -> dense model.
        cells: All cells, in the order of the sweep file.
        changed: Name of a cell, or of a dense model -> why its figures of an earlier run do not
            hold and are measured again. Not in the JSON.
    """

    #: The file of the record in the folder of a sweep.
    FILE: ClassVar[str] = SWEEP_FILE

    format: Literal[4] = 4
    file: str
    title: str
    description: str = ""
    scoring: dict[str, Any]
    recovery: dict[str, dict[str, Any]] = Field(default={})
    hardware: dict[str, Any]
    versions: dict[str, str]
    models: dict[str, DenseResult]
    cells: list[CellResult]
    changed: dict[str, str] = Field(default={}, exclude=True)

    def save(self, folder: Path) -> None:
        """Write `results.json` atomically, with the current residual gaps."""
        for cell in self.cells:
            cell.residual_gap = residual_gaps(self, cell)
        write_json(folder / self.FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path) -> SweepResults:
        """The results in the folder of a sweep.

        Raises:
            FileNotFoundError: The folder has no results.
            ValueError: The file is damaged, or another version of prunus wrote it.
        """
        path = Path(folder) / cls.FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} has no {cls.FILE}: it is not the output of prunus sweep"
            )
        return read_record(path, cls)

    def every_model(self) -> Iterator[tuple[str, str, SweptModel]]:
        """Name, label and figures of the dense models, then of the cells."""
        for label, dense in self.models.items():
            yield dense_name(label), label, dense
        for cell in self.cells:
            yield cell.name, cell.model, cell

    def kept_and_changed(self) -> list[str]:
        """Lines that name what is kept of an earlier run, and what is measured again and why."""
        by_reason: dict[str, list[str]] = {}
        for name, _, model in self.every_model():
            if name in self.changed or model.state == "done":
                by_reason.setdefault(self.changed.get(name, ""), []).append(name)
        return [
            f"measures again ({why}): {', '.join(names)}" if why else f"keeps {', '.join(names)}"
            for why, names in by_reason.items()
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One row per dense model and per cell: what it is, then every figure by its title.

        What it is: the cell, the model, the method, its pattern, sparsity and seed, the options
        that vary among the cells, and the recovery.
        """
        varying = varying_options([cell.options() for cell in self.cells])
        texts = short_names(self.scoring["texts"])
        rows = []
        for name, label, model in self.every_model():
            row: dict[str, Any] = {"cell": name, "model": label}
            row |= dict.fromkeys((*_ALWAYS, *varying, "recovery")) | {"method": DENSE}
            if isinstance(model, CellResult):
                options = model.options()
                row |= {key: options.get(key) for key in (*_ALWAYS, *varying)}
                row["recovery"] = model.recovery
            size = model.size.figures() if model.size else {}
            for text, short in texts.items():
                figures = model.figures(text)
                row |= {
                    f"{title}, {short}": figures[title] for title in figures if title not in size
                }
            state = {"state": model.state, "reason": model.error}
            rows.append(row | size | model.task_figures() | model.totals() | state)
        return rows

    def frame(self) -> Any:
        """The results as a DataFrame of pandas: the rows and columns of the CSV file of a report.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        require_library("pandas", "frame()", "plot")
        from pandas import DataFrame

        return DataFrame(list(plain_rows(self.rows())))

    def table(self) -> Table:
        """One row per dense model and per cell, which its name describes."""
        rows = self.rows()
        texts = short_names(self.scoring["texts"]).values()
        forms = {key: ".4g" for row in rows for key, x in row.items() if isinstance(x, Measured)}
        forms |= FORMS | {f"{key}, {text}": form for text in texts for key, form in FORMS.items()}
        forms |= dict.fromkeys(("zeros", "relative output error", "removed energy"), ".2%")
        forms |= dict.fromkeys(("pruning seconds", "recovery seconds"), ",.1f")
        named = {"cell", "model", "recovery"}.union(*(cell.options() for cell in self.cells))
        figures = [
            {"model": row["cell"]} | {key: x for key, x in row.items() if key not in named}
            for row in rows
        ]
        note = (
            "Errors are means over linears. The removed energy assumes uncorrelated inputs.\n"
            "KL divergence: from the dense model, in nats per token; ± one standard error over "
            "windows.\nFile: with the bits per weight of the linears in the blocks; zeros take as "
            "much room as all other weights."
        )
        return table_of("Models", figures, forms, note)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def dense_name(label: str) -> str:
    """The name of a dense model next to those of cells."""
    return f"{label}-dense"


def varying_options(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options that differ between cells; a method of one's own may have some that others lack.

    >>> varying_options([{"seed": 0, "power": 1}, {"seed": 0}])
    ['power']
    """
    names = dict.fromkeys(name for each in options for name in each)
    return [name for name in names if len({repr(each.get(name)) for each in options}) > 1]


def residual_gap(perplexity: float, dense: float, wanda: float) -> float | None:
    """The loss of a method as a share of what Wanda loses: 1 is Wanda, 0 is lossless.

    gap = (ppl − ppl_dense) / (ppl_wanda − ppl_dense)

    It is None if a perplexity is infinite, or if Wanda loses less than 1 % of the dense perplexity:
    a share of almost nothing means nothing.

    Args:
        perplexity: That of the method.
        dense: That of the dense model.
        wanda: That of Wanda.

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
        text: residual_gap(score.perplexity, dense[text].perplexity, wanda[text].perplexity)
        if text in dense and text in wanda
        else None
        for text, score in cell.scores.items()
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
