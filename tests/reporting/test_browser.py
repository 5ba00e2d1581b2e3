"""The report in a real browser: headless Chromium, driven through playwright.

The tests skip where there is no Chromium, see `conftest.py`.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import prunus
from prunus.document import Document, Measured, Table, text_of
from prunus.reporting.page import to_html
from report_samples import compared_evaluation, hostile_document, whole_document, write


@pytest.fixture(scope="module")
def documents(run, tmp_path_factory) -> dict[str, Document]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", "hostile", "long")}
    names = [f"runs/smollm2-135m-instruct-compressed-to-{k}-bits-and-recovered" for k in range(9)]
    long = write(folders["long"] / "e.json", compared_evaluation(*names))
    return {
        "whole": whole_document(folders["whole"], run),
        "hostile": hostile_document(folders["hostile"], run),
        "long": prunus.report([long]),
    }


@pytest.fixture(scope="module")
def files(documents, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, document in documents.items():
        (folder / f"{name}.html").write_text(to_html(document), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in documents}


class Opened:
    """A page that has been drawn, and what the browser had to say about it."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.page.set_default_timeout(120_000)  # the machine may be busy; nothing here is measured
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-charts]")

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def unfold(self) -> None:
        """Open all that is folded, and wait until its charts are drawn."""
        self.page.evaluate(
            "document.querySelectorAll('details').forEach(box => { box.open = true; })"
        )
        self.page.wait_for_function(
            "() => Array.from(document.querySelectorAll('.chart')).every(box => box.data)"
        )

    def table(self, title: str, section: str = "main") -> list[list[dict[str, str | None]]]:
        """Text and raw value of every cell of a table's body, in the order shown.

        Args:
            title: of the table.
            section: CSS selector of the part of the page that holds the table.
        """
        return self.page.evaluate(
            """([section, title]) => {
              const boxes = Array.from(document.querySelectorAll(`${section} .scroll`));
              const box = boxes.find(b => b.ariaLabel === title);
              const shown = cell => ({ text: cell.textContent, value: cell.dataset.value ?? null });
              const rows = box.querySelectorAll("tbody tr");
              return Array.from(rows, row => Array.from(row.cells, shown));
            }""",
            [section, title],
        )

    def sort(self, title: str, column: int) -> str:
        """Click a column's title; returns what the column says of its order."""
        header = self.page.locator(f'.scroll[aria-label="{title}"] th').nth(column)
        header.locator("button").click()
        return header.get_attribute("aria-sort")


#: What a chart shows outside its box: text and points, by what they say.
CUT_OFF = """() => Array.from(document.querySelectorAll(".chart")).flatMap(box => {
  const whole = box.getBoundingClientRect();
  const names = ".legendtext, .xtick text, .ytick text, .xtitle, .ytitle, .cbaxis text, .point";
  const cut = Array.from(box.querySelectorAll(names)).filter(part => {
    const { left, right, top, bottom } = part.getBoundingClientRect();
    return left < whole.left - 1 || right > whole.right + 1
      || top < whole.top - 1 || bottom > whole.bottom + 1;
  });
  return cut.map(part => part.textContent || "a point");
})"""


@contextlib.contextmanager
def drawn(browser: Any, path: Path, width: int, scheme: str) -> Iterator[Opened]:
    """A page with all charts, which is drawn without errors, requests or overflow."""
    with Opened(browser, path, width, scheme) as opened:
        assert opened.messages == []
        assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [
            path.as_uri()
        ]
        opened.unfold()
        charts, boxes = opened.page.evaluate(
            "['.chart .main-svg', '.chart'].map(name => document.querySelectorAll(name).length)"
        )
        assert boxes >= 2
        assert charts >= boxes
        wide = opened.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width
        outside = opened.page.evaluate(
            """() => Array.from(document.querySelectorAll("body *")).filter(
                 e => !e.closest(".scroll, .chart")
                   && e.getBoundingClientRect().right > innerWidth + 1
               ).map(e => e.outerHTML.slice(0, 80))"""
        )
        assert outside == []
        assert opened.page.evaluate(CUT_OFF) == []
        assert opened.page.evaluate("window.owned === undefined")
        assert (
            opened.page.evaluate("document.querySelectorAll('img, iframe, .chart a').length") == 0
        )
        yield opened


@pytest.fixture(scope="module")
def shown(browser, files) -> Iterator[Callable[..., Opened]]:
    """Pages that are drawn once. A test may sort and scroll them, and not change their size."""
    with contextlib.ExitStack() as pages:

        @functools.cache
        def page(name: str, width: int, scheme: str) -> Opened:
            return pages.enter_context(drawn(browser, files[name], width, scheme))

        yield page


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_a_hostile_page_is_drawn_without_errors_requests_or_overflow(browser, files, width, scheme):
    with drawn(browser, files["hostile"], width, scheme):
        pass


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_long_names_stay_inside_charts_which_keep_their_height(shown, width, scheme):
    page = shown("long", width, scheme).page
    heights = page.evaluate(
        "Array.from(document.querySelectorAll('.chart .nsewdrag'), "
        "plot => plot.getBoundingClientRect().height)"
    )
    assert min(heights) > 200
    drawn_names = page.locator(".chart .legendtext").all_text_contents()
    whole = {"".join(name.split()) for name in drawn_names}
    assert "smollm2-135m-instruct-compressed-to-8-bits-and-recovered" in whole


def test_a_table_takes_the_window_before_its_last_column_is_cut(shown):
    cut = """() => Array.from(document.querySelectorAll(".scroll")).filter(
      box => box.scrollWidth > box.clientWidth && box.clientWidth < innerWidth - 100
    ).map(box => box.ariaLabel)"""
    for name, scheme in (("whole", "dark"), ("long", "light")):
        assert shown(name, 1280, scheme).page.evaluate(cut) == []


def test_a_table_that_is_wider_than_the_window_keeps_its_first_column_in_sight(shown):
    first = shown("long", 390, "dark").page.evaluate(
        """() => {
          const box = document.querySelector('.scroll[aria-label="Quality and size"]');
          box.scrollLeft = 1000;
          const cell = box.querySelector("tbody td");
          const moved = box.scrollLeft > 0;
          return [cell.textContent, moved, cell.getBoundingClientRect().left >= 0];
        }"""
    )
    assert first == ["smollm2-135m-instruct-compressed-to-0-bits-and-recovered", True, True]


def test_charts_fit_on_paper(browser, files):
    """A4 between margins of 16 mm is 673 pixels wide, and a letter 695."""
    with drawn(browser, files["long"], 1280, "dark") as opened:
        opened.page.emulate_media(media="print")
        opened.page.set_viewport_size({"width": 673, "height": 844})
        opened.page.wait_for_function(
            "() => Array.from(document.querySelectorAll('.chart .main-svg'))"
            ".every(drawing => drawing.clientWidth <= 673)"
        )
        assert opened.page.evaluate(CUT_OFF) == []


def test_figures_equal_the_json_they_come_from(browser, files, run, documents):
    """The whole way: from the files on disk to the numbers in tables and plots."""
    manifest = json.loads((run / "prunus.json").read_text())
    with drawn(browser, files["whole"], 390, "light") as opened:
        seen = 0
        for number, section in enumerate(documents["whole"].sections):
            for part in (*section.parts, *section.details):
                if not isinstance(part, Table):
                    continue
                shown = opened.table(part.title, f"#section-{number}")
                assert len(shown) == len(part.rows)
                for cells, row in zip(shown, part.rows, strict=True):
                    for cell, value, column in zip(cells, row, part.columns, strict=True):
                        plain = value.value if isinstance(value, Measured) else value
                        assert cell["text"] == text_of(value, column.form)
                        assert cell["value"] == (None if plain is None else str(plain))
                        seen += 1
        assert seen > 250
        plots = {
            title: opened.page.evaluate(
                """title => {
                  const boxes = Array.from(document.querySelectorAll(".chart"));
                  const box = boxes.find(b => b.ariaLabel === title);
                  return box.data.map(
                    ({ name, x, y, hovertext }) => ({ name, x, y, hover: hovertext }));
                }""",
                title,
            )
            for title in ("Mean removed energy by block", "Perplexity on wikitext2 by sparsity")
        }
    [energy] = plots["Mean removed energy by block"]
    means = [
        mean(linear["removed_energy"] for linear in block["linears"].values())
        for block in manifest["blocks"]
    ]
    assert energy["y"] == pytest.approx([100 * share for share in means])
    lines = {trace["name"]: trace for trace in plots["Perplexity on wikitext2 by sparsity"]}
    assert lines["wanda"]["y"] == [32.0, 61.5, 61.5]
    assert lines["wanda"]["hover"] == [
        "wanda, 50%: 32.000",
        "wanda, 60%: 61.500",
        "wanda, 70%: 61.500",
    ]
    assert lines["dense 20.50"]["y"] == [20.5, 20.5]


def test_a_click_sorts_by_the_figures_and_leaves_missing_ones_last(shown):
    title = "Models"
    opened = shown("whole", 1280, "dark")
    before = opened.table(title)
    column = 1  # perplexity: one is infinite, one was never measured

    def values() -> list[float | None]:
        return [
            None if row[column]["value"] is None else float(row[column]["value"])
            for row in opened.table(title)
        ]

    known = [value for value in values() if value is not None]
    missing = [None] * (len(before) - len(known))
    assert len(missing) == 2
    assert known != sorted(known)
    assert opened.sort(title, column) == "ascending"
    assert values() == sorted(known) + missing
    assert opened.sort(title, column) == "descending"
    assert values() == sorted(known, reverse=True) + missing
    assert opened.sort(title, 0) == "ascending"
    names = [row[0]["text"] for row in opened.table(title)]
    assert sorted(names) == sorted(row[0]["text"] for row in before)
    assert names[0] == min(names)
    marked = opened.page.locator(f'.scroll[aria-label="{title}"] th[aria-sort]').count()
    assert marked == 1, "one column says that it is sorted by"
    # The same without a mouse.
    opened.page.locator(f'.scroll[aria-label="{title}"] th button').nth(column).press("Enter")
    assert values() == sorted(known) + missing
