"""A document as tables for the terminal, or as Markdown.

Both leave charts out: the figures of every chart stand in a table as well.
"""

from __future__ import annotations

import re
from importlib.metadata import version

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from prunus.reporting.console import printable
from prunus.reporting.document import Document, Facts, Table, text_of

__all__ = ["to_markdown", "to_terminal"]

# Names of rows up to this width stay on one line, so that they can be copied.
_NAME_WIDTH = 32
_MARKUP = re.compile(r"([\\`*_\[\]<>|])")


def to_terminal(document: Document) -> Group:
    """Turn a document into what rich's console can print. Text is never read as markup.

    Show it on a `TerminalConsole`, which escapes control characters.
    """
    shown: list[RenderableType] = []
    for section in document.sections:
        shown.append(_text(section.title, style="bold"))
        if section.lead:
            shown.append(_text(section.lead))
        for part in section.parts:
            if isinstance(part, Facts):
                shown += [Text(), _facts(part)]
            elif isinstance(part, Table):
                shown += [
                    Text(),
                    _table(part),
                    *([_text(part.note, style="italic")] if part.note else []),
                ]
        shown.append(Text())
    return Group(*shown)


def to_markdown(document: Document) -> str:
    """Write a document as Markdown. Names and other text are escaped.

    >>> from prunus.reporting.document import Column, Section
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
        for part in section.parts:
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
    # The first column names the rows. Where a table is too wide, other columns are folded first.
    names = [len(text_of(row[0], part.columns[0].form)) for row in part.rows]
    widths = [min(max(names, default=0), _NAME_WIDTH), *[None] * (len(part.columns) - 1)]
    for column, min_width in zip(part.columns, widths, strict=True):
        table.add_column(
            _text(column.title),
            justify="right" if column.is_number else "left",
            overflow="fold",
            min_width=min_width,
        )
    for row in part.rows:
        cells = zip(row, part.columns, strict=True)
        table.add_row(*(_text(text_of(value, column.form)) for value, column in cells))
    return table


def _markdown_facts(facts: Facts) -> list[str]:
    if facts.headline:
        return [
            " · ".join(f"{_escape(name)}: **{_escape(value)}**" for name, value in facts.items),
            "",
        ]
    listed = "; ".join(f"{_escape(name)}: {_escape(value)}" for name, value in facts.items)
    return [f"{_escape(facts.title)}: {listed}.", ""]


def _markdown_table(part: Table) -> list[str]:
    lines = [f"### {_escape(part.title)}", ""]
    lines.append("| " + " | ".join(_escape(column.title) for column in part.columns) + " |")
    lines.append(
        "| " + " | ".join("---:" if column.is_number else "---" for column in part.columns) + " |"
    )
    for row in part.rows:
        cells = zip(row, part.columns, strict=True)
        lines.append(
            "| "
            + " | ".join(_escape(text_of(value, column.form)) for value, column in cells)
            + " |"
        )
    return [*lines, "", *([_escape(part.note), ""] if part.note else [])]


def _escape(text: str) -> str:
    return _MARKUP.sub(r"\\\1", printable(" ".join(text.split())))
