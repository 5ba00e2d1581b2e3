"""Verbs for many runs: try a grid, and put on a page what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.terminal import for_people, say, show, write_json

__all__ = ["report", "sweep"]


def sweep(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.toml", help="What to try; see docs/sweeps.md.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results.")],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="MODEL", help="Instead of the file's models; may be repeated."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check everything, list the cells, write nothing.")
    ] = False,
    device: arg.Device = "auto",
    memory: arg.Memory = None,
    data_dir: arg.DataDir = None,
    trust_remote_code: arg.Trust = False,
    rank_timeout: arg.RankTimeout = None,
    json_file: arg.Json = None,
) -> None:
    """Prune and score a grid of models, methods and sparsities. Killed or stopped, the same command goes on.

    Started by torchrun, the processes take one cell after the other, each the next that is free.
    """
    with for_people(json_file):
        from prunus.hardware.sizes import parse_bytes
        from prunus.pruning.job import RunOptions
        from prunus.report.document import Document
        from prunus.report.plain import to_terminal
        from prunus.report.sweep_tables import sweep_section
        from prunus.sweep import check_sweep, load_sweep, run_sweep

        chosen = load_sweep(file, tuple(models or ()))
        options = RunOptions(
            device=device,
            memory=parse_bytes(memory) if memory is not None else None,
            data_dir=data_dir,
            trust_remote_code=trust_remote_code,
            rank_timeout=rank_timeout,
        )
        if check:
            results = check_sweep(chosen, output, options, file.name)
        else:
            results = run_sweep(chosen, output, options, file=file.name, progress=say)
        section = sweep_section(results)
        show(
            to_terminal(Document(section.title, (section,))),
            json_file,
            results.model_dump(mode="json"),
        )
        failed = [cell.name for cell in results.cells if cell.state == "failed"]
        if failed:
            say(
                f"{len(failed)} of {len(results.cells)} cells failed; the same command tries them again"
            )
            raise typer.Exit(1)


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|SWEEP|EVAL…", help="Folders of prune or sweep, files of eval --json."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="One self-contained page (.html), or Markdown (.md).",
        ),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option("--bench", metavar="FILE", help="Also what bench --json wrote.")
    ] = None,
    histogram: Annotated[
        str | None,
        typer.Option(
            "--histogram",
            metavar="LINEAR",
            help="For one RUN: weights and scores of this linear (see docs).",
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            "--dense",
            metavar="MODEL",
            help="For --histogram: the model that was pruned.",
            show_default="where the run found it",
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Of the page.", show_default="the first section's")
    ] = None,
    data_dir: arg.DataDir = None,
    json_file: arg.Json = None,
) -> None:
    """Show what runs, sweeps and evaluations found: on a page, as Markdown or, without -o, in the terminal."""
    with for_people(json_file):
        from prunus.model.checkpoint.atomic_files import write_text
        from prunus.report.page import document_json, to_html
        from prunus.report.plain import to_markdown, to_terminal
        from prunus.report.sources import read_document

        if output is not None and output.suffix not in (".html", ".md"):
            raise ValueError(f"-o {output}: the name must end in .html or .md")
        extra = [_histograms(paths, histogram, dense, data_dir)] if histogram is not None else []
        document = read_document(paths, bench, extra, title)
        if output is None:
            show(to_terminal(document), json_file, document_json(document))
            return
        page = to_html(document) if output.suffix == ".html" else to_markdown(document)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page)
        write_json(json_file, document_json(document))
        say(f"{output} is written, {len(page.encode()) / 1e6:.1f} MB")


def _histograms(paths: list[Path], linear: str, dense: str | None, data_dir: Path | None) -> Any:
    from prunus.evaluation.histograms import linear_histograms
    from prunus.pruning.job import RunOptions
    from prunus.report.histogram_section import histogram_section

    if len(paths) != 1:
        raise ValueError(f"--histogram looks into one run; got {len(paths)} paths")
    options = RunOptions(data_dir=data_dir)
    return histogram_section(linear_histograms(paths[0], linear, dense=dense, options=options))
