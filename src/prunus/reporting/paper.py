"""A document for papers and for programs: its tables as LaTeX, and all its figures as CSV."""

from __future__ import annotations

import csv
import io
import re
from importlib.metadata import version

from prunus.document import Document, Table, plain, table_of, text_of
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
# Text that pdflatex sets with the fonts of every document: ASCII, and the letters of Latin-1.
_PLAIN = re.compile(r"[\n -~À-ÏÑ-ÝßÀ-ïñ-ýÿ]")


def to_csv(document: Document) -> str:
    """Write the figures of all sections as one table, in full precision.

    A row is a cell of a sweep, a model of an evaluation, or a linear of a run. The first columns
    say what it is. A value that was not measured is empty.

    Raises:
        ValueError: The document has no figures.
    """
    table = table_of("", [row for section in document.sections for row in section.data], {})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.title for column in table.columns)
    writer.writerows(table.rows)
    return text.getvalue()


def to_latex(document: Document) -> str:
    """Write the tables that compare results as LaTeX with booktabs, the best figures in bold.

    A section in which nothing is compared, such as that of a run, has all its first tables. Rows of
    dense models do not compete.
    """
    lines = [
        f"% Written by prunus report, prunus {version('prunus')}.",
        r"% The preamble needs \usepackage{booktabs}.",
    ]
    for section in document.sections:
        tables = [x for x in (*section.parts, *section.details) if isinstance(x, Table)]
        compared = [x for x in tables if any(column.best for column in x.columns)]
        for table in compared or [x for x in section.parts if isinstance(x, Table)]:
            lines += ["", *_latex_table(table)]
    return "\n".join(lines) + "\n"


def _latex_table(table: Table) -> list[str]:
    rows = []
    winners = _winners(table)
    for row in (*table.rows, *([table.total] if table.total else [])):
        shown = [_escaped(text) for text in cells(row, table)]
        for place, winner in enumerate(winners):
            competes = row[0] != DENSE and plain(row[place]) is not None
            if competes and text_of(plain(row[place]), table.columns[place].form) == winner:
                shown[place] = rf"\textbf{{{shown[place]}}}"
        rows.append(rf"    {' & '.join(shown)} \\")
        rows += [r"    \midrule"] if row[0] == DENSE else []
    if table.total:
        rows.insert(-1, r"    \midrule")
    caption = " ".join([f"{table.title}.", *table.note.split()])
    sides = "".join("l" if column.form is None else "r" for column in table.columns)
    heads = " & ".join(_escaped(column.title) for column in table.columns)
    return [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_escaped(caption)}}}",
        rf"  \begin{{tabular}}{{{sides}}}",
        r"    \toprule",
        rf"    {heads} \\",
        r"    \midrule",
        *rows,
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]


def _winners(table: Table) -> list[str | None]:
    """The best figure of each column as text, so that all that look the same win; None for none."""
    winners: list[str | None] = []
    for place, column in enumerate(table.columns):
        figures = [plain(row[place]) for row in table.rows if row[0] != DENSE]
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
