"""Read runs, sweeps and evaluations as one report, and write it as a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunus.compression.records import CompressionRecord
from prunus.model.checkpoint.atomic_files import check_place, read_json, write_text
from prunus.pruning.manifest import Manifest, PruningRecord
from prunus.reporting.evaluation_sections import decode_speeds, evaluation_section, speed_section
from prunus.reporting.page import document_json, to_html, to_markdown
from prunus.reporting.run_sections import comparison_section, run_section
from prunus.reporting.structure_section import structure_section
from prunus.reporting.sweep_section import sweep_section
from prunus.runs.document import Document, Section, short_names
from prunus.structure.records import StructureRecord
from prunus.sweeping.results import RESULTS_NAME, SweepResults

#: The runs that a section shows, with what makes it.
_RUNS: tuple[tuple[Any, Callable[[Any], Section]], ...] = (
    (CompressionRecord, run_section),
    (Manifest, run_section),
    (StructureRecord, structure_section),
)


def report(
    paths: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    bench: str | Path | None = None,
    title: str | None = None,
) -> Document:
    """Show runs, sweeps and evaluations, as `prunus report` does.

    Quality is first: evaluations and sweeps, then `bench`. Runs follow; two or more runs of `prune`
    and `compress` are also compared.

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
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not given:
        raise ValueError("give the folder of a run or a sweep, or the file of prunus eval --json")
    page = None if output is None else Path(output)
    if page is not None and page.suffix not in (".html", ".md"):
        raise ValueError(f"output {page}: the name must end in .html or .md")
    if page is not None:
        check_place(page)
    measured, speeds = [], {}
    if bench is not None:
        content = read_json(Path(bench))
        measured = [_checked(Path(bench), lambda: speed_section(content), "prunus bench")]
        speeds = decode_speeds(content)
    found = [(path, _section(path, speeds)) for path in given]
    sections = [
        *(section for path, section in found if not _holds_run(path)),
        *measured,
        *_side_by_side(given),
        *(section for path, section in found if _holds_run(path)),
    ]
    document = Document(title or sections[0].title, tuple(sections))
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, (to_html if page.suffix == ".html" else to_markdown)(document))
    return document


def _holds_run(path: Path) -> bool:
    """Whether a path is the folder of a run, not a sweep or a file of an evaluation."""
    return path.suffix == ".gguf" or (path.is_dir() and not (path / RESULTS_NAME).exists())


def _side_by_side(paths: Sequence[Path]) -> list[Section]:
    """A section that compares the runs of prune and compress; none for fewer than two of them."""
    runs: dict[Path, PruningRecord] = {}
    for path in filter(_holds_run, paths):
        for kind in (Manifest, CompressionRecord):
            if (path / kind.FILE).exists():
                runs[path] = kind.load(path)
    names = short_names(map(str, runs))
    named = {names[str(path)]: run for path, run in runs.items()}
    return [_checked(next(iter(runs)), lambda: comparison_section(named))] if len(runs) > 1 else []


def _section(path: Path, speeds: Mapping[str, float]) -> Section:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; give the folder of a run or a sweep, or the file of prunus eval "
            "--json"
        )
    if path.suffix == ".gguf":
        from prunus.compression.gguf_output import read_record  # it imports torch

        if (made := read_record(path)) is None:
            raise ValueError(f"{path} has no record of prunus compress: another program wrote it")
        return run_section(made)
    if not path.is_dir():
        content = read_json(path)
        return _checked(path, lambda: evaluation_section(content, speeds), "prunus eval")
    if (path / RESULTS_NAME).exists():
        results = SweepResults.load(path)
        return _checked(path / RESULTS_NAME, lambda: sweep_section(results, speeds))
    for kind, section in _RUNS:
        if (path / kind.FILE).exists():
            record = kind.load(path)
            return _checked(path / kind.FILE, lambda: section(record))  # noqa: B023
    raise ValueError(
        f"{path} holds neither {Manifest.FILE} (of a run), {StructureRecord.FILE} (of a smaller "
        f"model) nor {RESULTS_NAME} (of a sweep): give the OUT folder of prunus prune, shrink or "
        "sweep"
    )


def _checked(path: Path, make_section: Callable[[], Section], verb: str = "") -> Section:
    """A section whose figures can all be shown; errors name the file and the verb of its JSON."""
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
        other = f", or not the JSON of {verb}" if verb else ""
        raise ValueError(f"{path} is damaged or of another version{other}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
