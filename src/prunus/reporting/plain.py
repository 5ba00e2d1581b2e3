"""A document as tables for the terminal, or as Markdown.

Both leave charts out: the figures of every chart are in a table as well.
"""

from __future__ import annotations

import re
from importlib.metadata import version

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from prunus.reporting.console import printable
from prunus.runs.document import Document, Facts, Part, Section, Table, text_of

# Names of rows up to this width stay on one line, so that they can be copied.
_NAME_WIDTH = 32
_MARKUP = re.compile(r"([\\`*_\[\]<>|])")


def to_terminal(*shown: Document | Section | Part) -> Group:
    """Turn a document, or parts of one, into what rich's console can print.

    Show it on a `TerminalConsole`, which escapes control characters. Text is never read as markup.
    """
    lines: list[RenderableType] = []
    for part in shown:
        if isinstance(part, Document):
            lines.append(to_terminal(*part.sections))
        elif isinstance(part, Section):
            lines.append(_text(part.title, style="bold"))
            lines += [_text(part.lead)] if part.lead else []
            lines += [Text(), to_terminal(*part.parts, *part.details)]
        elif isinstance(part, Facts):
            lines += [_facts(part), Text()]
        elif isinstance(part, Table):
            lines += [_table(part), *([_text(part.note)] if part.note else []), Text()]
    return Group(*lines)


def to_markdown(document: Document) -> str:
    """Write a document as Markdown. Names and other text are escaped.

    >>> from prunus.runs.document import Column
    >>> columns = (Column("method"), Column("perplexity", ".2f"))
    >>> table = Table("Quality", columns, (("wanda", 7.261), ("dense", 5.68)))
    >>> print(to_markdown(Document("My *runs*", (Section("A sweep", parts=(table,)),))))
    ... # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
    # My \\*runs\\*
    <BLANKLINE>
    ## A sweep
    <BLANKLINE>
    ### Quality
    <BLANKLINE>
    | method | perplexity |
    | --- | ---: |
    | wanda | 7.26 |
    | dense | 5.68 |
    <BLANKLINE>
    *Written by `prunus report`, prunus ...*
    <BLANKLINE>
    """
    lines = [f"# {_escape(document.title)}", ""]
    for section in document.sections:
        lines += [f"## {_escape(section.title)}", ""]
        lines += [_escape(section.lead), ""] if section.lead else []
        for part in (*section.parts, *section.details):
            if isinstance(part, Facts):
                lines += _markdown_facts(part)
            elif isinstance(part, Table):
                lines += _markdown_table(part)
    lines.append(f"*Written by `prunus report`, prunus {version('prunus')}.*")
    return "\n".join(lines) + "\n"


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style)


def _facts(facts: Facts) -> RichTable:
    table = RichTable(title=_text(facts.title), title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items:
        table.add_row(_text(name), _text(value))
    return table


def _table(part: Table) -> RichTable:
    table = RichTable(title=_text(part.title), title_justify="left")
    rows = [_cells(row, part) for row in (*part.rows, *([part.total] if part.total else []))]
    # The first column names the rows. Where a table is too wide, other columns are folded first.
    widest = max((len(row[0]) for row in rows), default=0)
    for place, column in enumerate(part.columns):
        table.add_column(
            _text(column.title),
            justify="left" if column.form is None else "right",
            overflow="fold",
            min_width=None if place else min(widest, _NAME_WIDTH),
        )
    for place, row in enumerate(rows):
        if place == len(part.rows):
            table.add_section()
        table.add_row(*map(_text, row))
    return table


def _cells(row: tuple[object, ...], part: Table) -> list[str]:
    return [text_of(value, column.form) for value, column in zip(row, part.columns, strict=True)]


def _markdown_facts(facts: Facts) -> list[str]:
    if facts.headline:
        return [
            " · ".join(f"{_escape(name)}: **{_escape(value)}**" for name, value in facts.items),
            "",
        ]
    listed = "; ".join(f"{_escape(name)}: {_escape(value)}" for name, value in facts.items)
    return [f"{_escape(facts.title)}: {listed}.", ""]


def _markdown_table(part: Table) -> list[str]:
    rows = [
        [column.title for column in part.columns],
        *(_cells(row, part) for row in (*part.rows, *([part.total] if part.total else []))),
    ]
    head, *lines = (f"| {' | '.join(map(_escape, row))} |" for row in rows)
    sides = " | ".join("---" if column.form is None else "---:" for column in part.columns)
    notes = [line for note in part.note.splitlines() for line in (_escape(note), "")]
    return [f"### {_escape(part.title)}", "", head, f"| {sides} |", *lines, "", *notes]


def _escape(text: str) -> str:
    return _MARKUP.sub(r"\\\1", printable(" ".join(text.split())))
