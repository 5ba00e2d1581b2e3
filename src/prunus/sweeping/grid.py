"""The sweep file: TOML, validated, and the cells that its grids span. This file imports no torch.

    models = ["path/to/model"]

    [recipe]                                  # options of `prunus prune` for all cells
    samples = 32

    [[grid]]                                  # every combination; a file may have several grids
    method = ["magnitude", "wanda"]
    sparsity = [0.5, "2:4"]
    recovery = ["short"]                      # also recover each cell, by [recovery.short]

A cell is one combination. Its name contains the options that differ from `[recipe]`, so a cell
keeps its name when other cells are added.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from prunus.engine.run_options import RunOptions
from prunus.evaluation.eval_options import TaskOptions, TextOptions
from prunus.methods.table import METHODS
from prunus.options import Option, Options
from prunus.pruning.recipe import Recipe
from prunus.sweeping.results import CellResult
from prunus.words import known

# The most cells of a sweep. At a minute per cell, these take a week.
_MAX_CELLS = 10_000
# The value of `recovery` in a grid that means no recovery.
_NO_RECOVERY = "none"
# Options of evaluation that the command gives, and not the file: they do not decide any figure.
_OF_THE_COMMAND = set(RunOptions.declared())


class Scoring(TextOptions, TaskOptions):
    """How every model of a sweep is scored: the options of `prunus eval`.

    Attributes:
        texts: The texts to measure perplexity on: names of corpora or paths.
        tasks: The tasks of lm-eval.

    Raises:
        ValueError: An option is unknown, out of range, or one of the command, such as the device.
    """

    texts: Annotated[tuple[str, ...], Option("Score on these texts.")] = ("wikitext2",)
    tasks: Annotated[tuple[str, ...], Option("Score on these tasks of lm-eval.")] = ()

    @model_validator(mode="after")
    def _leaves_the_rest_to_the_command(self) -> Self:
        if others := sorted(self.model_fields_set & _OF_THE_COMMAND):
            raise ValueError(f"{others[0]} is an option of the command, not of the file")
        return self

    def figures_from(self) -> dict[str, Any]:
        """All that decides the figures, as values for JSON."""
        return self.model_dump(mode="json", exclude=_OF_THE_COMMAND)

    def arguments(self, kind: type[Options], options: RunOptions) -> dict[str, Any]:
        """The keywords of a function that takes the options `kind`.

        Args:
            kind: A model of options that this class inherits from.
            options: Those of the command, which decide no figure.
        """
        values = {name: getattr(self, name) for name in kind.model_fields}
        return values | {name: getattr(options, name) for name in values.keys() & _OF_THE_COMMAND}


class Sweep(Options):
    """A sweep file, see the top of this file; `Sweep.read` reads it.

    Attributes:
        title: The title of the report; without one, the report names the models.
        description: Text for the report.
        models: Checkpoint folders or hub ids of the dense models.
        recipe: Options of `prunus prune` for all cells, by name.
        scoring: How every model is scored.
        grid: Tables that map recipe options and `recovery` to a value or a list of values.
        recovery: Name -> options of `prunus recover`.
        keep_checkpoints: Whether the weights of cells stay once they are scored.

    Raises:
        ValueError: An option is unknown or out of range, there is no model or no cell, or the cells
            are too many or cannot be told apart.
    """

    FILE = "sweep"

    title: str = ""
    description: str = ""
    models: tuple[str, ...] = ()
    recipe: dict[str, Any] = Field(default={})
    scoring: Scoring = Scoring()
    grid: tuple[dict[str, Any], ...] = Field(min_length=1)
    recovery: dict[str, dict[str, Any]] = Field(default={})
    keep_checkpoints: bool = False

    @model_validator(mode="after")
    def _has_cells(self) -> Self:
        self.cells()
        return self

    def labels(self) -> dict[str, str]:
        """Label -> model. The label is the last part of the path or hub id, used in cell names.

        Raises:
            ValueError: There is no model, or two have the same label.
        """
        if not self.models:
            raise ValueError(
                "no model: give models = [...] in the sweep file, or name some when you run it"
            )
        models_by_label: dict[str, str] = {}
        for model in self.models:
            label = _slug(Path(model).name or model)
            if label in models_by_label:
                raise ValueError(
                    f"two models are called {label!r} ({models_by_label[label]} and {model}): "
                    "rename or link one of the folders"
                )
            models_by_label[label] = model
        return models_by_label

    def cells(self) -> list[CellResult]:
        """All combinations in the order of the file; a recovery follows the cell that it recovers.

        A combination that several grids have is one cell.

        Raises:
            ValueError: The cells are too many, a value is not one of its option, a recovery has no
                table, or two different cells would have the same name.
        """
        count = len(self.labels()) * sum(
            math.prod(len(x) for x in table.values() if isinstance(x, list)) for table in self.grid
        )
        if count > _MAX_CELLS:
            raise ValueError(
                f"the grids have {count:,} cells, and a sweep has at most {_MAX_CELLS:,}; give "
                "fewer values, or split the file"
            )
        base = _recipe("[recipe]", self.recipe)
        # Name of a pruned cell -> that cell, then the cells that recover it.
        cells_by_name: dict[str, list[CellResult]] = {}
        for label, (number, table) in itertools.product(self.labels(), enumerate(self.grid, 1)):
            where = f"grid {number}"
            for values in _combinations(where, table):
                recovery = str(values.pop("recovery", _NO_RECOVERY))
                if recovery != _NO_RECOVERY and recovery not in self.recovery:
                    raise ValueError(
                        f"{where}: recovery {recovery!r} has no table [recovery.{recovery}]"
                    )
                # A pattern replaces the sparsity of [recipe] and vice versa.
                replaced = (
                    {"pattern", "sparsity"} if values.keys() & {"pattern", "sparsity"} else ()
                )
                shared = {key: x for key, x in self.recipe.items() if key not in replaced}
                recipe = _recipe(where, shared | values)
                name = _cell_name(label, recipe, base)
                pruned = CellResult(name=name, model=label, recipe=recipe)
                cells = cells_by_name.setdefault(name, [pruned])
                if (cells[0].model, cells[0].recipe) != (label, recipe):
                    raise ValueError(
                        f"{where}: two different cells would be called {name!r}; write their "
                        "values so that they differ in more than punctuation"
                    )
                if recovery not in (_NO_RECOVERY, *(cell.recovery for cell in cells)):
                    follower = {"name": f"{name}+{_slug(recovery)}", "recovery": recovery}
                    cells.append(cells[0].model_copy(update=follower | {"recovers": name}))
        return [cell for cells in cells_by_name.values() for cell in cells]


def _combinations(where: str, table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid's values. N:M patterns are given as values of `sparsity`.

    >>> list(_combinations("grid 1", {"method": ["wanda", "obs"], "sparsity": "2:4"}))
    [{'method': 'wanda', 'pattern': '2:4'}, {'method': 'obs', 'pattern': '2:4'}]
    """
    methods = table.get("method", [])
    # Options of a method of one's own are known when its file is loaded.
    has_own = not {*(methods if isinstance(methods, list) else [methods])} <= METHODS.keys()
    hints = {"pattern": 'patterns belong to sparsity: sparsity = [0.5, "2:4"]'}
    # In a grid, a list holds the values that an option has in turn.
    hints |= dict.fromkeys(Recipe.lists(), "it belongs to [recipe]")
    options = [name for name in (*Recipe.model_fields, "recovery") if name not in hints]
    for key, value in table.items():
        if key in hints or (key not in options and not has_own):
            why = f": {hints[key]}" if key in hints else known(key, options)
            raise ValueError(f"{where} cannot vary {key!r}{why}")
        if value == []:
            raise ValueError(f"{where}: {key} is an empty list; give at least one value")
    axes = {key: value if isinstance(value, list) else [value] for key, value in table.items()}
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        if isinstance(values.get("sparsity"), str):
            values["pattern"] = values.pop("sparsity")
        yield values


def _recipe(where: str, values: dict[str, Any]) -> Recipe:
    """A recipe of these values; an error says `where` in the file they are."""
    try:
        return Recipe.read(None, values)
    except ValueError as fault:
        raise ValueError(f"{where}: {fault}") from None


def _cell_name(label: str, recipe: Recipe, base: Recipe) -> str:
    """Model, method, sparsity, and all options of a recipe that differ from `base`."""
    shape = recipe.pattern.replace(":", "of") if recipe.n_of_m else f"{recipe.sparsity:g}"
    parts = [label, _slug(recipe.method.rpartition(":")[2]), shape]
    values = recipe.model_dump()
    shared = base.model_dump()
    values |= values.pop("method_options")
    for key in values:
        if key not in ("method", "sparsity", "pattern") and values[key] != shared.get(key):
            parts.append(f"{key}={_slug(str(values[key]))}")
    return "-".join(parts)


def _slug(text: str) -> str:
    """A text as part of a file name: letters, digits, '.', '_' and '-', a letter or digit first."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip("._-") or "model"
