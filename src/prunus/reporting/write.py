"""Read runs, sweeps and evaluations as one report, and write it as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunus.model.checkpoint.atomic_files import write_text
from prunus.reporting.page import to_html
from prunus.reporting.plain import to_markdown
from prunus.reporting.sources import read_document
from prunus.runs.document import Document


def report(
    paths: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    bench: str | Path | None = None,
    title: str | None = None,
) -> Document:
    """Show runs, sweeps and evaluations, as `prunus report` does.

    Args:
        paths: Folders of `prune`, `compress`, `shrink` or `sweep`, and files of
            `prunus eval --json`; one or several.
        output: Where to write the report: a page (.html) or Markdown (.md). None writes nothing.
        bench: A file of `prunus bench --json`, whose speeds are shown too.
        title: Title of the report; default is that of its first section.

    Returns:
        The report. A notebook shows it as tables.

    Raises:
        ValueError, FileNotFoundError: A path holds something else or is damaged, or the name of
            `output` has another ending.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise ValueError("give the folder of a run or a sweep, or the file of prunus eval --json")
    page = None if output is None else Path(output)
    if page is not None and page.suffix not in (".html", ".md"):
        raise ValueError(f"output {page}: the name must end in .html or .md")
    document = read_document(
        [Path(path) for path in given], Path(bench) if bench is not None else None, title
    )
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, (to_html if page.suffix == ".html" else to_markdown)(document))
    return document
