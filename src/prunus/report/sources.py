"""What a report is made from: the folder of a run or of a sweep, the JSON of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.atomic_files import read_json
from prunus.pruning.manifest import MANIFEST_NAME, Manifest
from prunus.report.document import Document, Section
from prunus.report.evaluation_sections import evaluation_section, speed_section
from prunus.report.layers_section import is_layers, layers_section
from prunus.report.run_sections import run_section
from prunus.report.sweep_tables import sweep_section
from prunus.sweep.results import RESULTS_NAME, SweepResults

__all__ = ["read_document"]


def read_document(
    paths: list[Path],
    bench: Path | None = None,
    extra: Sequence[Section] = (),
    title: str | None = None,
) -> Document:
    """A report on runs, sweeps and evaluations, in this order.

    Args:
        paths: folders with `prunus.json` or `results.json`, files that `prunus eval --json` or `benchmarks/layers.py
            --json` wrote.
        bench: file that `prunus bench --json` wrote.
        extra: further sections, such as histograms.
        title: of the document; the first section's where None.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: a path that is none of these, or is damaged; says which.
    """
    sections = [read_section(path) for path in paths]
    if bench is not None:
        sections.append(_explained(bench, speed_section))
    sections += extra
    return Document(title or sections[0].title, tuple(sections))


def read_section(path: Path) -> Section:
    """One run, sweep or evaluation; see `read_document`."""
    if path.is_dir():
        if (path / RESULTS_NAME).exists():
            return sweep_section(SweepResults.load(path))
        if (path / MANIFEST_NAME).exists():
            return run_section(Manifest.load(path))
        raise ValueError(
            f"{path} holds neither {MANIFEST_NAME} (of a run) nor {RESULTS_NAME} (of a sweep): nothing to report on"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there; give the folder of a run or a sweep, or the file of prunus eval --json"
        )
    return _explained(
        path,
        lambda content: (
            layers_section(content) if is_layers(content) else evaluation_section(content)
        ),
    )


def _explained(path: Path, make: Callable[[Any], Section]) -> Section:
    try:
        return make(read_json(path))
    except ValueError as fault:
        raise ValueError(str(fault) if str(path) in str(fault) else f"{path}: {fault}") from None
