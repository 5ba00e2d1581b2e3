"""How a verb prints: results on standard output, all else on standard error, figures as JSON."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import typer

__all__ = ["log", "log_step", "print_result", "print_summary", "user_errors", "write_json"]

#: Width of a table in a file or a pipe, which have no width of their own.
_PIPE_WIDTH = 160
_RESUMABLE = "finished work is kept, and the same command continues from there"


@contextlib.contextmanager
def user_errors(json_file: Path | None) -> Iterator[None]:
    """Turn exceptions of a verb into one line on standard error and an exit status.

    The status is 2 for what the user can correct, 130 for Ctrl-C, and 1 for everything else. With
    several ranks, rank 0 reports; another rank reports only an error of its own. The environment
    variable PRUNUS_TRACEBACK turns this off and shows tracebacks.

    Args:
        json_file: value of `--json`; a folder is refused before the verb does any work.
    """
    if os.environ.get("PRUNUS_TRACEBACK"):
        yield
        return
    try:
        with _interruptible():
            _silence_transformers()
            if json_file is not None and json_file.is_dir():
                raise ValueError(f"--json {json_file} is a folder; give the name of a file")
            yield
    except (
        ValueError,
        TypeError,
        FileNotFoundError,
        FileExistsError,
        NotImplementedError,
        ImportError,
    ) as error:
        log(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        log(f"stopped; {_RESUMABLE}")
        raise typer.Exit(130) from None
    except (OSError, MemoryError, RuntimeError) as error:
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
    """Print a message as one line on standard error; ranks other than 0 add their number."""
    rank = os.environ.get("RANK", "0")
    prefix = "prunus:" if rank == "0" else f"prunus, rank {rank}:"
    print(prefix, " ".join(message.splitlines()), file=sys.stderr, flush=True)


def log_step(done: int, total: int, name: str) -> None:
    """Log that step `done` of `total` is finished."""
    log(f"{done} of {total}: {name}")


def print_result(table: Any, json_file: Path | None, content: Any) -> None:
    """Print a table on standard output, and write its figures as JSON. Only rank 0 does so.

    Args:
        table: anything that rich can print.
        json_file: value of `--json`.
        content: the figures, as JSON can hold them.
    """
    from rich.console import Console

    from prunus.distributed import is_rank_0

    if not is_rank_0():
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)  # long names stay whole
    console.print(table)
    write_json(json_file, content)


def print_summary(summary: dict[str, Any], folder: Path, json_file: Path | None) -> None:
    """Print in one line what a new folder holds, and write the same as JSON."""
    print(f"{folder}: {', '.join(f'{key} {value}' for key, value in summary.items())}")
    write_json(json_file, summary)


def write_json(json_file: Path | None, content: Any) -> None:
    """Write the figures of a verb as JSON, if the user gave a file."""
    if json_file is not None:
        from prunus.model.checkpoint import atomic_files

        json_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_json(json_file, content)
