"""Read runs, sweeps and evaluations as one report, and write it as the ending of a file says."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunus.document import Document, Section
from prunus.engine.linear_record import LinearsRecord
from prunus.engine.run_record import BlockwiseRecord
from prunus.model.checkpoint.files import (
    check_file_place,
    has_content,
    read_json,
    replacing,
)
from prunus.model.formats import reader_of
from prunus.pruning.manifest import Manifest
from prunus.reporting.evaluation_sections import evaluation_section
from prunus.reporting.figure import to_figure
from prunus.reporting.page import document_json, to_html, to_markdown
from prunus.reporting.paper import to_csv, to_latex
from prunus.reporting.run_sections import run_section, runs_section, structure_section
from prunus.reporting.sweep_section import sweep_section
from prunus.rounding.compression_record import CompressionRecord
from prunus.structure.structure_record import StructureRecord
from prunus.sweeping.results import SweepResults

#: Ending of a file -> what writes a document so.
_WRITERS: dict[str, Callable[[Document], Any]] = {
    ".html": to_html,
    ".md": to_markdown,
    ".csv": to_csv,
    ".tex": to_latex,
    **{f".{kind}": partial(to_figure, kind) for kind in ("svg", "png", "pdf")},
}
# How a report begins (a table), or what it says somewhere (all others).
_OWN = re.compile(rb"(cell,)?model,|.*(Made by prunus|Written by `?prunus report)", re.DOTALL)


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
            `prunus eval --json`; one or several. Cells of a sweep that have no record yet are left
            out and named, unless there is nothing else.
        output: Where to write the report: a page (.html), Markdown (.md), a table of all figures
            (.csv), tables for a paper (.tex), or its charts as a figure (.svg, .png, .pdf). None
            writes nothing.
        title: Title of the report; default is that of its first section.

    Returns:
        The report. A notebook shows it as tables.

    Raises:
        ValueError, FileNotFoundError: A path holds something else or is damaged, the name of
            `output` has another ending, or there is nothing to plot.
        ModuleNotFoundError: A figure needs matplotlib, which is not installed.
    """
    input_paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not input_paths:
        raise ValueError("give the folder of a run or a sweep, or the file of prunus eval --json")
    file = None if output is None else Path(output)
    if file is not None:
        if file.suffix not in _WRITERS:
            *others, last = _WRITERS
            raise ValueError(f"output {file}: the name must end in {', '.join(others)} or {last}")
        check_file_place(file, has_content(_OWN.match), input_paths)
    without = [path for path in input_paths if _is_cell_without_record(path)]
    shown = [path for path in input_paths if path not in without] or input_paths
    # Stable: both keep the order in which they were given.
    results = sorted(((path, _read_result(path)) for path in shown), key=_is_run)
    runs = {str(path): run for path, run in results if isinstance(run, LinearsRecord)}
    sections = [_section(path, result, len(runs) > 1) for path, result in results]
    if len(runs) > 1:
        sections.insert(len(results) - sum(map(_is_run, results)), runs_section(runs))
    if without:
        names = ", ".join(path.name for path in without)
        sections.append(Section("Left out", f"No record of a pruned model is there yet: {names}."))
    document = Document(title or sections[0].title, tuple(sections))
    if file is not None:
        content = _WRITERS[file.suffix](document)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as written:
            # The name of a file that is not UTF-8 holds surrogates, which cannot be encoded.
            is_text = isinstance(content, str)
            written.write(content.encode("utf-8", "backslashreplace") if is_text else content)
    return document


def _is_cell_without_record(path: Path) -> bool:
    """Whether a path is the folder of a cell of a sweep that is not pruned yet, or a recovery."""
    in_sweep = (path.resolve().parent.parent / SweepResults.FILE).exists()
    return in_sweep and path.is_dir() and not (path / Manifest.FILE).exists()


def _is_run(result: tuple[Path, Any]) -> bool:
    return isinstance(result[1], BlockwiseRecord)


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
    for kind in (SweepResults, CompressionRecord, Manifest, StructureRecord):
        if (path / kind.FILE).exists():
            return kind.load(path)
    raise ValueError(
        f"{path} holds neither {Manifest.FILE} (of a run), {StructureRecord.FILE} (of a smaller "
        f"model) nor {SweepResults.FILE} (of a sweep): give the OUT folder of prunus prune, "
        "compress, shrink or sweep"
    )


def _section(path: Path, result: Any, compared: bool) -> Section:
    """A section whose figures can all be shown; errors name the file and the command."""
    makers: dict[type, Callable[[Any], Section]] = {
        SweepResults: sweep_section,
        StructureRecord: structure_section,
        LinearsRecord: partial(run_section, compared=compared),
    }
    make = next((maker for kind, maker in makers.items() if isinstance(result, kind)), None)
    file = path / result.FILE if make else path
    try:
        section = (make or evaluation_section)(result)
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
        other = "" if make else ", or not the JSON of prunus eval"
        raise ValueError(f"{file} is damaged or of another version{other}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
