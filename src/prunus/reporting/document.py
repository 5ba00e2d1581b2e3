"""The content of a report, apart from how it is shown: sections of facts, tables and charts.

A document holds every figure as it was measured. Only `text_of` formats figures, so that the page,
the terminal and Markdown agree. This module knows no HTML, no plotting library and no terminal.
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
    """A figure with its standard error.

    Attributes:
        value: the figure.
        stderr: its standard error, or None if it is unknown.
        form: how to format it, as in `Column`; None to use the column's.
    """

    value: float
    stderr: float | None
    form: str | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: heading.
        form: Python format specification of its figures; None if it holds text.
    """

    title: str
    form: str | None = None

    @property
    def is_number(self) -> bool:
        """Whether the column holds figures."""
        return self.form is not None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: heading.
        columns: one per value of a row.
        rows: unformatted values; None where a figure is missing.
        note: text below the table.
        folded: whether the page shows the table only after a click, because it is long.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values, such as a recipe.

    Attributes:
        title: heading.
        items: pairs of name and value.
        headline: whether the facts are few and should stand out.
    """

    title: str
    items: tuple[tuple[str, str], ...]
    headline: bool = False


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: stands in the legend.
        x, y: the points.
        hover: text of each point, shown under the pointer.
    """

    name: str
    x: tuple[Any, ...]
    y: tuple[float, ...]
    hover: tuple[str, ...]


@dataclass(frozen=True)
class Lines:
    """A chart of lines, with a marker at each measured point.

    Attributes:
        title, x_title, y_title: headings of the chart and its axes.
        series: the lines.
        level: name and value of a horizontal line to compare with, such as the dense model's.
        categories: all values of x in order, if x is a category; empty if x is a number.
        log_x, log_y: whether the axis is logarithmic.
        round_ticks: whether the x axis has ticks at round numbers, rather than one at every value.
        labelled: whether names stand beside the points, rather than in a legend.
    """

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    level: tuple[str, float] | None = None
    categories: tuple[str, ...] = ()
    log_x: bool = False
    log_y: bool = False
    round_ticks: bool = False
    labelled: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A chart with one coloured cell per row and column.

    Attributes:
        title, x_title: headings of the chart and its x axis.
        columns, rows: names of the columns and rows.
        values: one tuple per row; None where there is no value.
        form: how to format a value, as in `Column`.
    """

    title: str
    x_title: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    form: str


@dataclass(frozen=True)
class Bars:
    """A chart with one bar per item.

    Attributes:
        title, x_title: headings of the chart and its x axis.
        items: (name, value, lowest, highest); lowest equals highest if there is no spread.
        form: how to format a value, as in `Column`.
    """

    title: str
    x_title: str
    items: tuple[tuple[str, float, float, float], ...]
    form: str


Chart = Lines | HeatMap | Bars


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

    def _repr_html_(self) -> str:
        """The report in a notebook: facts and tables; charts stand in the written page alone."""
        from prunus.reporting.page import sections_html

        return sections_html(self)


def text_of(value: Any, form: str | None) -> str:
    """Format a value for people.

    Args:
        value: number, text, `Measured`, or None if it is missing.
        form: Python format specification; None for text.

    Returns:
        The text. A missing value becomes a dash.

    >>> text_of(1234.567, ",.2f")
    '1,234.57'
    >>> text_of(Measured(0.5, stderr=0.25), ".1%")
    '50.0% ± 25.0%'
    >>> text_of(None, ".1%")
    '–'
    """
    if value is None:
        return MISSING
    if isinstance(value, Measured):
        form = value.form or form
        error = (
            "" if value.stderr is None else f" ± {text_of(value.stderr, form and form.lstrip('+'))}"
        )
        return f"{text_of(value.value, form)}{error}"
    return str(value) if form is None else format(value, form)
