"""The charts of a document as one figure for a paper: SVG, PNG or PDF by matplotlib."""

from __future__ import annotations

import io
import math
from importlib.metadata import version
from typing import Any

from prunus.document import Document, Lines
from prunus.words import require_library

# The colours of Okabe and Ito, which people with every kind of colour vision tell apart. Lines
# differ in their markers and dashes as well, for print in grey. There are fewer markers than
# colours, so that the ninth line does not look like the first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vXP"
_DASHES = ("-", "--", "-.", ":")
# Inches: one panel is as wide as a column of a paper in two columns.
_WIDTH, _HEIGHT = 3.3, 2.3
# A legend of more lines stands below its panel; inches that each of them takes there.
_INSIDE, _ENTRY = 4, 0.18
_STYLE = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "text.parse_math": False,
    # Publishers refuse the Type 3 fonts that matplotlib embeds otherwise.
    "pdf.fonttype": 42,
    "svg.hashsalt": "prunus",
}


def to_figure(kind: str, document: Document) -> bytes:
    """Draw all charts of a document, a panel for each. The same document gives the same bytes.

    Args:
        kind: "svg", "png" or "pdf".
        document: The document.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: The document has no chart.
    """
    charts = document.charts()
    if not charts:
        raise ValueError(
            f"{document.title}: there is nothing to plot. A figure needs a sweep over two or more "
            "sparsities or patterns, or values of samples or seqlen, models of several sizes, or a "
            "run that measured errors"
        )
    require_library("matplotlib", "a figure", "plot")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    across = min(len(charts), 2)
    down = math.ceil(len(charts) / across)
    with rc_context(_STYLE):
        longest = max(len(chart.series) for chart in charts)
        height = _HEIGHT + (_ENTRY * longest if longest > _INSIDE else 0)
        figure = Figure((across * _WIDTH, down * height), dpi=300, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).flat
        named: list[str] = []
        for chart, panel in zip(charts, panels, strict=False):
            _draw(chart, panel)
            panel.set_title(chart.title if len(charts) > 1 else "")
            names = [line.name for line in chart.series]
            # One legend serves the panels with the same lines.
            if names != named and not chart.y_title.startswith(names[0]):
                below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5}
                panel.legend(**below if len(names) > _INSIDE else {})
            named = names
        for panel in panels:
            panel.set_axis_off()
        content = io.BytesIO()
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
        # By these words a later report knows that it may replace the figure.
        by = {"Creator": f"Written by prunus report, prunus {version('prunus')}"}
        figure.savefig(content, format=kind, metadata=undated | by)
    return content.getvalue()


def _draw(chart: Lines, panel: Any) -> None:
    """Draw a chart on the axes of matplotlib."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    for place, line in enumerate(chart.series):
        panel.errorbar(
            line.x,
            line.y,
            line.error if any(line.error) else None,
            label=line.name,
            color=_COLOURS[place % len(_COLOURS)],
            marker=_MARKERS[place % len(_MARKERS)],
            linestyle=_DASHES[place % len(_DASHES)],
            capsize=2,
        )
    if chart.level is not None:
        name, level = chart.level
        panel.axhline(level, label=name, color="#555555", linestyle=":", linewidth=1)
    panel.set(
        xlabel=chart.x_title,
        ylabel=chart.y_title,
        xscale="log" if chart.log_x else "linear",
        yscale="log" if chart.log_y else "linear",
    )
    if chart.log_y:
        panel.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)),
            major_formatter=StrMethodFormatter("{x:,.6g}"),
            minor_formatter=NullFormatter(),
        )
    if chart.round_ticks:
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        measured = sorted({x for line in chart.series for x in line.x})
        panel.set_xticks(measured, [chart.tick(x) for x in measured])
        panel.xaxis.set_minor_formatter(NullFormatter())
