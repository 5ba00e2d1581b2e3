"""Read runs, sweeps and evaluations as one report, and write it as a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunus.engine.document import Document, Section
from prunus.engine.run_record import BlockwiseRecord
from prunus.formats.compression_record import CompressionRecord
from prunus.model.checkpoint.files import check_place, read_json, write_text
from prunus.model.formats import reader_of
from prunus.pruning.manifest import Manifest
from prunus.reporting.evaluation_sections import evaluation_section
from prunus.reporting.page import document_json, to_html, to_markdown
from prunus.reporting.run_sections import run_section, structure_section
from prunus.reporting.sweep_section import sweep_section
from prunus.structure.structure_record import StructureRecord
from prunus.sweeping.results import RESULTS_NAME, SweepResults


def report(
    paths: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    title: str | None = None,
) -> Document:
    """Show runs, sweeps and evaluations, as `prunus report` does.

    Quality is first: evaluations and sweeps. Runs follow.

    Args:
        paths: Folders of `prune`, `compress`, `shrink` or `sweep`, and files of
            `prunus eval --json`; one or several.
        output: Where to write the report: a page (.html) or Markdown (.md). None writes nothing.
        title: Title of the report; default is that of its first section.

    Returns:
        The report. A notebook shows it as tables.

    Raises:
        ValueError, FileNotFoundError: A path holds something else or is damaged, or the name of
            `output` has another ending.
    """
    input_paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not input_paths:
        raise ValueError("give the folder of a run or a sweep, or the file of prunus eval --json")
    page = None if output is None else Path(output)
    if page is not None and page.suffix not in (".html", ".md"):
        raise ValueError(f"output {page}: the name must end in .html or .md")
    if page is not None:
        check_place(page)
    results = [(path, _read_result(path)) for path in input_paths]
    # Stable: both keep the order in which they were given.
    results.sort(key=lambda result: isinstance(result[1], BlockwiseRecord))
    sections = [_section(path, result) for path, result in results]
    document = Document(title or sections[0].title, tuple(sections))
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, (to_html if page.suffix == ".html" else to_markdown)(document))
    return document


def _read_result(path: Path) -> Any:
    """What a path holds: the record of a run, the results of a sweep, or JSON of `prunus eval`."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; give the folder of a run or a sweep, or the file of prunus eval "
            "--json"
        )
    if (kind := reader_of(path)) is not None:
        if (record := kind.read_record(path)) is None:
            raise ValueError(f"{path} has no record of prunus compress: another program wrote it")
        return record
    if not path.is_dir():
        return read_json(path)
    if (path / RESULTS_NAME).exists():
        return SweepResults.load(path)
    for kind in (CompressionRecord, Manifest, StructureRecord):
        if (path / kind.FILE).exists():
            return kind.load(path)
    raise ValueError(
        f"{path} holds neither {Manifest.FILE} (of a run), {StructureRecord.FILE} (of a smaller "
        f"model) nor {RESULTS_NAME} (of a sweep): give the OUT folder of prunus prune, compress, "
        "shrink or sweep"
    )


def _section(path: Path, result: Any) -> Section:
    if isinstance(result, SweepResults):
        return _checked(path / RESULTS_NAME, lambda: sweep_section(result))
    if isinstance(result, BlockwiseRecord):
        section: Any = structure_section if isinstance(result, StructureRecord) else run_section
        return _checked(path / result.FILE, lambda: section(result))
    return _checked(path, lambda: evaluation_section(result), "prunus eval")


def _checked(path: Path, make_section: Callable[[], Section], command: str = "") -> Section:
    """A section whose figures can all be shown; errors name the file and the command."""
    try:
        section = make_section()
        to_markdown(Document(section.title, (section,)))
        document_json(Document(section.title, (section,)))
        return section
    except (
        ValidationError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):
        other = f", or not the JSON of {command}" if command else ""
        raise ValueError(f"{path} is damaged or of another version{other}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
