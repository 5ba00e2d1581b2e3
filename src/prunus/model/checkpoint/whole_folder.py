"""A folder that appears whole or not at all, beside what it replaces.

The new folder is made in a staging folder next to the destination. When it is complete, one rename
puts it in place. If it replaces something, the two exchange their names in one step, which Linux
offers (renameat2 with RENAME_EXCHANGE). So the destination holds the old content or the new one
after a kill at any moment, and never nothing. Where the system or the file system cannot exchange
folders, two renames take the place of one; after a kill between them, the next run puts the old
folder back.

The staging folder has a name of its own for each destination and is locked. The next run for the
same destination removes what a killed run left in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from prunus.model.checkpoint.atomic_files import TEMPORARY_SUFFIX, fsync_folder
from prunus.model.checkpoint.lock import locked

__all__ = ["replacing_folder"]

_NEW, _OLD = "new", "old"
_AT_FDCWD = -100  # paths are relative to the working folder
_RENAME_EXCHANGE = 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


@contextlib.contextmanager
def replacing_folder(dest: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Replace the folder `dest` atomically, held against other runs for the same folder.

    Yields an empty folder to write to. When the block ends, that folder becomes `dest`; after an
    error it is removed, and `dest` stays as it was.

    Args:
        dest: the folder; it need not exist.
        check: raises an error if `dest` may not be replaced. It is called twice: before anything is
            written, and while no other run can change `dest`.

    Raises:
        FileExistsError: another run holds the folder.
    """
    check()
    dest = Path(os.path.abspath(dest))  # a name such as "." has no neighbours
    staging = dest.parent / f".{dest.name}.import{TEMPORARY_SUFFIX}"
    with _removing_if_empty(staging), locked(staging):
        _restore(staging, dest)
        check()
        new = staging / _NEW
        new.mkdir()
        try:
            yield new
            _make_durable(new)
            _put_in_place(new, dest, check)
        finally:
            _clear(staging)


@contextlib.contextmanager
def _removing_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder in the end, also one that a killed run made. `locked` leaves that one."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _restore(staging: Path, dest: Path) -> None:
    """Undo what a killed run left: put the old folder back, and empty the staging folder."""
    if (staging / _OLD).exists() and not dest.exists():
        os.rename(staging / _OLD, dest)
        fsync_folder(dest.parent)
    _clear(staging)


def _clear(staging: Path) -> None:
    for name in (_NEW, _OLD):
        shutil.rmtree(staging / name, ignore_errors=True)


def _make_durable(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(place, name), "rb") as opened:
                os.fsync(opened.fileno())
        fsync_folder(Path(place))


def _put_in_place(new: Path, dest: Path, check: Callable[[], None]) -> None:
    if not dest.exists() or not any(dest.iterdir()):
        # Fails, as it should, if another run has written something there in the meantime.
        try:
            os.rename(new, dest)
        except OSError as fault:
            if fault.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(
                f"{dest}: another run has written something there; choose another folder"
            ) from fault
        fsync_folder(dest.parent)
        return
    # Runs of other verbs hold a lock in the folder itself.
    with locked(dest):
        check()
        if not _exchange(new, dest):
            _rename_twice(new, dest)
        fsync_folder(dest.parent)


def _rename_twice(new: Path, dest: Path) -> None:
    """Put `new` in the place of `dest`, or leave `dest` as it was.

    After a kill in between there is no `dest`, until the next run calls `_restore`.
    """
    old = new.parent / _OLD
    os.rename(dest, old)
    try:
        os.rename(new, dest)
    except BaseException:
        os.rename(old, dest)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where that is not possible."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    paths = [os.fsencode(path) for path in (one, other)]
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))
