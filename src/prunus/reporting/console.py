"""The terminal as prunus writes to it: documents as tables, and the progress of a run.

Names of folders, checkpoints, datasets and tasks are written by strangers, and so are reports and
generated text. rich reads square brackets as markup, and a terminal obeys escape sequences. Both
end here: everything that prunus shows is printed by `TerminalConsole` or `printable`.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from prunus.document import Document, DocumentPart, Facts, Section, Table, text_of
from prunus.engine.progress import (
    PREPARATION,
    LineInterval,
    Progress,
    Shown,
    pruning_step,
    terminal_bar,
)

if TYPE_CHECKING:
    from prunus.training.loop import Step as RecoveryStep

# Control characters other than tab and newline, marks that reorder text, and lone surrogates, which
# stand for the bytes of a file name that is not UTF-8 and cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Names of rows up to this width stay on one line, so that they can be copied.
_NAME_WIDTH = 32


def printable(text: str) -> str:
    r"""Escape the characters of `text` that a terminal obeys or cannot show.

    >>> print(printable("model\x1b[2J, caf\u00e9\x9b31m"))
    model\x1b[2J, café\x9b31m
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class TerminalConsole(Console):
    """A console that reads no text as markup or emoji, and that passes on no control character.

    Args:
        options: Arguments of `rich.console.Console`. `markup` and `emoji` may be switched on again.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into text. rich also measures the result, so it is escaped here already."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Turn anything into segments, of which only rich's own control codes stay as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        """Raise the error again: the caller knows what is lost. rich would end the process."""
        raise  # noqa: PLE0704 (rich calls this while it handles the error)


class _ForgivingStream:
    """A text stream that drops what the stream below it does not take.

    Progress is not a result: a run does not end because nobody reads its progress any more. All
    other attributes are those of the stream below.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress_console(quiet: bool = False) -> Console:
    """Return a console on standard error that works on when nobody reads it any more.

    Args:
        quiet: Whether it shows nothing.
    """
    return TerminalConsole(file=_ForgivingStream(sys.stderr), quiet=quiet)


def to_terminal(*shown: Document | Section | DocumentPart) -> Group:
    """What rich can print of documents, sections or parts of them, in their order.

    Charts are left out: they are on the page alone. The text is escaped already.
    """
    lines: list[RenderableType] = []
    for part in shown:
        if isinstance(part, Document):
            lines.append(to_terminal(*part.sections))
        elif isinstance(part, Section):
            lines.append(_text(part.title, style="bold"))
            lines += [_text(part.lead)] if part.lead else []
            lines += [Text(), to_terminal(*part.parts, *part.details)]
        elif isinstance(part, Facts):
            lines += [_facts(part), Text()]
        elif isinstance(part, Table):
            lines += [_table(part), *([_text(part.note)] if part.note else []), Text()]
    return Group(*lines)


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style)


def _facts(facts: Facts) -> RichTable:
    table = RichTable(title=_text(facts.title), title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items:
        table.add_row(_text(name), _text(value))
    return table


def _table(part: Table) -> RichTable:
    table = RichTable(title=_text(part.title), title_justify="left")
    rows = [cells(row, part) for row in (*part.rows, *([part.total] if part.total else []))]
    # The first column names the rows. Where a table is too wide, other columns are folded first.
    widest = max((len(row[0]) for row in rows), default=0)
    for index, column in enumerate(part.columns):
        table.add_column(
            _text(column.title),
            justify="left" if column.form is None else "right",
            overflow="fold",
            min_width=None if index else min(widest, _NAME_WIDTH),
        )
    for index, row in enumerate(rows):
        if index == len(part.rows):
            table.add_section()
        table.add_row(*map(_text, row))
    return table


def cells(row: tuple[object, ...], part: Table) -> list[str]:
    """A row of a table as text, one per column; see `text_of`."""
    return [text_of(value, column.form) for value, column in zip(row, part.columns, strict=True)]


def show_pruning(
    title: str, console: Console | None = None
) -> contextlib.AbstractContextManager[Callable[[Progress | str], None]]:
    """Show a run: what it prepares, finished blocks, the time left, and peak memory.

    Args:
        title: Stands before the bar.
        console: Where to print; None for `progress_console`.

    Returns:
        A context manager. It yields a function to call after every block, and before the first one
        with a line of text on what is prepared.
    """

    def read(step: Progress | str) -> tuple[str, Shown, bool]:
        shown = pruning_step(step)
        if isinstance(step, str):
            return step, shown, False
        line = f"[{step.done}/{step.total}] {step.message}; {step.state}"
        return line, shown, step.unit.startswith(PREPARATION)

    return _shown(title, console, read)


def show_recovery(
    title: str, console: Console | None = None
) -> contextlib.AbstractContextManager[Callable[[RecoveryStep | str], None]]:
    """Show a recovery: the share of the budget that is spent, loss, and every evaluation.

    Args:
        title: Stands before the bar.
        console: Where to print; None for `progress_console`.

    Returns:
        A context manager. It yields a function to call after every step of training, and before
        the first one with a line of text on what is prepared.
    """
    evaluation = ""

    def read(step: RecoveryStep | str) -> tuple[str, Shown, bool]:
        nonlocal evaluation
        if isinstance(step, str):
            return step, Shown(None, step), False
        is_ordinary = step.loss is not None and step.perplexity is None
        evaluation = evaluation if is_ordinary else step.message
        loss = "" if step.loss is None else f"loss {step.loss:.3f} "
        shown = Shown(min(step.fraction, 1.0), f"{step.fraction:.0%} {loss}{evaluation}")
        spent = f"{step.fraction:4.0%} {step.tokens:,} tokens, {step.seconds:.0f} s"
        return f"{spent}: {step.message}", shown, is_ordinary

    return _shown(title, console, read)


@contextlib.contextmanager
def _shown(
    title: str, console: Console | None, read: Callable[[Any], tuple[str, Shown, bool]]
) -> Iterator[Callable[[Any], None]]:
    """Yield a function that shows a step: a live bar on a terminal, else a line with the time.

    `read` turns a step into a line, the state of the bar, and whether such steps are frequent: they
    may come many times a second, so most of their lines are left out.
    """
    console = console or progress_console()
    if console.is_terminal:
        with terminal_bar(printable(title), console) as update:
            yield lambda step: update(read(step)[1])
        return

    interval = LineInterval()

    def print_line(step: Any) -> None:
        line, _, is_frequent = read(step)
        if is_frequent:
            if not interval.due():
                return
            interval.restart()
        text = f"{time.strftime('%H:%M:%S')} {printable(line)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    yield print_line
