"""Commands for many runs: `sweep` tries a grid, and `report` shows what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli.flags import opt, with_flags
from prunus.cli.terminal import log, note, print_result, write_json
from prunus.engine.run_options import RunOptions


@with_flags(RunOptions, without=("overwrite", "resume"))
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The grid of runs.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results.")],
    *,
    models: Annotated[
        list[str] | None,
        opt(
            "Use this model in place of those in the file; may be repeated.",
            "MODEL",
            names=("--model",),
        ),
    ] = None,
    check: Annotated[
        bool, opt("Check everything and list the cells; run and write nothing.", names=("--check",))
    ] = False,
    **options: Any,
) -> None:
    """Prune and score a grid of models, methods and sparsities.

    Scores are perplexity, KL divergence from the dense model, and accuracy on tasks.

    A killed sweep continues when you give the same command again.
    """
    from prunus.reporting.sweep_section import check_section, sweep_section
    from prunus.sweeping.grid import Sweep
    from prunus.sweeping.sweep import check_sweep
    from prunus.sweeping.sweep import sweep as run_sweep

    if check:
        chosen = Sweep.read(file, {"models": models})
        results = check_sweep(chosen, output, RunOptions.read(None, options), file.name)
    else:
        results = run_sweep(file, output, models=models or (), progress=note, **options)
    print_result(results, check_section(results) if check else sweep_section(results))
    failed = sum(cell.state == "failed" for cell in results.cells)
    if failed:
        log(f"{failed} of {len(results.cells)} cells failed; the same command tries them again")
        raise typer.Exit(1)


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|SWEEP|EVAL…",
            help="Folders of prune, compress, shrink or sweep, and files of eval --json.",
        ),
    ],
    output: Annotated[
        Path | None,
        opt(
            "Write a page (.html), Markdown (.md), one table (.csv), LaTeX (.tex), or a figure "
            "(.svg, .png, .pdf). Default: print tables.",
            "FILE",
            names=("--output", "-o"),
        ),
    ] = None,
    title: Annotated[
        str | None, opt("Set the title of the report. Default: that of its first section.", "TEXT")
    ] = None,
) -> None:
    """Show runs, sweeps and evaluations as tables or figures."""
    from prunus.reporting.page import document_json
    from prunus.reporting.write import report as write_report

    document = write_report(paths, output, title=title)
    content = document_json(document)
    if output is None:
        print_result(content, document)
        return
    write_json(content)
    note(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")
