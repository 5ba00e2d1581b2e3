"""Quality, size and speed of models: the columns of tables, and charts of one against the other.

A row of figures maps the title of a column to a value; see `prunus.evaluation.records.FORMS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prunus.evaluation.records import FORMS
from prunus.runs.document import Lines, Measured, Series, text_of

#: The y axis is logarithmic from this ratio of the largest to the smallest value.
LOG_FROM = 6.0
#: A chart's x axis: the sizes, of which the first that tells results apart is taken, and the speed.
_SIZES = ("file, GB", "bits per weight")
_SPEED = "decoded tokens/s"


def plain(value: Any) -> float | None:
    """A figure without its standard error."""
    return value.value if isinstance(value, Measured) else value


class Point(NamedTuple):
    """A result in a chart: the line that it belongs to, its name, and its row of figures."""

    series: str
    name: str
    figures: Mapping[str, Any]


def quality_charts(
    where: str, points: Sequence[Point], dense: float | None, labelled: bool = False
) -> list[Lines]:
    """A chart of perplexity against size, and one against decoding speed where that was measured.

    Args:
        dense: perplexity of the dense model, which is drawn as a line; or None.
    """
    known = {title: _positions(points, title) for title in (*_SIZES, _SPEED)}
    spread = [title for title in known if len({x for _, x, _ in known[title]}) > 1]
    sizes = [title for title in spread if title in _SIZES][:1]
    charts = []
    for title in [*sizes, *(title for title in spread if title == _SPEED)]:
        found = known[title]
        values = [y for *_, y in found] + ([dense] if dense is not None else [])
        names = dict.fromkeys(point.series for point, *_ in found)
        charts.append(
            Lines(
                f"Perplexity on {where} against {'speed' if title == _SPEED else 'size'}",
                title,
                "perplexity",
                tuple(_series(name, title, found) for name in names),
                level=None if dense is None else ("dense", dense),
                log_y=max(values) / min(values) >= LOG_FROM,
                round_ticks=True,
                labelled=labelled,
            )
        )
    return charts


def _positions(points: Sequence[Point], title: str) -> list[tuple[Point, float, float]]:
    """Every point with its x and its perplexity, where both are known."""
    return [
        (point, x, y)
        for point in points
        if (x := plain(point.figures.get(title))) is not None
        and (y := plain(point.figures.get("perplexity"))) is not None
    ]


def _series(name: str, title: str, found: Sequence[tuple[Point, float, float]]) -> Series:
    own = sorted((each for each in found if each[0].series == name), key=lambda each: each[1])
    hover = []
    for point, x, y in own:
        text = f"{point.name}: {text_of(y, FORMS['perplexity'])} at {text_of(x, FORMS[title])}"
        kl = plain(point.figures.get("KL divergence"))
        hover.append(text if kl is None else f"{text}, KL {kl:.4f}")
    return Series(name, tuple(x for _, x, _ in own), tuple(y for *_, y in own), tuple(hover))


def decode_speed(speeds: Mapping[str, float], model: str, *names: str) -> float | None:
    """The decoding speed of a model in tokens per second, or None if it was not measured.

    >>> decode_speed({"OUT/cells/smol-wanda/packed": 32.0}, "smol-wanda", "smol-wanda")
    32.0

    Args:
        speeds: model as it was given to `prunus bench` -> median speed.
        names: parts of a path by which the model is known as well, such as the name of its folder.
    """
    if model in speeds:
        return speeds[model]
    return next(
        (speed for path, speed in speeds.items() if set(names) & set(Path(path).parts)), None
    )
