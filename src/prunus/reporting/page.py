"""A document as one self-contained HTML page: markup, style, scripts and the plotting library.

All text is escaped. In addition, a content security policy forbids every request and every script
except the two of the page, which it identifies by their hashes. A name that slipped through
unescaped could therefore neither run nor fetch anything.

The plotting library is plotly.js 4.1.1, its bundle of cartesian charts as its authors publish it
(MIT licence, beside it in `assets/`). The page holds it compressed, in a third of its size, and
page.js expands it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from dataclasses import replace
from html import escape
from importlib.metadata import version
from importlib.resources import files
from string import Template
from typing import Any

from prunus.reporting.document import Chart, Document, Facts, Measured, Section, Table, text_of
from prunus.reporting.figures import figure_json

__all__ = ["document_json", "sections_html", "to_html"]

_LIBRARY = "plotly-cartesian.min.js.gz"
#: Values of at most this many characters stand several in a row.
_SHORT = 28


def to_html(document: Document) -> str:
    """Write a document as an HTML page.

    Raises:
        ModuleNotFoundError: the document has charts, and plotly is not installed.
    """
    charts = [
        part for section in document.sections for part in section.parts if isinstance(part, Chart)
    ]
    library = _asset_bytes(_LIBRARY) if charts else b""
    allowed = [_asset("page.js").encode(), *([gzip.decompress(library)] if charts else [])]
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data: blob:",
            "style-src 'unsafe-inline'",  # plotly writes its own style rules
            "script-src " + " ".join(f"'sha256-{_sha256(script)}'" for script in allowed),
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    # A page with one section shows its title at the top, so the section needs no heading.
    alone = [section.title for section in document.sections] == [document.title]
    sections = [
        _section(section, number, alone) for number, section in enumerate(document.sections)
    ]
    return Template(_asset("page.html")).substitute(
        policy=escape(policy),
        title=escape(document.title),
        style=_asset("page.css"),
        contents=_contents(document),
        sections="".join(sections),
        version=escape(version("prunus")),
        scripts=_library(library) + f"<script>{_asset('page.js')}</script>\n",
    )


def sections_html(document: Document) -> str:
    """Write facts and tables of a document as HTML without style, scripts and charts."""
    shown = (
        replace(
            section, parts=tuple(part for part in section.parts if isinstance(part, Facts | Table))
        )
        for section in document.sections
    )
    body = "".join(_section(section, number, False) for number, section in enumerate(shown))
    return f"<h1>{escape(document.title)}</h1>\n{body}"


def _asset(name: str) -> str:
    return _asset_bytes(name).decode()


def _asset_bytes(name: str) -> bytes:
    return files("prunus.reporting").joinpath("assets", name).read_bytes()


def _library(compressed: bytes) -> str:
    """The plotting library as text that no browser runs before page.js has expanded it."""
    if not compressed:
        return ""
    text = base64.b64encode(compressed).decode()
    return f'<script type="application/gzip" id="plotly">{text}</script>\n'


def _sha256(script: bytes) -> str:
    return base64.b64encode(hashlib.sha256(script).digest()).decode()


def _contents(document: Document) -> str:
    if len(document.sections) < 2:
        return ""
    items = (
        f'<li><a href="#section-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(document.sections)
    )
    return f'<nav aria-label="Sections"><ul>{"".join(items)}</ul></nav>\n'


def _section(section: Section, number: int, alone: bool) -> str:
    title = "" if alone else f'<h2 id="title-{number}">{escape(section.title)}</h2>\n'
    name = "title" if alone else f"title-{number}"
    lead = f'<p class="lead">{escape(section.lead)}</p>\n' if section.lead else ""
    parts = (
        _part(part, f"part-{number}-{position}") for position, part in enumerate(section.parts)
    )
    return (
        f'<section id="section-{number}" aria-labelledby="{name}"'
        f"{' class=alone' if alone else ''}>\n"
        f"{title}{lead}{''.join(parts)}</section>\n"
    )


def _part(part: Facts | Table | Chart, name: str) -> str:
    if isinstance(part, Facts):
        return _facts(part)
    if isinstance(part, Table):
        return _table(part)
    return _chart(part, name)


def _facts(facts: Facts) -> str:
    if facts.headline:
        items = (
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, value in facts.items
        )
        return f'<div><dl class="tiles">{"".join(items)}</dl></div>\n'
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items
    )
    kind = "facts short" if all(len(value) <= _SHORT for _, value in facts.items) else "facts"
    return f'<div><h3>{escape(facts.title)}</h3><dl class="{kind}">{"".join(items)}</dl></div>\n'


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_number_class(column.is_number)}>'
        f'<button type="button">{escape(column.title)}</button></th>'
        for column in table.columns
    )
    rows = "".join(
        "<tr>"
        + "".join(
            _cell(value, column.form) for value, column in zip(row, table.columns, strict=True)
        )
        + "</tr>\n"
        for row in table.rows
    )
    box = (
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(table.title)}">'
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    if table.folded:
        return f"<details><summary>{escape(table.title)}</summary>{box}{note}</details>\n"
    return f"<div><h3>{escape(table.title)}</h3>{box}{note}</div>\n"


def _cell(value: Any, form: str | None) -> str:
    plain = value.value if isinstance(value, Measured) else value
    raw = "" if plain is None else f' data-value="{escape(str(plain))}"'
    return f"<td{_number_class(form is not None)}{raw}>{escape(text_of(value, form))}</td>"


def _number_class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _chart(chart: Chart, name: str) -> str:
    # Only "<" could end the script element that holds the JSON. JSON can write it as an escape.
    content = figure_json(chart).replace("<", "\\u003c")
    return (
        f"<figure><h3>{escape(chart.title)}</h3>"
        f'<div class="chart" id="{name}" role="img" aria-label="{escape(chart.title)}"></div>'
        f'<script type="application/json" id="{name}-figure">{content}</script>' + "</figure>\n"
    )


def document_json(document: Document) -> Any:
    """Turn a document into what JSON can hold: dictionaries, lists, text and numbers."""
    return json.loads(json.dumps(document, default=vars))
