"""Read what a report is made from: folders of runs and sweeps, and JSON files of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.compression.record import CompressionRecord
from prunus.model.checkpoint.atomic_files import read_json
from prunus.pruning.manifest import Manifest, PruningRecord
from prunus.reporting.evaluation_sections import decode_speeds, evaluation_section, speed_section
from prunus.reporting.page import document_json
from prunus.reporting.plain import to_markdown
from prunus.reporting.run_comparison import comparison_section
from prunus.reporting.run_sections import run_section
from prunus.reporting.structure_section import structure_section
from prunus.reporting.sweep_section import sweep_section
from prunus.runs.document import Document, Section
from prunus.structure.record import StructureRecord
from prunus.sweeping.results import RESULTS_NAME, SweepResults


def read_document(
    paths: Sequence[Path], bench: Path | None = None, title: str | None = None
) -> Document:
    """A document with one section per path; the arguments are those of `prunus.report`.

    Quality is first: evaluations and sweeps, then `bench`. Runs follow; two or more of them are
    also compared.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path holds something else, or is damaged; the message names it.
    """
    measured = [] if bench is None else [_read_file(bench, speed_section)]
    speeds = {} if bench is None else decode_speeds(read_json(bench))
    found = [(_holds_runs(path), read_section(path, speeds)) for path in paths]
    sections = [
        *(section for is_run, section in found if not is_run),
        *measured,
        *_side_by_side(paths),
        *(section for is_run, section in found if is_run),
    ]
    return Document(title or sections[0].title, tuple(sections))


def _holds_runs(path: Path) -> bool:
    """Whether a path is the folder of a run, not a sweep or a file of an evaluation."""
    return path.is_dir() and not (path / RESULTS_NAME).exists()


def _side_by_side(paths: Sequence[Path]) -> list[Section]:
    """A section that compares the runs among the paths; none for fewer than two runs."""
    folders = [
        path for path in dict.fromkeys(paths) if _holds_runs(path) and _pruning_records(path)
    ]
    if len(folders) < 2:
        return []
    short = [path.name for path in folders]
    names = short if len(set(short)) == len(short) else [str(path) for path in folders]
    runs = {
        name: _pruning_records(path)[0].load(path)
        for name, path in zip(names, folders, strict=True)
    }
    return [_checked(folders[0], lambda: comparison_section(runs))]


def _pruning_records(path: Path) -> list[type[PruningRecord]]:
    """The kinds of record of prune and compress that a folder holds; at most one as a rule."""
    return [kind for kind in (CompressionRecord, Manifest) if (path / kind.FILE).exists()]


def read_section(path: Path, speeds: Mapping[str, float]) -> Section:
    """Read one run, sweep or evaluation."""
    if path.is_dir():
        if (path / RESULTS_NAME).exists():
            results = SweepResults.load(path)
            return _checked(path / RESULTS_NAME, lambda: sweep_section(results, speeds))
        for kind in _pruning_records(path):
            manifest = kind.load(path)
            return _checked(path / kind.FILE, lambda: run_section(manifest))  # noqa: B023
        if (path / StructureRecord.FILE).exists():
            record = StructureRecord.load(path)
            return _checked(path / StructureRecord.FILE, lambda: structure_section(record))
        raise ValueError(
            f"{path} holds neither {Manifest.FILE} (of a run), {StructureRecord.FILE} (of a "
            f"smaller model) nor {RESULTS_NAME} (of a sweep): give the OUT "
            "folder of prunus prune, shrink or sweep"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; give the folder of a run or a sweep, or the file of prunus eval "
            "--json"
        )
    return _read_file(path, lambda content: evaluation_section(content, speeds))


def _read_file(path: Path, make_section: Callable[[Any], Section]) -> Section:
    """Read a JSON file and make a section of it; every error names the file."""
    content = read_json(path)
    return _checked(path, lambda: make_section(content))


def _checked(path: Path, make_section: Callable[[], Section]) -> Section:
    """A section whose figures can all be shown."""
    try:
        section = make_section()
        to_markdown(Document(section.title, (section,)))
        document_json(Document(section.title, (section,)))
        return section
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or of another version: {type(error).__name__}: {error}"
        ) from error
