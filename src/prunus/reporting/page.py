"""A document as one self-contained HTML page: markup, style, scripts and the plotting library.

All text is escaped. In addition, a content security policy forbids every request and every script
except the two of the page, which it identifies by their hashes. A name that slipped through
unescaped could therefore neither run nor fetch anything.

The plotting library is plotly.js 4.1.1, its bundle of cartesian charts as its authors publish it
(MIT licence, next to it in `assets/`). The page holds it compressed, in a third of its size, and
page.js expands it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from html import escape
from importlib.metadata import version
from importlib.resources import files
from string import Template
from typing import Any

from prunus.reporting.figures import figure_json
from prunus.runs.document import Chart, Document, Facts, Part, Section, Table, part_html

_LIBRARY = "plotly-cartesian.min.js.gz"


def to_html(document: Document) -> str:
    """Write a document as an HTML page."""
    has_charts = any(
        isinstance(part, Chart)
        for section in document.sections
        for part in (*section.parts, *section.details)
    )
    library = _asset_bytes(_LIBRARY) if has_charts else b""
    allowed = [_asset("page.js").encode(), *([gzip.decompress(library)] if library else [])]
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
    every = (*section.parts, *section.details)
    html = [_part(part, f"part-{number}-{place}") for place, part in enumerate(every)]
    shown, folded = "".join(html[: len(section.parts)]), "".join(html[len(section.parts) :])
    details = f"<details><summary>All figures</summary>\n{folded}</details>\n" if folded else ""
    return (
        f'<section id="section-{number}" aria-labelledby="{name}"'
        f"{' class=alone' if alone else ''}>\n"
        f"{title}{lead}{shown}{details}</section>\n"
    )


def _part(part: Part, name: str) -> str:
    if isinstance(part, Facts | Table):
        return part_html(part)
    # Only "<" could end the script element that holds the JSON. JSON can write it as an escape.
    content = figure_json(part).replace("<", "\\u003c")
    return (
        f"<figure><h3>{escape(part.title)}</h3>"
        f'<div class="chart" id="{name}" role="img" aria-label="{escape(part.title)}"></div>'
        f'<script type="application/json" id="{name}-figure">{content}</script></figure>\n'
    )


def document_json(document: Document) -> Any:
    """Turn a document into what JSON can hold: dictionaries, lists, text and numbers."""
    return json.loads(json.dumps(document, default=vars))
