"""Progress of a run on standard error: a live bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from prunus.reporting.console import printable, progress_console
from prunus.runs.progress import LineInterval, eta

if TYPE_CHECKING:
    from prunus.recovery.training import Step as RecoveryStep
    from prunus.runs.progress import Progress as PruningStep

__all__ = ["show_pruning", "show_recovery"]


@contextlib.contextmanager
def show_pruning(
    title: str, console: Console | None = None
) -> Iterator[Callable[[PruningStep | str], None]]:
    """Show a pruning run: what it prepares, finished blocks, time left and peak memory.

    Args:
        title: precedes the bar.
        console: where to print; standard error by default.

    Yields:
        A function to call after every block, and before the first one with what is prepared.
    """
    console = console or progress_console()
    first: PruningStep | None = None

    def time_left(step: PruningStep) -> str:
        # The time before the first block (reading text, embeddings) is spent once, not per block.
        nonlocal first
        first = first or step
        return eta(step.done - first.done, step.total - first.done, step.seconds - first.seconds)

    if not console.is_terminal:

        def print_block(step: PruningStep | str) -> None:
            if isinstance(step, str):
                _print_line(console, step)
                return
            _print_line(
                console,
                f"[{step.done}/{step.total}] {step.message}; left {time_left(step)}; "
                f"peak {_gigabytes(step)}",
            )

        yield print_block
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("blocks"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    )
    with _live_bar(console, title, columns, None, state="…") as update:

        def update_block(step: PruningStep | str) -> None:
            if isinstance(step, str):
                update(state=step)
                return
            state = f"left {time_left(step)}, peak {_gigabytes(step)}"
            update(completed=step.done, total=step.total, state=state)

        yield update_block


@contextlib.contextmanager
def show_recovery(
    title: str, console: Console | None = None
) -> Iterator[Callable[[RecoveryStep], None]]:
    """Show a recovery: share of the budget, loss, and every evaluation.

    Args:
        title: precedes the bar.
        console: where to print; standard error by default.

    Yields:
        A function to call after every step.
    """
    console = console or progress_console()
    if not console.is_terminal:
        lines = LineInterval()

        def print_step(step: RecoveryStep) -> None:
            # Ordinary training steps are thinned out; evaluations and messages are always shown.
            is_ordinary = step.loss is not None and step.perplexity is None
            if is_ordinary and not lines.due():
                return
            lines.restart()
            _print_line(
                console,
                f"{step.fraction:4.0%} {step.tokens:,} tokens, {step.seconds:.0f} s: "
                f"{step.message}",
            )

        yield print_step
        return
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}{task.fields[message]}", markup=False),
    )
    with _live_bar(console, title, columns, 1.0, loss="", message="") as update:

        def update_step(step: RecoveryStep) -> None:
            fields: dict[str, Any] = {}
            if step.loss is not None:
                fields["loss"] = f"loss {step.loss:.3f} "
            if step.loss is None or step.perplexity is not None:
                fields["message"] = step.message
            update(completed=step.fraction, **fields)

        yield update_step


def _print_line(console: Console, text: str) -> None:
    """Print one line with the time of day; brackets in the text are not markup."""
    line = f"{time.strftime('%H:%M:%S')} {printable(text)}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _live_bar(
    console: Console,
    title: str,
    columns: tuple[ProgressColumn, ...],
    total: float | None,
    **fields: Any,
) -> Iterator[Callable[..., None]]:
    """Show a bar while the context is open, and yield the function that updates its fields."""
    name = TextColumn("{task.description}", markup=False)
    with Progress(name, *columns, console=console) as bar:
        task = bar.add_task(printable(title), total=total, **fields)

        def update(**changes: Any) -> None:
            bar.update(task, **changes)

        yield update


def _gigabytes(step: PruningStep) -> str:
    return f"{step.peak_memory / 1e9:.2f} GB"
