"""Charts of quality against size and speed: KL divergence and perplexity of several results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunus.reporting.document import Lines, Series, text_of

__all__ = ["LOG_FROM", "Result", "decode_speed", "size_charts"]

#: The y axis is logarithmic from this ratio of the largest to the smallest value.
LOG_FROM = 6.0
#: Title of an x axis -> its name in titles, the figure of a result, its form as in `Column`.
_AXES: dict[str, tuple[str, Callable[[Result], float | None], str]] = {
    "bits per weight in the blocks": ("bits per weight", lambda r: r.bits_per_weight, ".2f"),
    "size of the files, GB": ("file size", lambda r: r.gigabytes, ",.3f"),
    "decoding, tokens/s": ("decoding speed", lambda r: r.tokens_per_second, ",.1f"),
}
#: Title of a y axis -> the same.
_FIGURES: dict[str, tuple[Callable[[Result], float | None], str]] = {
    "KL divergence": (lambda result: result.kl, ".4f"),
    "perplexity": (lambda result: result.perplexity, ",.2f"),
}


@dataclass(frozen=True)
class Result:
    """One point of the charts. A chart leaves out the results whose figure is None.

    Attributes:
        series: name of the line that joins the results of one method.
        name: what stands under the pointer.
        gigabytes: size of the files, in 10⁹ bytes.
        bits_per_weight: of the linears in the blocks.
        tokens_per_second: median decoding speed.
        kl: KL divergence from the dense model, in nats per token.
        perplexity: on the same text.
    """

    series: str
    name: str
    gigabytes: float | None
    bits_per_weight: float | None
    tokens_per_second: float | None
    kl: float | None
    perplexity: float | None


def size_charts(
    where: str, results: Sequence[Result], dense: float | None, labelled: bool = False
) -> list[Lines]:
    """Charts of every figure against every size that differs between results.

    The dense model itself is no point: its divergence is 0, and its perplexity is a line.

    Args:
        where: name of the text, for the titles.
        results: the points.
        dense: perplexity of the dense model, or None if it is unknown.
        labelled: write names beside the points; otherwise series have a legend.
    """
    charts = []
    for figure, (y_of, y_form) in _FIGURES.items():
        for axis, (size, x_of, x_form) in _AXES.items():
            points = [
                (result, x, y)
                for result in results
                if result.kl != 0
                and (x := x_of(result)) is not None
                and (y := y_of(result)) is not None
                and y > 0
            ]
            if len({x for _, x, _ in points}) < 2:
                continue
            series = tuple(
                _series(
                    name, [point for point in points if point[0].series == name], x_form, y_form
                )
                for name in dict.fromkeys(result.series for result, *_ in points)
            )
            level = ("dense", dense) if figure == "perplexity" and dense is not None else None
            values = [y for *_, y in points] + ([dense] if level and dense else [])
            charts.append(
                Lines(
                    f"{figure[:1].upper()}{figure[1:]} on {where} against {size}",
                    axis,
                    figure,
                    series,
                    level=level,
                    log_y=max(values) / min(values) >= LOG_FROM,
                    round_ticks=True,
                    labelled=labelled,
                )
            )
    return charts


def _series(
    name: str, points: list[tuple[Result, float, float]], x_form: str, y_form: str
) -> Series:
    points = sorted(points, key=lambda point: point[1])
    return Series(
        name,
        tuple(x for _, x, _ in points),
        tuple(y for *_, y in points),
        tuple(
            f"{result.name}: {text_of(y, y_form)} at {text_of(x, x_form)}"
            for result, x, y in points
        ),
    )


def decode_speed(speeds: Mapping[str, float], model: str, *names: str) -> float | None:
    """The decoding speed of a model in tokens per second, or None if it was not measured.

    >>> decode_speed({"OUT/cells/smol-wanda/packed": 32.0}, "smol-wanda", "smol-wanda")
    32.0

    Args:
        speeds: model as it was given to `prunus bench` -> median speed.
        model: the name of the model.
        names: parts of a path by which the model is known as well, such as the name of its folder.
    """
    if model in speeds:
        return speeds[model]
    return next(
        (speed for path, speed in speeds.items() if set(names) & set(Path(path).parts)), None
    )
