"""Runs that are interrupted after a given number of blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import shards


class StopError(Exception):
    """Interrupts a run from its progress callback."""


def stop_after(blocks: int):
    def progress(step):
        if step.done == blocks:
            raise StopError

    return progress


def interrupt(run: Callable[..., Any], *arguments: Any, after: int = 1, **options: Any) -> None:
    """Call a verb, and stop it after some blocks."""
    with pytest.raises(StopError):
        run(*arguments, progress=stop_after(after), **options)


def assert_resumes(run: Callable[..., Any], folder: Path, progress: Any = None) -> None:
    """Check that a run ends in the same bytes, whether it was stopped on its way or not.

    Args:
        run: takes the folder of its result, and a callback `progress`.
        folder: gets the results `whole` and `resumed`.
        progress: stops the run; by default after its first block.
    """
    run(folder / "whole")
    with pytest.raises(StopError):
        run(folder / "resumed", progress=progress or stop_after(1))
    run(folder / "resumed")
    assert shards(folder / "resumed") == shards(folder / "whole")
