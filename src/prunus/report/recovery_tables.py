"""A recovery for the terminal: how it goes, and what came of it. Every figure is in its record too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from prunus.recovery import RecoveryRecord, Step

__all__ = ["recovery_table", "show_recovery"]

_SECONDS_BETWEEN_LINES = 15


def recovery_table(record: RecoveryRecord) -> Table:
    """Evaluations of the held-out text, or the blocks that were matched; totals below."""
    table = Table(title=f"{record.options.mode}, {record.source}", title_justify="left")
    _fill_with_blocks(table, record) if record.blocks else _fill_with_evaluations(table, record)
    totals, lines = record.totals, []
    if record.linears:
        lines.append(
            f"zeros kept: {totals['zeros']:,} of {totals['weights']:,} weights ({totals['sparsity']:.2%}) in "
            f"{len(record.linears)} pruned linears, compared weight by weight"
        )
    if totals.get("added_parameters"):
        lines.append(
            f"parameters added: {totals['added_parameters']:,} ({totals['added_share']:.3%})"
        )
    learnt = (
        f"learning from {record.teacher}"
        if record.teacher is not None
        else "learning from the text alone"
    )
    lines.append(
        f"text: {record.inputs.text}; {learnt}; computed in {record.inputs.dtype} on {record.inputs.device}"
    )
    lines.append(
        f"{totals['seconds']:.0f} s; peak memory {totals['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    if record.stopped is not None:
        lines.append(f"stopped early: {record.stopped}")
    if record.best == 0:
        lines.append(
            "nothing was better than the start, so the result is the start; try a smaller --learning-rate"
        )
    table.caption, table.caption_justify = "\n".join(lines), "left"
    return table


def _fill_with_evaluations(table: Table, record: RecoveryRecord) -> None:
    for column in ("step", "tokens", "training loss", "held-out perplexity", "seconds", ""):
        table.add_column(column, justify="right")
    for number, entry in enumerate(record.evaluations):
        table.add_row(
            str(entry.step),
            f"{entry.tokens:,}",
            f"{entry.training_loss:.4f}" if entry.training_loss is not None else "–",
            f"{entry.perplexity:.3f}",
            f"{entry.seconds:.0f}",
            "the result" if number == record.best else "",
        )


def _fill_with_blocks(table: Table, record: RecoveryRecord) -> None:
    for column in ("block", "error before", "error after", "steps", "seconds", ""):
        table.add_column(column, justify="left" if column in ("block", "") else "right")
    for block in record.blocks:
        errors = (
            f"{e:.3%}" if e is not None else "–" for e in (block.error_before, block.error_after)
        )
        table.add_row(
            block.name, *errors, str(block.steps), f"{block.seconds:.1f}", block.stopped or ""
        )
    table.add_section()
    means = (f"{record.totals[key]:.3%}" for key in ("mean_error_before", "mean_error_after"))
    table.add_row("mean", *means, str(sum(block.steps for block in record.blocks)), "", "")


@contextlib.contextmanager
def show_recovery(title: str, console: Console | None = None) -> Iterator[Callable[[Step], None]]:
    """Yield a function that shows one step: a live bar on a terminal, else a line now and then; standard error."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        last = 0.0

        def line(step: Step) -> None:
            nonlocal last
            # Steps may come many a second; what was measured is always shown.
            plain = step.loss is not None and step.perplexity is None
            if plain and time.monotonic() - last < _SECONDS_BETWEEN_LINES:
                return
            last = time.monotonic()
            console.print(
                f"{time.strftime('%H:%M:%S')} {step.share:4.0%} {step.tokens:,} tokens, {step.seconds:.0f} s: "
                f"{step.message}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}{task.fields[message]}"),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(title, total=1.0, loss="", message="")

        def update(step: Step) -> None:
            fields: dict[str, Any] = (
                {"loss": f"loss {step.loss:.3f} "} if step.loss is not None else {}
            )
            if step.loss is None or step.perplexity is not None:
                fields["message"] = step.message
            bar.update(task, completed=step.share, **fields)

        yield update
