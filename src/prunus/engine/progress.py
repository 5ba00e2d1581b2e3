"""What a run says of its progress, and the bar that shows it where a person looks.

The command line has displays of its own, see `prunus.reporting.console`. A function that is called
from Python shows a bar if standard error is a terminal, or if the code runs in a notebook.
Everywhere else nothing is printed. Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

#: Seconds between two lines of progress where there is no bar, as in a log file.
SECONDS_BETWEEN_LINES = 15.0
#: How the unit of what is done before the first block begins.
PREPARATION = "steps of "


@dataclass(frozen=True)
class Progress:
    """One step of a run, for a progress display.

    Attributes:
        done: Finished units, out of `total`. A unit is a block, or one of the steps of a
            measurement before the first block, which all take about the same time.
        total: All units.
        message: What just happened.
        seconds: Seconds since the start of the run, or of the measurement.
        left: Seconds until all units are done; None if nothing is known of it.
        peak_memory: Peak memory of this process so far, in bytes; on a GPU that of the device.
        unit: What is counted, in the plural.
    """

    done: int
    total: int
    message: str
    seconds: float
    peak_memory: int
    unit: str = "blocks"
    left: float | None = None

    @property
    def state(self) -> str:
        """The time left, if it is known, and the peak memory."""
        left = "" if self.left is None else f"left {clock(self.left)}; "
        return f"{left}peak {self.peak_memory / 1e9:.2f} GB"


@dataclass
class LineInterval:
    """Says when the next line is due. Steps may come many times a second.

    Attributes:
        seconds: Least time between two lines.
        clock: Returns the time in seconds; a test gives one of its own.

    >>> times = iter([0.0, 5.0, 20.0])
    >>> interval = LineInterval(15.0, clock=lambda: next(times))
    >>> interval.restart()
    >>> interval.due(), interval.due()
    (False, True)
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


def clock(seconds: float) -> str:
    """A time in hours, minutes and seconds.

    >>> clock(90.0), clock(7200.0)
    ('1:30', '2:00:00')
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Shown(NamedTuple):
    """What a bar shows.

    Attributes:
        share: The share of the work that is done, from 0 to 1; None where that is not known.
        state: A text at the end of the bar.
    """

    share: float | None
    state: str


@contextlib.contextmanager
def terminal_bar(title: str, console: Any = None) -> Iterator[Callable[[Shown], None]]:
    """Show a bar on a terminal while the `with` lasts.

    Args:
        title: A text at the beginning of the bar.
        console: A console of rich; None for standard error.

    Yields:
        A function that shows the next state.
    """
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Elapsed(ProgressColumn):
        """The time since the bar is there. rich's own stands still once a phase has ended."""

        def render(self, task: Any) -> Text:
            return Text(clock(task.elapsed or 0.0), style="progress.elapsed")

    state = TextColumn("{task.fields[state]}", markup=False)
    console = console or Console(stderr=True, markup=False, emoji=False)
    with Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        Elapsed(),
        state,
        console=console,
    ) as bar:
        task = bar.add_task(title, total=None, state="loading")
        last = Shown(None, "")

        def update(shown: Shown) -> None:
            nonlocal last
            last = last if shown.share is None else shown
            share = {} if shown.share is None else {"completed": shown.share, "total": 1.0}
            if not share:
                bar.tasks[0].total = None  # The bar of the phase before would still be full.
            bar.update(task, state=one_line(shown.state), **share)  # type: ignore[arg-type]

        yield update
        update(last)  # A bar that stays on the screen is that of the last phase with a share.


def one_line(text: str) -> str:
    """The text with every character replaced that could command a terminal, line ends included.

    Names of tensors and models come from files of others.

    >>> one_line("name\\x1b[2J")
    'name�[2J'
    """
    return "".join(letter if letter.isprintable() else "�" for letter in text)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def shows_progress(title: str, read: Callable[..., Shown]) -> Callable[[_Function], _Function]:
    """Let a function's keyword `progress` be True, which shows a bar, or a function to call.

    The decorated function gets a function to call after every step; None with False and None, and
    where nobody would see a bar.

    Args:
        title: A text at the beginning of the bar.
        read: Turns the arguments of a report into what the bar shows.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def showing(*arguments: Any, progress: Any = True, **options: Any) -> Any:
            with reporter(title, read, progress) as report:
                return function(*arguments, progress=report, **options)

        return cast(_Function, showing)

    return decorate


@contextlib.contextmanager
def reporter(
    title: str, read: Callable[..., Shown], progress: Any
) -> Iterator[Callable[..., None] | None]:
    """Yield what is called after every step; None where nobody would see it."""
    from prunus.distributed import is_rank_0  # It imports torch.

    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    in_notebook = getattr(shell, "kernel", None) is not None
    somebody_looks = in_notebook or (sys.stderr is not None and sys.stderr.isatty())
    if callable(progress):
        yield progress
    elif progress and somebody_looks and is_rank_0():
        with (_notebook_bar if in_notebook else terminal_bar)(title) as update:
            yield lambda *step: update(read(*step))
    else:
        yield None


def pruning_step(step: Progress | str) -> Shown:
    """What a bar shows after a block, or while a text says what is being prepared.

    >>> pruning_step(Progress(1, 4, "block 0 pruned", 10.0, peak_memory=2 * 10**9, left=30.0))
    Shown(share=0.25, state='1/4 blocks; left 0:30; peak 2.00 GB')
    """
    if isinstance(step, str):
        return Shown(None, step)
    return Shown(step.done / step.total, f"{step.done}/{step.total} {step.unit}; {step.state}")


def window_step(done: float, total: float) -> Shown:
    """What a bar shows after some windows.

    >>> window_step(3, 12)
    Shown(share=0.25, state='3/12 windows')
    """
    return Shown(done / total, f"{done:.0f}/{total:.0f} windows")


@contextlib.contextmanager
def _notebook_bar(title: str) -> Iterator[Callable[[Shown], None]]:
    """Show a bar of tqdm, which a notebook displays with widgets where it has them."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    form = "{desc} {percentage:.0f}% {bar} {elapsed}{postfix}"
    with tqdm(total=1.0, desc=one_line(title), bar_format=form, miniters=0) as bar:
        last = Shown(None, "")

        def update(shown: Shown) -> None:
            nonlocal last
            last = last if shown.share is None else shown
            bar.set_postfix_str(one_line(shown.state), refresh=False)
            bar.update(0 if shown.share is None else shown.share - bar.n)

        yield update
        update(last)
