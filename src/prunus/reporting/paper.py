"""A document for papers and for programs: its tables as LaTeX, and all its figures as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from prunus.document import Column, Document, Measured, Table, plain, table_of, text_of
from prunus.evaluation.eval_records import FORMS
from prunus.reporting.console import cells, printable
from prunus.sweeping.results import DENSE

# What LaTeX obeys, or has in no font that every paper loads -> how it is written.
_SPECIAL = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"±": r"$\pm$", "−": "$-$", "×": r"$\times$", "–": "--", "→": r"$\to$", "≥": r"$\geq$"},
    **{"‖": r"$\Vert$", "²": r"$^2$", "Σ": r"$\Sigma$", "ŵ": r"$\hat{w}$", "’": "'"},
}
# The begin of a text that spreadsheets take for a formula. A number with a sign is none.
_FORMULA = re.compile(r"[=@\t\r\n]|[+-](?!(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$)")
# Digits of a perplexity that mean something.
_DIGITS = 5
# Text that pdflatex sets with the fonts of every document: ASCII, and the letters of Latin-1.
_PLAIN = re.compile(r"[\n -~À-ÏÑ-ÝßÀ-ïñ-ýÿ]")


def to_csv(document: Document) -> str:
    """Write the figures of all sections as one table, in full precision.

    A row is a cell of a sweep, a model of an evaluation, or a linear of a run. The first columns
    say what it is. A value that was not measured is empty. A text that a spreadsheet would take for
    a formula has an apostrophe in front.

    Raises:
        ValueError: The document has no figures.
    """
    table = table_of("", [row for section in document.sections for row in section.data], {})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_no_formula(column.title) for column in table.columns)
    writer.writerows(map(_no_formula, row) for row in table.rows)
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    """A value of a CSV file, so that spreadsheets take no text for a formula.

    >>> [_no_formula(x) for x in ("=1+1", "-x", "-1.5e-3", -1.5, "a=b")]
    ["'=1+1", "'-x", '-1.5e-3', -1.5, 'a=b']
    """
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def to_latex(document: Document) -> str:
    """Write the tables that compare results as LaTeX with booktabs, the best figures in bold.

    A section in which nothing is compared, such as that of a run, has all its first tables. Rows of
    dense models do not compete.
    """
    lines = [
        f"% Written by prunus report, prunus {version('prunus')}.",
        r"% The preamble needs \usepackage{booktabs}.",
    ]
    labels: Counter[str] = Counter()
    for section in document.sections:
        tables = [x for x in (*section.parts, *section.details) if isinstance(x, Table)]
        compared = [x for x in tables if any(column.best for column in x.columns)]
        for table in compared or [x for x in section.parts if isinstance(x, Table)]:
            label = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-") or "table"
            labels[label] += 1
            number = f"-{labels[label]}" if labels[label] > 1 else ""
            lines += ["", *_latex_table(table, f"tab:{label}{number}")]
    return "\n".join(lines) + "\n"


def _latex_table(table: Table, label: str) -> list[str]:
    rows = []
    winners = _winners(table)
    for row in (*table.rows, *([table.total] if table.total else [])):
        rounded = tuple(map(_rounded, row, table.columns))
        shown = [_escaped(text) for text in cells(rounded, table)]
        for place, (winner, column) in enumerate(zip(winners, table.columns, strict=True)):
            figure = plain(row[place])
            competes = row[0] != DENSE and figure not in (None, column.unit)
            if competes and text_of(plain(rounded[place]), column.form) == winner:
                shown[place] = rf"\textbf{{{shown[place]}}}"
        rows.append(_latex_row(shown))
        rows += [r"    \midrule"] if row[0] == DENSE else []
    if table.total:
        rows.insert(-1, r"    \midrule")
    caption = " ".join([f"{table.title}.", *table.note.split()])
    sides = "".join("l" if column.form is None else "r" for column in table.columns)
    heads = _latex_row([_escaped(column.title) for column in table.columns])
    return [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_escaped(caption)}}}",
        rf"  \label{{{label}}}",
        rf"  \begin{{tabular}}{{{sides}}}",
        r"    \toprule",
        heads,
        r"    \midrule",
        *rows,
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]


def _latex_row(shown: Sequence[str]) -> str:
    """A row of LaTeX. A row that began with [ or * would be an argument of the line before it."""
    text = " & ".join(shown)
    return rf"    {'{}' if text.lstrip().startswith(('[', '*')) else ''}{text} \\"


def _rounded(value: Any, column: Column) -> Any:
    """A value with at most five significant digits, if its column holds perplexities or sizes.

    >>> perplexity = Column("perplexity", ",.3f")
    >>> [text_of(_rounded(x, perplexity), ",.3f") for x in (7.26123, 99.9996, 522.0249, 123456.7)]
    ['7.261', '100.00', '522.02', '123,460']
    """
    figure = plain(value)
    if column.form != FORMS["perplexity"] or not isinstance(figure, int | float):
        return value
    places = _DIGITS - 1 - int(f"{figure:.{_DIGITS - 1}e}".partition("e")[2])
    measured = value if isinstance(value, Measured) else Measured(figure, None)
    form = f",.{min(3, max(0, places))}f"
    return replace(measured, value=round(figure, places), form=form)


def _winners(table: Table) -> list[str | None]:
    """The best figure of each column as text, so that all that look the same win; None for none."""
    winners: list[str | None] = []
    for place, column in enumerate(table.columns):
        figures = [plain(_rounded(row[place], column)) for row in table.rows if row[0] != DENSE]
        known = [figure for figure in figures if figure is not None]
        chosen = min if column.best == "lowest" else max
        compared = column.best is not None and len(known) > 1
        winners.append(text_of(chosen(known), column.form) if compared else None)
    return winners


def _escaped(text: str) -> str:
    """Text for LaTeX. A character that its usual fonts lack is written by its number.

    >>> _escaped("50% ± 1, a_b {x} 中")
    '50\\\\% $\\\\pm$ 1, a\\\\_b \\\\{x\\\\} \\\\texttt{U+4E2D}'
    """
    letters = (
        _SPECIAL.get(letter)
        or (letter if _PLAIN.match(letter) else rf"\texttt{{U+{ord(letter):04X}}}")
        for letter in printable(text)
    )
    return "".join(letters)
