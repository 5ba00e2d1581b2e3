"""What a run says of its progress, and how often where no live bar is shown."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class Progress:
    """One step of a run, for a progress display.

    Attributes:
        done: Finished blocks, out of `total`.
        total: Blocks of the model.
        message: What just happened.
        seconds: Since the start of the run.
        peak_memory: Of this process so far, in bytes; on a GPU the memory of the device.
    """

    done: int
    total: int
    message: str
    seconds: float
    peak_memory: int


@dataclass
class LineInterval:
    """Says when the next line is due. Steps may come many times a second.

    >>> now = 100.0
    >>> lines = LineInterval(15.0, clock=lambda: now)
    >>> lines.due()
    True
    >>> lines.restart()
    >>> now = 110.0
    >>> lines.due()
    False
    >>> now = 115.0
    >>> lines.due()
    True

    Attributes:
        seconds: shortest time between two lines.
        clock: a function that returns the time in seconds.
    """

    seconds: float = SECONDS_BETWEEN_LINES
    clock: Callable[[], float] = time.monotonic
    _last: float = field(default=float("-inf"), init=False)

    def due(self) -> bool:
        """Whether enough time has passed since the last line."""
        return self.clock() - self._last >= self.seconds

    def restart(self) -> None:
        """Count from now on: a line was written."""
        self._last = self.clock()


def eta(done: int, total: int, seconds: float) -> str:
    """Time left, if the remaining steps take as long as the finished ones.

    Returns:
        Hours, minutes and seconds, or "unknown" before the first step.

    >>> eta(done=1, total=4, seconds=30.0)
    '1:30'
    >>> eta(done=1, total=101, seconds=72.0)
    '2:00:00'
    >>> eta(done=0, total=4, seconds=3.0)
    'unknown'
    """
    if done == 0:
        return "unknown"
    left = round(seconds / done * (total - done))
    hours, rest = divmod(left, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Shown(NamedTuple):
    """What a bar shows.

    Attributes:
        share: of the work that is done, from 0 to 1; None where it is not known.
        state: a few words next to the bar.
    """

    share: float | None
    state: str


@contextlib.contextmanager
def terminal_bar(title: str, console: Any = None) -> Iterator[Callable[[Shown], None]]:
    """Show a bar on a console of rich, by default on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    state = TextColumn("{task.fields[state]}", markup=False)
    console = console or Console(stderr=True, markup=False, emoji=False)
    with Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        state,
        console=console,
    ) as bar:
        task = bar.add_task(title, total=None, state="…")

        def update(shown: Shown) -> None:
            known = {} if shown.share is None else {"completed": shown.share, "total": 1.0}
            bar.update(task, state=one_line(shown.state), **known)  # type: ignore[arg-type]

        yield update


def one_line(text: str) -> str:
    """Names come from files of others: no character of them commands a terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)
