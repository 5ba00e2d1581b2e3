"""A result as a table in a notebook, which asks objects for their HTML by `_repr_html_`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["html_table"]


def html_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
) -> str:
    """Write a table as HTML. All text is escaped: names come from files of others.

    Args:
        title: stands above the table.
        columns: their titles. The first column holds names and is aligned to the left.
        rows: as many values as columns; None is an empty field.
        note: stands below the table.

    >>> html_table("a < b", ["name"], [["<x>"]])
    '<table><caption>a &lt; b</caption><thead><tr><th style="text-align: left">name</th></tr>\
</thead><tbody><tr><td style="text-align: left">&lt;x&gt;</td></tr></tbody></table>'
    """

    def row(values: Sequence[object], tag: str) -> str:
        cells = []
        for place, value in enumerate(values):
            align = "right" if place else "left"
            text = "" if value is None else escape(str(value))
            cells.append(f'<{tag} style="text-align: {align}">{text}</{tag}>')
        return f"<tr>{''.join(cells)}</tr>"

    below = f"<p>{escape(note)}</p>" if note else ""
    body = "".join(row(values, "td") for values in rows)
    return (
        f"<table><caption>{escape(title)}</caption><thead>{row(columns, 'th')}</thead>"
        f"<tbody>{body}</tbody></table>{below}"
    )
