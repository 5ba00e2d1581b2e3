"""Checks of the folder for a result, before any work: is it apart, vacant, large enough, whole?"""

from __future__ import annotations

import shutil
from pathlib import Path

from prunus.model.checkpoint.atomic_files import TEMPORARY_SUFFIX
from prunus.model.checkpoint.lock import LOCK_NAME
from prunus.model.checkpoint.reader import Checkpoint


def check_apart(output: Path, source: Path) -> None:
    """Check that output and source are different folders, and that neither lies in the other.

    >>> check_apart(Path("pruned"), Path("dense"))
    >>> check_apart(Path("dense/pruned"), Path("dense"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: output dense/pruned and model dense overlap: choose a folder of its own ...
    """
    here, there = output.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"output {output} and model {source} overlap: choose a folder of its own for the result"
        )


def is_vacant(output: Path, inside: str | None = None) -> bool:
    """Whether a folder holds no result: it does not exist, or holds only what a killed run left.

    A killed run leaves files under their temporary names, the file of its lock, and, if it has one,
    the folder `inside` for a step before the last one.

    >>> is_vacant(Path("no such folder"))
    True
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(
            f"output {output} exists and is not a folder; choose another name for the result"
        )
    return not output.exists() or all(
        path.name.endswith(TEMPORARY_SUFFIX) or path.name in (LOCK_NAME, inside)
        for path in output.iterdir()
    )


def check_resume(output: Path, unfinished: bool, resume: bool | None, work: str = "run") -> None:
    """Check that there is unfinished work if `resume` is True, and none if it is False."""
    if resume is True and not unfinished:
        raise FileNotFoundError(
            f"there is no unfinished {work} in {output} to resume; leave `resume` out to start one"
        )
    if resume is False and unfinished:
        raise FileExistsError(
            f"{output} holds an unfinished {work}; `overwrite` starts again, `resume` continues"
        )


def check_disk(output: Path, needed: int) -> None:
    """Check that the result fits on the disk of `output`."""
    here = output.resolve()
    free = shutil.disk_usage(
        next(folder for folder in (here, *here.parents) if folder.exists())
    ).free
    if free < needed:
        raise OSError(
            f"not enough disk for {output}: the result needs {needed / 1e9:.2f} GB and "
            f"{free / 1e9:.2f} GB are free; make room, or choose a folder on another disk"
        )


def check_whole(output: Path) -> None:
    """Check that a finished result still has all its shards, whole."""
    try:
        Checkpoint(output)
    except (FileNotFoundError, ValueError) as fault:
        raise FileExistsError(
            f"{output} holds a finished result that was damaged since: {fault}. `overwrite` makes "
            "it again"
        ) from fault
