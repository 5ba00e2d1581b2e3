"""Progress of a run on standard error: a live bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from prunus.reporting.console import printable, progress_console
from prunus.runs.progress import LineInterval, Shown, eta, terminal_bar

if TYPE_CHECKING:
    from prunus.recovery.training import Step as RecoveryStep
    from prunus.runs.progress import Progress as PruningStep


def show_pruning(
    title: str, console: Console | None = None
) -> contextlib.AbstractContextManager[Callable[[PruningStep | str], None]]:
    """Show a pruning run: what it prepares, finished blocks, time left and peak memory.

    Args:
        console: where to print; standard error by default.

    Returns:
        A context of a function to call after every block, and before the first one with what is
        prepared.
    """
    first: PruningStep | None = None

    def state(step: PruningStep) -> str:
        # The time before the first block (reading text, embeddings) is spent once, not per block.
        nonlocal first
        first = first or step
        left = eta(step.done - first.done, step.total - first.done, step.seconds - first.seconds)
        return f"left {left}; peak {step.peak_memory / 1e9:.2f} GB"

    def line(step: PruningStep | str) -> str:
        if isinstance(step, str):
            return step
        return f"[{step.done}/{step.total}] {step.message}; {state(step)}"

    def bar(step: PruningStep | str) -> Shown:
        if isinstance(step, str):
            return Shown(None, step)
        return Shown(step.done / step.total, f"{step.done}/{step.total} blocks; {state(step)}")

    return _shown(title, console, line, bar)


def show_recovery(
    title: str, console: Console | None = None
) -> contextlib.AbstractContextManager[Callable[[RecoveryStep], None]]:
    """Show a recovery: share of the budget, loss, and every evaluation.

    Args:
        console: where to print; standard error by default.

    Returns:
        A context of a function to call after every step.
    """
    lines, evaluation = LineInterval(), ""

    def line(step: RecoveryStep) -> str | None:
        # Ordinary training steps are thinned out; evaluations and messages are always shown.
        is_ordinary = step.loss is not None and step.perplexity is None
        if is_ordinary and not lines.due():
            return None
        lines.restart()
        return f"{step.fraction:4.0%} {step.tokens:,} tokens, {step.seconds:.0f} s: {step.message}"

    def bar(step: RecoveryStep) -> Shown:
        nonlocal evaluation
        if step.loss is None or step.perplexity is not None:
            evaluation = step.message
        loss = "" if step.loss is None else f"loss {step.loss:.3f} "
        return Shown(min(step.fraction, 1.0), f"{step.fraction:.0%} {loss}{evaluation}")

    return _shown(title, console, line, bar)


@contextlib.contextmanager
def _shown(
    title: str,
    console: Console | None,
    line: Callable[[Any], str | None],
    bar: Callable[[Any], Shown],
) -> Iterator[Callable[[Any], None]]:
    """A live bar on a terminal, or lines with the time of day, without those that are None."""
    console = console or progress_console()
    if console.is_terminal:
        with terminal_bar(printable(title), console) as update:
            yield lambda step: update(bar(step))
        return

    def print_line(step: Any) -> None:
        if (text := line(step)) is not None:
            text = f"{time.strftime('%H:%M:%S')} {printable(text)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    yield print_line
