"""A document as Markdown, or as one self-contained HTML page with style, scripts and charts.

All text is escaped. In addition, a content security policy forbids every request and every script
except the two of the page, which it identifies by their hashes. A name that slipped through
unescaped could therefore neither run nor fetch anything.

The plotting library is plotly.js 4.1.1, its bundle of cartesian charts as its authors publish it
(MIT licence, next to it in `assets/`). The page holds it compressed, in a third of its size, and
page.js expands it. Charts are figures of plotly, written as JSON. The page owns the colours: a
trace names its part of the palette in `meta`, and page.js fills in the colour for the light or the
dark scheme. Plotly interprets some HTML in its texts, so these are escaped too.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html import escape
from importlib.metadata import version
from importlib.resources import files
from string import Template
from typing import Any

from prunus.document import (
    Document,
    DocumentPart,
    Facts,
    Lines,
    Section,
    Table,
    part_html,
)
from prunus.reporting.console import cells, printable

# Characters that Markdown obeys.
_MARKUP = re.compile(r"([\\`*_\[\]<>|])")
_LIBRARY = "plotly-cartesian.min.js.gz"
# Lines differ in their symbols and dashes as well: colours alone are not told apart by everybody.
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "hexagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def to_html(document: Document) -> str:
    """Write a document as one HTML page, which needs no other file and no network.

    The plotting library is in the page only if the document has charts. It takes 0.7 MB there.
    """
    library = _asset(_LIBRARY) if document.charts() else b""
    page_script = _asset("page.js")
    # No browser runs the compressed library before page.js has expanded it.
    text = base64.b64encode(library).decode()
    plotting = f'<script type="application/gzip" id="plotly">{text}</script>\n' if text else ""
    allowed = [page_script, *([gzip.decompress(library)] if library else [])]
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
    sections = [
        # The title of the page is the heading of the section that it is named after.
        _section(section, number, section.title == document.title)
        for number, section in enumerate(document.sections)
    ]
    items = "".join(
        f'<li><a href="#section-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(document.sections)
    )
    contents = f'<nav aria-label="Sections"><ul>{items}</ul></nav>\n'
    return Template(_asset("page.html").decode()).substitute(
        policy=escape(policy),
        title=escape(document.title),
        style=_asset("page.css").decode(),
        contents=contents if len(sections) > 1 else "",
        sections="".join(sections),
        version=escape(version("prunus")),
        scripts=f"{plotting}<script>{page_script.decode()}</script>\n",
    )


def _asset(name: str) -> bytes:
    return files("prunus.reporting").joinpath("assets", name).read_bytes()


def _sha256(script: bytes) -> str:
    return base64.b64encode(hashlib.sha256(script).digest()).decode()


def _section(section: Section, number: int, alone: bool) -> str:
    title = "" if alone else f'<h2 id="title-{number}">{escape(section.title)}</h2>\n'
    name = "title" if alone else f"title-{number}"
    lead = f'<p class="lead">{escape(section.lead)}</p>\n' if section.lead else ""
    every = (*section.parts, *section.details)
    html = [_part(part, f"part-{number}-{index}") for index, part in enumerate(every)]
    shown = "".join(html[: len(section.parts)])
    folded = "".join(html[len(section.parts) :])
    details = f"<details><summary>All figures</summary>\n{folded}</details>\n" if folded else ""
    return (
        f'<section id="section-{number}" aria-labelledby="{name}"'
        f"{' class=alone' if alone else ''}>\n"
        f"{title}{lead}{shown}{details}</section>\n"
    )


def _part(part: DocumentPart, name: str) -> str:
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


def figure_json(chart: Lines) -> str:
    """Write a chart as the JSON of a plotly figure.

    Raises:
        ValueError: A value is NaN or infinite, which JSON does not have.
    """
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "x": list(series.x),
            "y": list(series.y),
            "name": escape(series.name),
            "mode": "lines+markers",
            "marker": {"symbol": _SYMBOLS[position % len(_SYMBOLS)], "size": 8},
            "line": {"dash": _DASHES[position % len(_DASHES)], "width": 2},
            "error_y": {"type": "data", "array": list(series.error), "visible": any(series.error)},
            "hovertext": [escape(text) for text in series.hover],
            "hoverinfo": "text",
            "meta": {"colour": position},
        }
        for position, series in enumerate(chart.series)
    ]
    measured = sorted({x for series in chart.series for x in series.x})
    if chart.level is not None:
        name, level = chart.level
        traces.append(
            {
                "type": "scatter",
                "x": [measured[0], measured[-1]],
                "y": [level, level],
                "name": f"{escape(name)} {level:,.2f}",
                "mode": "lines",
                "line": {"dash": "dot", "width": 1.5},
                "hovertext": [f"{escape(name)}: {level:,.3f}"] * 2,
                "hoverinfo": "text",
                "meta": {"colour": "level"},
            }
        )
    x_axis: dict[str, Any] = {"title": {"text": escape(chart.x_title)}}
    x_axis["type"] = "log" if chart.log_x else "linear"
    if not chart.round_ticks:
        x_axis |= {"tickvals": measured, "ticktext": [escape(chart.tick(x)) for x in measured]}
    y_axis: dict[str, Any] = {"title": {"text": escape(chart.y_title)}}
    if chart.log_y:
        y_axis["title"]["text"] += " (logarithmic)"
        # "D2" puts ticks at 1, 2 and 5 of each decade; more would overlap in a narrow window.
        y_axis |= {"type": "log", "tickformat": ",~g", "dtick": "D2"}
    layout = {"xaxis": x_axis, "yaxis": y_axis, "height": 360}
    return json.dumps({"data": traces, "layout": layout}, allow_nan=False)


def to_markdown(document: Document) -> str:
    """Write a document as Markdown. Names and other text are escaped.

    >>> from prunus.document import Column
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
    lines = [f"# {_marked(document.title)}", ""]
    for section in document.sections:
        lines += [f"## {_marked(section.title)}", ""]
        lines += [_marked(section.lead), ""] if section.lead else []
        for part in (*section.parts, *section.details):
            if isinstance(part, Facts):
                lines += _markdown_facts(part)
            elif isinstance(part, Table):
                lines += _markdown_table(part)
    lines.append(f"*Written by `prunus report`, prunus {version('prunus')}.*")
    return "\n".join(lines) + "\n"


def _markdown_facts(facts: Facts) -> list[str]:
    if facts.headline:
        return [
            " · ".join(f"{_marked(name)}: **{_marked(value)}**" for name, value in facts.items),
            "",
        ]
    listed = "; ".join(f"{_marked(name)}: {_marked(value)}" for name, value in facts.items)
    return [f"{_marked(facts.title)}: {listed}.", ""]


def _markdown_table(part: Table) -> list[str]:
    rows = [
        [column.title for column in part.columns],
        *(cells(row, part) for row in (*part.rows, *([part.total] if part.total else []))),
    ]
    head, *lines = (f"| {' | '.join(map(_marked, row))} |" for row in rows)
    sides = " | ".join("---" if column.form is None else "---:" for column in part.columns)
    notes = [line for note in part.note.splitlines() for line in (_marked(note), "")]
    return [f"### {_marked(part.title)}", "", head, f"| {sides} |", *lines, "", *notes]


def _marked(text: str) -> str:
    return _MARKUP.sub(r"\\\1", printable(" ".join(text.split())))
