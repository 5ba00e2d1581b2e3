"""What a report says, apart from how it is shown: sections of facts, tables and charts.

Every figure is held as it was measured and formatted in one place, `text_of`, so that page, terminal and Markdown
agree. Knows no HTML, no plotting library and no terminal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Bars",
    "Chart",
    "Column",
    "Document",
    "Facts",
    "HeatMap",
    "Histogram",
    "Lines",
    "Measured",
    "Section",
    "Series",
    "Table",
    "text_of",
]

MISSING = "–"


@dataclass(frozen=True)
class Measured:
    """A figure with its standard error, None where that is not known; a `form` of its own goes before the column's."""

    value: float
    stderr: float | None
    form: str | None = None


@dataclass(frozen=True)
class Column:
    """A table's column; `form` is a Python format specification, None for text."""

    title: str
    form: str | None = None

    @property
    def is_number(self) -> bool:
        return self.form is not None


@dataclass(frozen=True)
class Table:
    """Rows of raw values, None where a figure is missing. `folded` tables are long: the page opens them on demand."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values, such as a recipe. `headline` facts are few and stand out."""

    title: str
    items: tuple[tuple[str, str], ...]
    headline: bool = False


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (x, y), and what is said at each of them."""

    name: str
    x: tuple[Any, ...]
    y: tuple[float, ...]
    hover: tuple[str, ...]


@dataclass(frozen=True)
class Lines:
    """Lines with a marker at each measured point; `level` is a value to compare with, such as the dense model's.

    x is a number (`log_x`: on a logarithmic axis) or, where `categories` names them in order, a category.
    """

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    level: tuple[str, float] | None = None
    categories: tuple[str, ...] = ()
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A value per row and column, None where there is none; `form` as in `Column`."""

    title: str
    x_title: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    form: str


@dataclass(frozen=True)
class Bars:
    """A bar from zero per item, (name, value, lowest, highest); the last two are equal where there is no spread."""

    title: str
    x_title: str
    items: tuple[tuple[str, float, float, float], ...]
    form: str


@dataclass(frozen=True)
class Histogram:
    """Counts between `edges`, one more of these than counts, per series, one on the other.

    `log_x`: the edges are exponents of ten. `highest`: top of the axis, to compare histograms by eye.
    """

    title: str
    x_title: str
    edges: tuple[float, ...]
    series: tuple[tuple[str, tuple[int, ...]], ...]
    note: str = ""
    log_x: bool = False
    highest: int | None = None


Chart = Lines | HeatMap | Bars | Histogram


@dataclass(frozen=True)
class Section:
    """One subject of a report: a run, a sweep, an evaluation."""

    title: str
    lead: str = ""
    parts: tuple[Facts | Table | Chart, ...] = ()


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    sections: tuple[Section, ...] = field(default=())


def text_of(value: Any, form: str | None) -> str:
    """A value as people read it; a missing one is a dash."""
    if value is None:
        return MISSING
    if isinstance(value, Measured):
        form = value.form or form
        error = (
            "" if value.stderr is None else f" ± {text_of(value.stderr, form and form.lstrip('+'))}"
        )
        return f"{text_of(value.value, form)}{error}"
    return str(value) if form is None else format(value, form)
