"""Charts as figures of plotly, written as JSON for the page. Nothing of plotly is needed for it.

The page owns the colours. A trace names its part of the palette in `meta`, and page.js fills in the
colour for the light or the dark scheme. Plotly interprets some HTML in its texts, so every text is
escaped. The JavaScript that draws the figures is `assets/plotly-cartesian.min.js.gz`.
"""

from __future__ import annotations

import html
import json
import math
from typing import Any

from prunus.runs.document import Chart, HeatMap, Lines, text_of

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "hexagon")
#: Shift between two series at one category, as a share of the distance between categories.
_SHIFT = 0.05
#: Room for labels at both ends of an axis, as a share of its length.
_LABEL_ROOM = 0.15
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def figure_json(chart: Chart) -> str:
    """Write a chart as the JSON of a plotly figure."""
    figure = _lines(chart) if isinstance(chart, Lines) else _heat_map(chart)
    return json.dumps(figure, allow_nan=False)


def _lines(chart: Lines) -> dict[str, Any]:
    """Draw lines over numbers, or unconnected markers over categories.

    Categories are at 0, 1, 2, …; each series is shifted a little, so that markers do not overlap.
    """
    places = {name: place for place, name in enumerate(chart.categories)}
    traces: list[dict[str, Any]] = []
    for position, series in enumerate(chart.series):
        shift = _SHIFT * (position - (len(chart.series) - 1) / 2)
        trace = {
            "type": "scatter",
            "x": [places[x] + shift if places else x for x in series.x],
            "y": list(series.y),
            "name": html.escape(series.name),
            "mode": "markers" if places else "lines+markers",
            "marker": {"symbol": _SYMBOLS[position % len(_SYMBOLS)], "size": 11 if places else 8},
            "line": {"dash": _DASHES[position % len(_DASHES)], "width": 2},
            "hovertext": [html.escape(text) for text in series.hover],
            "hoverinfo": "text",
            "meta": {"colour": position},
        }
        traces.append(trace | (_labels(chart, position) if chart.labelled else {}))
    values = [y for series in chart.series for y in series.y]
    measured = sorted({x for series in chart.series for x in series.x}) if not places else []
    if chart.level is not None:
        name, level = chart.level
        values.append(level)
        ends = [-0.4, len(places) - 0.6] if places else [measured[0], measured[-1]]
        traces.append(
            {
                "type": "scatter",
                "x": ends,
                "y": [level, level],
                "name": f"{html.escape(name)} {level:,.2f}",
                "mode": "lines",
                "line": {"dash": "dot", "width": 1.5},
                "hovertext": [f"{html.escape(name)}: {level:,.3f}"] * 2,
                "hoverinfo": "text",
                "meta": {"colour": "level"},
            }
        )
    x_axis: dict[str, Any] = {"title": {"text": html.escape(chart.x_title)}}
    if places:
        names = [html.escape(name) for name in places]
        x_axis |= {
            "tickvals": list(places.values()),
            "ticktext": names,
            "range": [-0.4, len(names) - 0.6],
        }
    else:
        ticks = [f"{x:g}" for x in measured]
        x_axis |= {"type": "log" if chart.log_x else "linear"}
        if not chart.round_ticks:
            x_axis |= {"tickvals": measured, "ticktext": ticks}
        if chart.labelled:
            room = _LABEL_ROOM * (measured[-1] - measured[0])
            x_axis["range"] = [measured[0] - room, measured[-1] + room]
    y_axis: dict[str, Any] = {"title": {"text": html.escape(chart.y_title)}}
    if chart.log_y:
        y_axis["title"]["text"] += " (logarithmic)"
        y_axis |= {"type": "log", **_log_ticks(min(values), max(values))}
    return {"data": traces, "layout": {"xaxis": x_axis, "yaxis": y_axis, "height": 420}}


def _labels(chart: Lines, position: int) -> dict[str, Any]:
    """The names of single points next to them, every other one below, so that they overlap less."""
    order = sorted(range(len(chart.series)), key=lambda place: chart.series[place].x)
    place = "top center" if order.index(position) % 2 == 0 else "bottom center"
    return {
        "mode": "markers+text",
        "text": [html.escape(chart.series[position].name)] * len(chart.series[position].x),
        "textposition": place,
        "cliponaxis": False,
        "showlegend": False,
    }


def _heat_map(chart: HeatMap) -> dict[str, Any]:
    hover = [
        [
            f"{html.escape(chart.x_title)} {html.escape(column)}, {html.escape(row)}: "
            f"{text_of(value, chart.form)}"
            for column, value in zip(chart.columns, line, strict=True)
        ]
        for row, line in zip(chart.rows, chart.values, strict=True)
    ]
    known = [value for line in chart.values for value in line if value is not None]
    trace = {
        "type": "heatmap",
        "x": list(chart.columns),
        "y": [html.escape(row) for row in chart.rows],
        "z": [list(line) for line in chart.values],
        "text": hover,
        "hoverinfo": "text",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            # Plotly's "~" leaves out trailing zeros.
            "tickformat": f"{chart.form[:-1]}~{chart.form[-1]}",
            "nticks": 5,
            "thickness": 10,
            "outlinewidth": 0,
        },
        "meta": {"colour": "scale"},
        # The colours begin at zero, so that close values look the same.
        "zmin": 0.0,
        "zmax": max(known, default=0.0) or 1.0,
    }
    step = max(1, math.ceil(len(chart.columns) / 12))
    x_axis = {
        "title": {"text": html.escape(chart.x_title)},
        "type": "category",
        "tickvals": list(chart.columns[::step]),
    }
    y_axis = {"autorange": "reversed", "type": "category"}
    height = min(1200, 110 + 24 * len(chart.rows))
    return {"data": [trace], "layout": {"xaxis": x_axis, "yaxis": y_axis, "height": height}}


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten; over three decades, at the powers alone."""
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return {
        "tickvals": ticks,
        "ticktext": [f"{tick:,g}" if tick < 1e6 else f"{tick:.0e}" for tick in ticks],
    }
