"""The content of a report, apart from how it is shown: sections of facts, tables and charts.

A document holds every figure as it was measured. Only `text_of` formats figures, so that the page,
the notebook, the terminal, Markdown and LaTeX agree. Every record shows itself by a `Table` of this
module. Here is the HTML that the page and the notebook share; `prunus.reporting` has the rest.

Programs get the same figures as plain rows, which `plain_rows` makes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from prunus.words import counted

#: What stands for a figure that was not measured.
MISSING = "–"
#: Which of the figures that compete is the best one.
Best = Literal["lowest", "highest"]
# Values of at most this many characters are shown several in a row.
_SHORT = 28
# Notebooks align every cell to the right.
_NOTEBOOK_STYLE = (
    "<style>.prunus th, .prunus td {text-align: left} .prunus .number {text-align: right}</style>"
)


@dataclass(frozen=True)
class Measured:
    """A figure with its standard error, or a mean over seeds with its standard deviation.

    Attributes:
        value: The figure.
        stderr: Its standard error, in the same unit; None where it is not known. Of a mean over
            seeds, it is the standard deviation.
        form: The Python format of both; None for that of the column.
        seeds: The number of seeds, if it is not that of the other means in the table; else None.
    """

    value: float
    stderr: float | None
    form: str | None = None
    seeds: int | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its heading.
        form: The Python format of its figures, such as ".2%"; None if it holds text.
        best: Which of its figures is the best one, which LaTeX prints in bold; None if the column
            is no comparison.
        unit: The figure that is the unit of the column by definition, and so never the best one;
            None for none.
    """

    title: str
    form: str | None = None
    best: Best | None = None
    unit: float | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Table:
    """A table, which shows itself in a notebook.

    Attributes:
        title: Its heading.
        columns: One per value of a row.
        rows: Unformatted values; None where a figure is missing.
        note: Lines of text below the table.
        total: A last row that sums up the others, which sorting leaves in its place; () for none.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    total: tuple[Any, ...] = ()

    def _repr_html_(self) -> str:
        return _notebook(part_html(self))


@dataclass(frozen=True)
class Facts:
    """Pairs of names and values, such as a recipe.

    Attributes:
        title: Heading of the pairs.
        items: The pairs as text.
        headline: Whether they are the few most important ones, which a page shows in large letters
            and without the heading.
    """

    title: str
    items: tuple[tuple[str, str], ...]
    headline: bool = False


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Its name in the legend.
        x: The first coordinates of its points.
        y: The second coordinates, as many.
        hover: The text of each point under the pointer, as many.
        error: The length of the error bar above and below each point, as many; 0 for none.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    hover: tuple[str, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class Lines:
    """A chart of lines, with a marker at each measured point.

    Attributes:
        title: Its heading.
        x_title: What the x axis shows.
        y_title: What the y axis shows.
        series: The lines.
        level: Name and value of a horizontal line to compare with, such as the dense model's.
        log_x: Whether the x axis is logarithmic.
        log_y: Whether the y axis is logarithmic.
        round_ticks: Whether the x axis has ticks at round numbers, rather than one at every value.
        x_names: The names of the values 0, 1, 2, … on the x axis; empty if they are numbers.
    """

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    level: tuple[str, float] | None = None
    log_x: bool = False
    log_y: bool = False
    round_ticks: bool = False
    x_names: tuple[str, ...] = ()

    def tick(self, x: float) -> str:
        """What stands at a value of the x axis."""
        return self.x_names[int(x)] if self.x_names else f"{x:g}"


#: What a section consists of.
DocumentPart = Facts | Table | Lines


@dataclass(frozen=True)
class Section:
    """One subject of a report: a run, a sweep, an evaluation.

    Attributes:
        title: Its heading.
        lead: A paragraph below the heading; "" for none.
        parts: What is shown at once.
        details: What the page shows after a click.
        data: The figures for programs, as `plain_rows`.
    """

    title: str
    lead: str = ""
    parts: tuple[DocumentPart, ...] = ()
    details: tuple[DocumentPart, ...] = ()
    data: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Document:
    """A whole report, which shows itself in a notebook.

    Attributes:
        title: Its heading.
        sections: Its subjects, in order.
    """

    title: str
    sections: tuple[Section, ...] = ()

    def charts(self) -> list[Lines]:
        """All charts, in order."""
        parts = [part for x in self.sections for part in (*x.parts, *x.details)]
        return [part for part in parts if isinstance(part, Lines)]

    def _repr_html_(self) -> str:
        """The report in a notebook: facts and tables. Only the written page has charts."""
        shown = [f"<h1>{escape(self.title)}</h1>\n"]
        for section in self.sections:
            shown.append(f"<h2>{escape(section.title)}</h2>\n")
            shown += [f"<p>{escape(section.lead)}</p>\n"] if section.lead else []
            parts = (*section.parts, *section.details)
            shown += [part_html(part) for part in parts if isinstance(part, Facts | Table)]
        return _notebook("".join(shown))


def table_of(
    title: str,
    rows: Iterable[Mapping[str, Any]],
    forms: Mapping[str, str],
    note: str = "",
    total: Mapping[str, Any] | None = None,
    best: Mapping[str, Best] = MappingProxyType({}),
) -> Table:
    """A table from rows that map the title of a column to a value.

    A column without any value is left out.

    Args:
        title: Heading of the table.
        rows: The rows, in which titles may be missing.
        forms: Title of a column with figures -> their Python format.
        note: Lines of text below the table.
        total: A last row that sums up the others; None for none.
        best: Title of a column -> which of its figures is the best one.

    >>> rows = [{"model": "a", "bits": None}, {"model": "b", "bits": None, "GB": 1.5}]
    >>> table = table_of("Size", rows, {"GB": ".2f"})
    >>> table.columns, table.rows
    ((Column(title='model', form=None, best=None), Column(title='GB', form='.2f', best=None)),
     (('a', None), ('b', 1.5)))
    """
    rows = list(rows)
    every = [*rows, *([total] if total else [])]
    titles = [
        title
        for title in dict.fromkeys(title for row in every for title in row)
        if any(row.get(title) is not None for row in every)
    ]
    return Table(
        title,
        tuple(Column(title, forms.get(title), best.get(title)) for title in titles),
        tuple(tuple(map(row.get, titles)) for row in rows),
        note,
        tuple(map(total.get, titles)) if total else (),
    )


def items_of(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Pairs of names and values as text, for `Facts`; values that say nothing are left out.

    >>> items_of({"only": ("a", "b"), "method_options": {"power": 0.5}, "batch": None})
    (('only', 'a, b'), ('method_options', 'power 0.5'))
    """
    items = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = tuple(f"{name} {each}" for name, each in value.items())
        if value not in (None, ()):
            text = ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            items.append((key, text))
    return tuple(items)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The last part of each path or hub id, if these parts differ; else the whole names.

    >>> short_names(["runs/dense", "runs/pruned"])
    {'runs/dense': 'dense', 'runs/pruned': 'pruned'}
    >>> short_names(["a/model", "b/model"])
    {'a/model': 'a/model', 'b/model': 'b/model'}
    """
    names = list(names)
    short = {name: Path(name).name or name for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def text_of(value: Any, form: str | None) -> str:
    """Format a value for people.

    Args:
        value: A figure, a `Measured`, or text; None where it is missing.
        form: The Python format of figures; None writes them as they are.

    >>> text_of(1234.567, ",.2f")
    '1,234.57'
    >>> text_of(Measured(0.5, stderr=0.25), ".1%")
    '50.0% ± 25.0%'
    >>> text_of(Measured(0.5, stderr=None, seeds=1), ".1%")
    '50.0% (1 seed)'
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
        seeds = "" if value.seeds is None else f" ({counted(value.seeds, 'seed')})"
        return f"{text_of(value.value, form)}{error}{seeds}"
    return str(value) if form is None or isinstance(value, str) else format(value, form)


def plain(value: Any) -> Any:
    """A figure without its error; everything else stays as it is.

    >>> plain(Measured(0.5, 0.01, ".2%")), plain(0.5), plain(None)
    (0.5, 0.5, None)
    """
    return value.value if isinstance(value, Measured) else value


def plain_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Rows for programs: plain values under plain names, with errors in columns of their own.

    All rows have the same names. A column without any value is left out.

    Args:
        rows: The rows of a table, as `table_of` takes them.

    >>> plain_rows([{"model": "a", "KL divergence, c4": Measured(0.5, 0.01)}])
    ({'model': 'a', 'kl_divergence_c4': 0.5, 'kl_divergence_c4_stderr': 0.01},)
    """
    table = table_of("", rows, {})
    names: dict[str, bool] = {}
    for place, column in enumerate(table.columns):
        name = re.sub(r"[^\w.]+", "_", column.title.lower()).strip("_")
        # Titles that differ in punctuation alone stay apart.
        name = column.title if name in names else name
        errors = (getattr(row[place], "stderr", None) for row in table.rows)
        names[name] = any(error is not None for error in errors)
    plain_ones = []
    for row in table.rows:
        cells: dict[str, Any] = {}
        for (name, has_error), value in zip(names.items(), row, strict=True):
            cells[name] = plain(value)
            if has_error:
                cells[f"{name}_stderr"] = getattr(value, "stderr", None)
        plain_ones.append(cells)
    return tuple(plain_ones)


def part_html(part: Facts | Table) -> str:
    """Write facts or a table as HTML. All text is escaped: names come from files of others."""
    if isinstance(part, Facts):
        return _facts_html(part)
    heads = "".join(
        f'<th scope="col"{_number_class(column)}>{escape(column.title)}</th>'
        for column in part.columns
    )
    body = "".join(_row_html(row, part) + "\n" for row in part.rows)
    foot = f"<tfoot>{_row_html(part.total, part)}</tfoot>" if part.total else ""
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in part.note.splitlines())
    return (
        f"<div><h3>{escape(part.title)}</h3>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(part.title)}">'
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody>{foot}</table></div>"
        f"{notes}</div>\n"
    )


def _facts_html(facts: Facts) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items
    )
    if facts.headline:
        return f'<div><dl class="tiles">{items}</dl></div>\n'
    kind = "facts short" if all(len(value) <= _SHORT for _, value in facts.items) else "facts"
    return f'<div><h3>{escape(facts.title)}</h3><dl class="{kind}">{items}</dl></div>\n'


def _row_html(row: tuple[Any, ...], table: Table) -> str:
    cells = []
    for value, column in zip(row, table.columns, strict=True):
        figure = plain(value)
        raw = "" if figure is None else f' data-value="{escape(str(figure))}"'
        text = escape(text_of(value, column.form))
        cells.append(f"<td{_number_class(column)}{raw}>{text}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _number_class(column: Column) -> str:
    return "" if column.form is None else ' class="number"'


def _notebook(html: str) -> str:
    return f'{_NOTEBOOK_STYLE}<div class="prunus">{html}</div>'
