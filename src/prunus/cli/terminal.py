"""How a verb prints: results on standard output, all else on standard error, figures as JSON."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from prunus.cli.flags import as_flags

if TYPE_CHECKING:
    from rich.console import Console

#: The value of `--json` that stands for standard output.
STDOUT = Path("-")

#: Width of a table in a file or a pipe, which have no width of their own.
_PIPE_WIDTH = 160
_QUIET: ContextVar[bool] = ContextVar("_QUIET", default=False)
_RESUMABLE = "finished work is kept, and the same command continues from there"


@contextlib.contextmanager
def user_errors(json_file: Path | None) -> Iterator[None]:
    """Turn exceptions of a verb into one line on standard error and an exit status.

    The status is 2 for what the user can correct, 130 for Ctrl-C, and 1 for everything else. With
    several ranks, rank 0 reports; another rank reports only an error of its own. The environment
    variable PRUNUS_TRACEBACK turns this off and shows tracebacks.

    Args:
        json_file: value of `--json`; what cannot be written is refused before any work.
    """
    if os.environ.get("PRUNUS_TRACEBACK"):
        yield
        return
    try:
        with _interruptible():
            _silence_transformers()
            _check_json_file(json_file)
            yield
    except (
        ValueError,
        TypeError,
        FileNotFoundError,
        FileExistsError,
        NotImplementedError,
        ImportError,
        MemoryError,
    ) as error:
        log(f"error: {as_flags(str(error))}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        log(f"stopped; {_RESUMABLE}")
        raise typer.Exit(130) from None
    except typer.Exit:
        raise  # a verb has said what is wrong, and how it ends
    except Exception as error:
        _exit_after(error)


def _exit_after(error: Exception) -> None:
    """Report an error that the user cannot correct, and exit with status 1."""
    from prunus.distributed import OtherRankError, RankError

    if isinstance(error, OtherRankError):
        raise typer.Exit(1) from None
    if isinstance(error, RankError):
        log(f"error: {error}; {_RESUMABLE}")
        # An ordinary exit would wait in the process group for the rank that is lost.
        sys.stdout.flush()
        os._exit(1)
    log(f"error: {type(error).__name__}: {error} (PRUNUS_TRACEBACK=1 shows where)")
    raise typer.Exit(1) from None


def _check_json_file(json_file: Path | None) -> None:
    """Refuse a place for figures that cannot be written to, before the work that gives them."""
    if json_file is None or json_file == STDOUT:
        return
    if json_file.is_dir():
        raise ValueError(f"--json {json_file} is a folder; give the name of a file")
    above = next(path for path in json_file.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"--json {json_file} cannot be written, because {above} is not a folder that you may "
            "write to; choose another place"
        )


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """While active, Ctrl-C always raises KeyboardInterrupt, also when it arrives inside C code.

    An interrupt that arrives while torch or safetensors check an argument surfaces as a TypeError
    about that argument. The signal handler remembers the interrupt, so that we can tell.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    interrupted = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def log(message: str) -> None:
    """Print a message as one line on standard error; ranks other than 0 add their number.

    Where nobody reads standard error any more, the message is dropped, and the work continues.
    """
    from prunus.reporting.console import printable

    # A RANK without the other variables of torchrun means nothing; see `prunus.distributed`.
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE") else "0"
    prefix = "prunus:" if rank == "0" else f"prunus, rank {rank}:"
    with contextlib.suppress(OSError):
        print(prefix, printable(" ".join(message.splitlines())), file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Log what is being done, unless the user wants to hear of errors only."""
    if not _QUIET.get():
        log(message)


def is_quiet() -> bool:
    """Whether the user wants results and errors alone."""
    return _QUIET.get()


def progress_console() -> Console:
    """Return the console for progress; with --quiet, one that shows nothing."""
    from prunus.reporting import console

    if _QUIET.get():
        return console.TerminalConsole(quiet=True, force_terminal=False)
    return console.progress_console()


def may_be_quiet(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the option --quiet. Its result and its errors are shown all the same."""
    signature = inspect.signature(verb, eval_str=True)
    option = Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", show_default=False, help="Show the result and errors, no progress."
        ),
    ]
    parameters = [
        *signature.parameters.values(),
        inspect.Parameter(
            "quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option
        ),
    ]

    @functools.wraps(verb)
    def quietly(*arguments: Any, quiet: bool = False, **options: Any) -> None:
        before = _QUIET.set(quiet)
        try:
            verb(*arguments, **options)
        finally:
            _QUIET.reset(before)

    quietly.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    quietly.__annotations__ = {p.name: p.annotation for p in parameters}
    return quietly


class Counted:
    """Passes every call on to `progress`, and counts the calls.

    >>> seen = []
    >>> steps = Counted(seen.append)
    >>> steps("a step")
    >>> steps.count, seen
    (1, ['a step'])
    """

    def __init__(self, progress: Callable[..., None]) -> None:
        self._progress = progress
        self.count = 0

    def __call__(self, *step: Any) -> None:
        """Take one step."""
        self.count += 1
        self._progress(*step)

    def log_if_none(self, output: Path) -> None:
        """Log that an earlier run had finished `output`, if there was no step."""
        from prunus.distributed import is_rank_0

        if not self.count and is_rank_0():
            note(
                f"{output} was finished by an earlier run, and nothing was done now; these are its "
                "figures (--overwrite does the work again)"
            )


def carry_out(
    run: Callable[..., Any],
    title: str,
    work: tuple[Any, Any, Any],
    given: dict[str, Any],
    json_file: Path | None,
    table: Callable[[Any], Any],
) -> None:
    """Run a verb with a progress bar, and print its record as a table.

    Args:
        run: Called with the parts of `work` and the options of the run; returns the record.
    """
    from prunus.reporting.progress import show_pruning
    from prunus.runs.options import RunOptions

    with show_pruning(title, progress_console()) as progress:
        steps = Counted(progress)
        how = RunOptions.read(None, given | {"announce": progress, "report": steps})
        record = run(*work, how)
    steps.log_if_none(work[1])
    print_result(table(record), json_file, record.model_dump(mode="json"))


def log_step(done: int, total: int, name: str) -> None:
    """Log that step `done` of `total` is finished."""
    note(f"{done} of {total}: {name}")


def print_result(shown: Any, json_file: Path | None, content: Any) -> None:
    """Write the figures of a verb as JSON, then print them as a table. Only rank 0 does so.

    The order matters: JSON is safe before anything can go wrong with the terminal. Where JSON
    cannot be written, the table is still shown before the error.

    Args:
        shown: a section, a table or facts of `prunus.runs.document`; or a list of these.
        json_file: value of `--json`. With `-`, the table is printed on standard error.
    """
    from prunus.distributed import is_rank_0
    from prunus.reporting.console import TerminalConsole
    from prunus.reporting.plain import to_terminal

    if not is_rank_0():
        return
    try:
        write_json(json_file, content)
    finally:
        with _goes_to_reader(json_file) as stream:
            console = TerminalConsole(file=stream)
            if not console.is_terminal:
                console.width = max(console.width, _PIPE_WIDTH)  # long names stay whole
            console.print(to_terminal(*(shown if isinstance(shown, list) else [shown])))


def print_summary(summary: dict[str, Any], folder: Path, json_file: Path | None) -> None:
    """Write what a new folder holds as JSON, and print the same in one line."""
    write_json(json_file, summary)
    print_text(f"{folder}: {', '.join(f'{key} {value}' for key, value in summary.items())}\n")


def print_text(text: str, json_file: Path | None = None) -> bool:
    """Print text on standard output at once, with control characters escaped.

    Args:
        json_file: value of `--json`. With `-`, the text is printed on standard error.

    Returns:
        Whether somebody reads it: false once the reader of a pipe or the terminal is gone.
    """
    from prunus.reporting.console import printable

    with _goes_to_reader(json_file) as stream:
        stream.write(printable(text))
        stream.flush()  # fails here if nobody reads
        return True
    return False


def write_json(json_file: Path | None, content: Any) -> None:
    """Write the figures of a verb as JSON, if the user gave a file; `-` is standard output."""
    if json_file is None:
        return
    if json_file == STDOUT:
        with _goes_to_reader(None) as stream:
            stream.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        return
    from prunus.model.checkpoint import atomic_files

    json_file.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_json(json_file, content)


@contextlib.contextmanager
def _goes_to_reader(json_file: Path | None) -> Iterator[TextIO]:
    """Yield the stream for tables and text, and end quietly where its reader is gone.

    The reader of a pipe may leave (`| head`), and a terminal may be closed. By then the work is
    done and JSON is written, so this is no error. All later output is dropped.
    """
    stream = sys.stdout if json_file != STDOUT else sys.stderr
    try:
        yield stream
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # What is still buffered would fail again when the interpreter exits.
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
