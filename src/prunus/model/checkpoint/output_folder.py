"""The folder that a result is to go to, looked at before any work: is it apart, vacant, large enough, whole?"""

from __future__ import annotations

import shutil
from pathlib import Path

from prunus.model.checkpoint.atomic_files import TEMPORARY_SUFFIX
from prunus.model.checkpoint.lock import LOCK_NAME
from prunus.model.checkpoint.reader import Checkpoint

__all__ = ["check_apart", "check_disk", "check_whole", "is_vacant"]


def check_apart(output: Path, source: Path) -> None:
    """See that output and source are different folders, and neither lies in the other.

    Raises:
        ValueError: names both.
    """
    here, there = output.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"output {output} and model {source} overlap: choose a folder of its own for the result"
        )


def is_vacant(output: Path) -> bool:
    """Whether nothing is there yet, or nothing but what a killed run had not given its name.

    Raises:
        FileExistsError: something that is no folder is there.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} exists and is not a folder")
    return not output.exists() or all(
        path.name.endswith(TEMPORARY_SUFFIX) or path.name == LOCK_NAME for path in output.iterdir()
    )


def check_disk(output: Path, needed: int) -> None:
    """Refuse to start where the result cannot fit.

    Raises:
        OSError: less than `needed` bytes are free on the disk of `output`.
    """
    here = output.resolve()
    free = shutil.disk_usage(
        next(folder for folder in (here, *here.parents) if folder.exists())
    ).free
    if free < needed:
        raise OSError(
            f"not enough disk for {output}: the result needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
        )


def check_whole(output: Path) -> None:
    """See that a result that is said to be finished still has all its shards, whole.

    Raises:
        FileExistsError: something was taken away or cut off since.
    """
    try:
        Checkpoint(output)
    except (FileNotFoundError, ValueError) as fault:
        raise FileExistsError(
            f"{output} holds a finished result that was damaged since: {fault}. --overwrite makes it again"
        ) from fault
