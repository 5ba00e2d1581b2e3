"""How a verb speaks: results on standard output, everything else on standard error, figures as JSON."""

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

__all__ = ["for_people", "say", "say_step", "show", "tell", "write_json"]


@contextlib.contextmanager
def for_people(json_file: Path | None) -> Iterator[None]:
    """Errors as one line and an exit status: 2 for what the user can put right, 1 for the rest, 130 for Ctrl-C.

    Of several ranks the first speaks; the others only where they have something of their own to say.
    """
    if os.environ.get("PRUNUS_TRACEBACK"):
        yield
        return
    try:
        with _interruptible():
            _quiet_transformers()
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
    ) as fault:
        say(f"error: {fault}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say("stopped; what is finished is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    except (OSError, MemoryError, RuntimeError) as fault:
        from prunus.distributed import OtherRankError, RankError

        if isinstance(fault, OtherRankError):
            raise typer.Exit(1) from None
        if isinstance(fault, RankError):
            say(
                f"error: {fault}. What is finished is kept, and the same command goes on from there"
            )
            # Not by way of the interpreter's end, where the process group would wait for the rank that is lost.
            sys.stdout.flush()
            os._exit(1)
        say(f"error: {type(fault).__name__}: {fault} (PRUNUS_TRACEBACK=1 shows where)")
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """While active, Ctrl-C ends as a KeyboardInterrupt, even where C code takes it for an error of its own.

    An interrupt that arrives while torch or safetensors look at an argument is reported as a TypeError about it.
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
    except Exception as fault:
        if interrupted:
            raise KeyboardInterrupt from fault
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def say(message: str) -> None:
    """A line on standard error; ranks other than the first give their number."""
    rank = os.environ.get("RANK", "0")
    who = "prunus:" if rank == "0" else f"prunus, rank {rank}:"
    print(who, " ".join(message.splitlines()), file=sys.stderr, flush=True)


def say_step(done: int, total: int, name: str) -> None:
    """A line of progress."""
    say(f"{done} of {total}: {name}")


def show(table: Any, json_file: Path | None, content: Any) -> None:
    """A table on standard output, and its figures as JSON where they are asked for; of several ranks from the first."""
    from rich.console import Console

    from prunus.distributed import is_rank_0

    if not is_rank_0():
        return

    console = Console()
    if not console.is_terminal:
        console.width = max(
            console.width, 160
        )  # a file or a pipe has no width: names need not be cut
    console.print(table)
    write_json(json_file, content)


def tell(summary: dict[str, Any], dest: Path, json_file: Path | None) -> None:
    """A folder that was made and what is in it, in one line, and as JSON where that is asked for."""
    print(f"{dest}: {', '.join(f'{key} {value}' for key, value in summary.items())}")
    write_json(json_file, summary)


def write_json(json_file: Path | None, content: Any) -> None:
    """The figures of a verb as JSON, where they are asked for."""
    if json_file is not None:
        from prunus.model.checkpoint import atomic_files as files

        json_file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(json_file, content)
