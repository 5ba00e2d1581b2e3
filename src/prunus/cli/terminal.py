"""How a command prints: results on standard output, all else on standard error, figures as JSON.

Outline: `command` wraps a function for typer. `user_errors` and the functions after it turn
exceptions, warnings and Ctrl-C into lines. `log` and `note` write lines; `print_result`,
`print_text` and `write_json` write results.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console

from prunus.cli.flags import add_parameters, as_flags
from prunus.model.checkpoint import files
from prunus.reporting.console import TerminalConsole, printable, to_terminal
from prunus.reporting.console import progress_console as new_progress_console
from prunus.words import reason

#: The value of `--json` that stands for standard output.
STDOUT = Path("-")

#: Width of a table in a file or a pipe, which have no width of their own.
_PIPE_WIDTH = 160
#: The value of `--json` of the command that runs; None if it is not given.
_JSON: ContextVar[Path | None] = ContextVar("_JSON", default=None)
#: The value of `--quiet` of the command that runs.
_QUIET: ContextVar[bool] = ContextVar("_QUIET", default=False)
#: What holds after Ctrl-C, and after the loss of a rank, for commands that resume.
_RESUMES = "finished work is kept, and the same command continues from there"
#: The same for commands that do not resume.
_REPEATS = "no work is kept, and the same command starts from the beginning"
#: Errors about what was given: the user corrects it.
_CORRECTABLE = (
    *(ValueError, TypeError, NotImplementedError, ImportError, MemoryError),
    *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError),
)


def command(
    function: Callable[..., None], shared: dict[str, Any], resumes: bool = False
) -> Callable[..., None]:
    """A command as typer calls it: it reports errors, and gets only the options that were given.

    Args:
        function: The function of the command.
        shared: Name -> annotation of the options that commands share, as far as this one has them:
            `json_file`, `quiet` and `help_all`.
        resumes: The same command continues an interrupted run; decides what messages promise.
    """

    @functools.wraps(function)
    def run(*, json_file: Path | None = None, quiet: bool | None = None, **options: Any) -> None:
        json_before = _JSON.set(json_file)
        quiet_before = _QUIET.set(bool(quiet))
        try:
            with user_errors(_RESUMES if resumes else _REPEATS):
                _check_json_file(options.values())
                function(**{name: value for name, value in options.items() if value is not None})
        finally:
            _JSON.reset(json_before)
            _QUIET.reset(quiet_before)

    return add_parameters(run, shared, last=True)


@contextlib.contextmanager
def user_errors(afterwards: str) -> Iterator[None]:
    """Turn exceptions of a command into one line on standard error and an exit status.

    The status is 2 for what the user can correct, 130 for Ctrl-C, and 1 for everything else. Of
    several processes, rank 0 reports; another rank reports only an error of its own. After the loss
    of a rank the process ends at once, without the handlers of the interpreter. The environment
    variable PRUNUS_TRACEBACK turns this off and shows tracebacks.

    Args:
        afterwards: What holds after an interruption, as the end of the message.

    Raises:
        typer.Exit: With the status, once the line is written.
    """
    if os.environ.get("PRUNUS_TRACEBACK"):
        yield
        return
    try:
        with _warnings_as_lines():
            _silence_transformers()
            yield
    except _CORRECTABLE as error:
        log(f"error: {_for_users(error)}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        log(f"stopped; {afterwards}")
        raise typer.Exit(130) from None
    except typer.Exit:
        raise  # a command has said what is wrong, and how it ends
    except Exception as error:
        from prunus.distributed import OtherRankError, RankError

        if isinstance(error, OtherRankError):
            raise typer.Exit(1) from None
        if isinstance(error, RankError):
            log(f"error: {error}; {afterwards}")
            # An ordinary exit would wait in the process group for the rank that is lost.
            sys.stdout.flush()
            os._exit(1)
        # A full disk or a network says what it is. Of any other error, developers need to know
        # where.
        where = "" if isinstance(error, OSError) else " (PRUNUS_TRACEBACK=1 shows where)"
        log(f"error: {_for_users(error)}{where}")
        raise typer.Exit(1) from None


def _silence_transformers() -> None:
    """Keep progress bars and warnings of transformers off standard error, without importing it."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    else:
        os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """While active, a warning of prunus is one line on standard error, of rank 0 alone."""

    def show(message: Any, category: Any, filename: str, *place: Any) -> None:
        from prunus.distributed import is_rank_0

        if not Path(filename).is_relative_to(Path(__file__).parents[1]):
            shown(message, category, filename, *place)
        elif is_rank_0():
            log(f"warning: {as_flags(str(message))}")

    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _for_users(error: Exception) -> str:
    """The message of an error on the command line."""
    return as_flags(str(error) if isinstance(error, TypeError) else reason(error, most=10_000))


def _check_json_file(given: Iterable[Any] = ()) -> None:
    """Refuse a place for figures that cannot be written to, before the work that gives them.

    Args:
        given: The values of the other options, among which are the files that the command uses.
    """
    json_file = _JSON.get()
    if json_file is None or json_file == STDOUT:
        return
    files.check_place(json_file)
    if json_file.is_dir():
        raise ValueError(f"--json {json_file} is a folder; give the name of a file")
    values = itertools.chain(*(x if isinstance(x, list) else [x] for x in given))
    files.check_file_place(json_file, files.holds_figures, values)


def log(message: str) -> None:
    """Print a message as one line on standard error; processes other than rank 0 add their number.

    Where nobody reads standard error any more, the message is dropped, and the work continues.
    """
    prefix = "prunus:" if (rank := _rank()) == "0" else f"prunus, rank {rank}:"
    with contextlib.suppress(OSError):
        print(prefix, printable(" ".join(message.splitlines())), file=sys.stderr, flush=True)


def _rank() -> str:
    """The number of this process among those of torchrun, known before torch is loaded."""
    # A RANK without the other variables of torchrun means nothing; see `prunus.distributed`.
    return os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE") else "0"


def note(message: str) -> None:
    """Log what is being done, unless the user wants to hear of errors only."""
    if not _QUIET.get():
        log(message)


def is_quiet() -> bool:
    """Whether the user wants results and errors alone."""
    return _QUIET.get()


def progress_console() -> Console:
    """The console for progress; with --quiet, one that shows nothing."""
    return new_progress_console(quiet=_QUIET.get())


@contextlib.contextmanager
def shown_steps(
    showing: AbstractContextManager[Callable[..., None]], output: Path | None
) -> Iterator[dict[str, Callable[..., None]]]:
    """Show the steps of a run, and yield the options of the run that do so: announce and report.

    Args:
        showing: What `prunus.reporting.console` shows the steps with.
        output: The result. Without any step, a line says at the end that an earlier run finished
            it. None says nothing.
    """
    count = 0
    with showing as show:
        if _rank() == "0":
            show("loading libraries")

        def report(*step: Any) -> None:
            nonlocal count
            count += 1
            show(*step)

        yield {"announce": show, "report": report}
    if not count and output is not None and _rank() == "0":
        note(
            f"{output} was finished by an earlier run, and nothing was done now; these are its "
            "figures (--overwrite does the work again)"
        )


def print_result(content: Any, *shown: Any) -> None:
    """Write the figures of a command as JSON, then print them as tables. Only rank 0 does so.

    The order matters: JSON is safe before anything can go wrong with the terminal. If JSON cannot
    be written, the tables are still shown before the error.

    Args:
        content: The figures, as JSON can hold them, or a record of pydantic.
        shown: Tables and sections of `prunus.document`, in order.
    """
    from prunus.distributed import is_rank_0

    if not is_rank_0():
        return
    try:
        write_json(content)
    finally:
        with _reader() as stream:
            console = TerminalConsole(file=stream)
            if not console.is_terminal:
                console.width = max(console.width, _PIPE_WIDTH)  # long names stay whole
            console.print(to_terminal(*shown))


def print_text(text: str) -> bool:
    """Print text at once, with control characters escaped. Nothing is added to it.

    Returns:
        Whether the text still reaches somebody: False once the reader of a pipe or the terminal is
        gone, unless figures go to a file.
    """
    with _reader() as stream:
        stream.write(printable(text))
        stream.flush()  # fails here if nobody reads
        return True
    return _JSON.get() is not None


def write_json(content: Any) -> None:
    """Write the figures of a command as JSON, if the user gave a file; `-` is standard output.

    `content` is what JSON can hold, or a record of pydantic. The file is written atomically.
    """
    json_file = _JSON.get()
    if json_file is None:
        return
    content = content.model_dump(mode="json") if hasattr(content, "model_dump") else content
    if json_file == STDOUT:
        with _reader(sys.stdout) as stream:
            stream.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        return
    _check_json_file()  # again: the command may have written a file of this name
    json_file.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(json_file, content)


@contextlib.contextmanager
def _reader(stream: TextIO | None = None) -> Iterator[TextIO]:
    """Yield standard output, or standard error with `--json -`, and end quietly if nobody reads it.

    The reader of a pipe may leave (`| head`), and a terminal may be closed. By then the work is
    done and JSON is written, so this is no error. All later output is dropped.
    """
    stream = stream or (sys.stdout if _JSON.get() != STDOUT else sys.stderr)
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
