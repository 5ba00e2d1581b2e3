"""Progress of a run: a live bar on a terminal, a plain line per step elsewhere. Both go to standard error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prunus.pruning.run import Progress as Step

__all__ = ["eta", "show_progress"]


def eta(done: int, total: int, seconds: float) -> str:
    """Time left in words, from `done` of `total` steps in `seconds`."""
    if done == 0:
        return "unknown"
    left = round(seconds / done * (total - done))
    hours, rest = divmod(left, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


@contextlib.contextmanager
def show_progress(title: str, console: Console | None = None) -> Iterator[Callable[[Step], None]]:
    """Yield a function that shows one step of a run."""
    console = console or Console(stderr=True)
    first: Step | None = None

    def left(step: Step) -> str:
        # From the first step on: what came before it (reading text, embeddings) is done once, not per block.
        nonlocal first
        first = first or step
        return eta(step.done - first.done, step.total - first.done, step.seconds - first.seconds)

    if not console.is_terminal:

        def line(step: Step) -> None:
            console.print(
                f"{time.strftime('%H:%M:%S')} [{step.done}/{step.total}] {step.message}; "
                f"left {left(step)}; peak {step.peak_memory / 1e9:.2f} GB",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("blocks"),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[eta]}, peak {task.fields[peak]}"),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(title, total=None, eta="…", peak="…")

        def update(step: Step) -> None:
            bar.update(
                task,
                completed=step.done,
                total=step.total,
                eta=left(step),
                peak=f"{step.peak_memory / 1e9:.2f} GB",
            )

        yield update
