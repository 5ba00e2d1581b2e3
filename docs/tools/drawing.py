"""A picture in SVG, made of text, boxes, lines and arrows, for `drawings.py`.

A picture has its own background, and colours for light and dark mode, so it is legible on every
page. Texts are at least 13 pixels high at a width of 720.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

WIDTH = 720
Point = tuple[float, float]

_STYLE = """
svg { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
text { fill: #1f2328; } .soft { fill: #59636e; } .bold { font-weight: 600; }
.code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; fill: #59636e; }
.page { fill: #ffffff; } .plain { fill: #f6f8fa; stroke: #818b98; }
.blue { fill: #b6d4fe; stroke: #0969da; } .green { fill: #b7e4c0; stroke: #1a7f37; }
.orange { fill: #ffd8a8; stroke: #bc4c00; } .violet { fill: #e2d4fb; stroke: #8250df; }
.pale { fill: #e9f1fd; stroke: #9db9de; }
.line { fill: none; stroke: #59636e; stroke-width: 1.5; } .dash { stroke-dasharray: 5 4; }
.curve { fill: none; stroke-width: 2.5; } .tip { fill: #59636e; }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc; } .soft, .code { fill: #adb8c4; }
.page { fill: #12161d; } .plain { fill: #212830; stroke: #818b98; }
.blue { fill: #14437f; stroke: #58a6ff; } .green { fill: #145329; stroke: #3fb950; }
.orange { fill: #743b07; stroke: #f0883e; } .violet { fill: #4a3285; stroke: #ab7df8; }
.pale { fill: #16263d; stroke: #3d5a80; } .line { stroke: #adb8c4; } .tip { fill: #adb8c4; }
}
.curve.blue, .curve.green, .curve.orange { fill: none; }
"""
_SUBSCRIPT = r'<tspan dy="4" font-size="11">\1</tspan><tspan dy="-4">\2</tspan>'


class Drawing:
    """A picture that grows by one call for each shape; `title` says in words what it shows."""

    def __init__(self, height: int, title: str, source: str) -> None:
        self.height, self.title = height, title
        self.shapes: list[str] = []
        self.text(WIDTH / 2, height - 14, source, "code")

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "middle") -> None:
        """One line of text; `y` is its base line, and w_ij has a subscript."""
        words = escape(words)
        if style != "code":
            words = re.sub(r"_([a-z]+)(.?)", _SUBSCRIPT, words)
        self.add("text", words, x=x, y=y, class_=style, text_anchor=anchor)

    def box(self, x: float, y: float, width: float, height: float, style: str = "plain") -> None:
        corner = 3 if min(width, height) > 20 else 1
        self.add("rect", x=x, y=y, width=width, height=height, rx=corner, class_=style)

    def named_box(
        self, place: Point, size: Point, lines: Iterable[str], style: str = "plain"
    ) -> None:
        """A box with lines of text in its middle."""
        (x, y), (width, height), words = place, size, list(lines)
        self.box(x, y, width, height, style)
        first = y + height / 2 + 5 - 9.5 * (len(words) - 1)
        for number, line in enumerate(words):
            self.text(x + width / 2, first + 19 * number, line)

    def line(self, points: Iterable[Point], style: str = "line") -> None:
        path = " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
        self.add("polyline", points=path, class_=style)

    def arrow(self, start: Point, end: Point, style: str = "line") -> None:
        """A straight line with a tip at its end, horizontal or vertical."""
        (x, y), across = end, start[1] == end[1]
        back = (1 if end > start else -1) * 8
        sides = (
            [(x - back, y - 4), (x - back, y + 4)]
            if across
            else [(x - 4, y - back), (x + 4, y - back)]
        )
        self.line([start, end], style)
        self.add("polygon", points=" ".join(f"{a},{b}" for a, b in [end, *sides]), class_="tip")

    def axes(self, x: float, y: float, width: float, height: float) -> None:
        """Two axes with their origin at (x, y), the lower left corner."""
        self.arrow((x, y), (x + width, y))
        self.arrow((x, y), (x, y - height))

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH}" height="{self.height}" role="img">'
        )
        page = f'<rect class="page" width="{WIDTH}" height="{self.height}" rx="8"/>'
        parts = [head, f"<title>{escape(self.title)}</title>", f"<style>{_STYLE}</style>", page]
        return "\n".join([*parts, *self.shapes, "</svg>", ""])

    def add(self, shape: str, content: str = "", **attributes: object) -> None:
        """Any shape of SVG; `class_` and `text_anchor` are its attributes class and text-anchor."""
        named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        pairs = " ".join(f'{key}="{_short(value)}"' for key, value in named.items() if value != "")
        self.shapes.append(
            f"<{shape} {pairs}>{content}</{shape}>" if content else f"<{shape} {pairs}/>"
        )


def _short(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
