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


def interrupt(
    run: Callable[..., Any], *arguments: Any, after: int = 1, progress: Any = None, **options: Any
) -> None:
    """Call a verb, and stop it after some blocks, or where `progress` raises."""
    with pytest.raises(StopError):
        run(*arguments, progress=progress or stop_after(after), **options)


def assert_resumes(run: Callable[..., Any], folder: Path, progress: Any = None) -> None:
    """Check that a run ends in the same bytes, whether it was stopped on its way or not.

    Args:
        run: takes the folder of its result, and a callback `progress`.
        folder: gets the results `whole` and `resumed`.
        progress: stops the run; by default after its first block.
    """
    run(folder / "whole")
    interrupt(run, folder / "resumed", progress=progress)
    run(folder / "resumed")
    assert shards(folder / "resumed") == shards(folder / "whole")


def timeless(value: Any) -> Any:
    """The content of a JSON file without times and peaks of memory, which always differ."""
    if isinstance(value, dict):
        words = ("seconds", "peak_memory_bytes")
        return {k: timeless(x) for k, x in value.items() if not any(word in k for word in words)}
    return [timeless(x) for x in value] if isinstance(value, list) else value


def assert_all_resumed(results: list[dict[str, Any]]) -> None:
    """Check that killed runs went on to the same bytes, and left nothing else behind.

    Args:
        results: what `kill_everywhere` of `kill_points.py` returns.
    """
    for result in results:
        assert (result["status"], result["equal"], result["left_behind"]) == (0, True, []), result
