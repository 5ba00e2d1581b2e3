"""One run at a time in a folder.

The lock is a file in the folder. The running process holds it with flock(2), and the file says
which process that is. The kernel releases the lock when the process ends, in whatever way. A lock
file that nobody holds was left by a killed run, and the next run takes it over: no run needs the
help of its user after a kill, which a lock that is a mere file would need.

Whatever depends on what the folder holds must be decided while the lock is held. A look before may
refuse early, but it decides nothing: another run may finish between the look and the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.files import holding, make_folder

LOCK_NAME = ".prunus.lock"
# Errors of file systems without flock, such as some network file systems. There the process id in
# the file decides.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_MAX_BYTES = 4096  # of a lock file


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against other runs for the length of a `with` block.

    Makes the folder if it is missing, and removes what it made if nothing was written there. Of the
    processes of one run only the one that writes may call it.

    Raises:
        FileExistsError: Another run holds the folder; names its process and host. Or something that
            is no lock has the lock's name, or the folder was exchanged meanwhile.
        OSError: The folder cannot be written to.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _acquire(folder)
    try:
        with holding(folder) as handle:
            if not _has_name(lock, Path(LOCK_NAME), handle):
                raise FileExistsError(f"{folder} was exchanged when the run began; start it again")
            try:
                yield
            finally:
                # The name goes first and the lock second. In the other order, a run that takes the
                # lock in between would hold a file that has lost its name, and a third run could
                # enter.
                with contextlib.suppress(OSError):
                    if _has_name(lock, Path(LOCK_NAME), handle):
                        os.unlink(LOCK_NAME, dir_fd=handle)
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):
            for path in new_folders:
                path.rmdir()  # fails, as it should, for a folder with something in it


def _acquire(folder: Path) -> int:
    """The handle of the lock file, with the lock held and this process signed in.

    It repeats when it loses a race with a run that ends: the file that it opened has no name then.
    """
    path = folder / LOCK_NAME
    while True:
        make_folder(folder)
        try:
            handle = _open(path)
        except FileNotFoundError:
            continue  # the previous holder has just removed the file, or the folder that it made
        try:
            if not _take(handle):
                holder = _holder(handle)
                raise FileExistsError(
                    f"{folder} is being written by another run: process "
                    f"{holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}. "
                    f"Wait until it ends, or choose another folder ({LOCK_NAME} in it is the lock; "
                    "a run that was killed holds none)"
                )
            # Between open and lock, the previous holder may have removed the name, and another run
            # may have made a new file. The lock counts only on the file that has the name now.
            if _has_name(handle, path):
                _sign(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _open(path: Path) -> int:
    """Open the lock file, or create it. Follows no link, and opens nothing but a lock file.

    Raises:
        FileNotFoundError: The file was removed between two looks, or there is no folder.
        FileExistsError: Something that is no lock file has its name.
    """
    # O_NONBLOCK: opening a FIFO must not wait.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.suppress(FileExistsError):
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        handle = os.open(path, flags)
    except OSError as fault:
        if fault.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise FileExistsError(_no_lock(path)) from fault
        raise
    state = os.fstat(handle)
    # A second name means that a link was placed there, and writing would change another file.
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1 or state.st_size > _MAX_BYTES:
        os.close(handle)
        raise FileExistsError(_no_lock(path))
    return handle


def _has_name(handle: int, path: Path, folder: int | None = None) -> bool:
    """Whether an open file is the one that `path` names now, in an open folder if one is given."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path, dir_fd=folder))
    except FileNotFoundError:
        return False


def _take(handle: int) -> bool:
    """Take the lock of an open file; False if another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as fault:
        if fault.errno not in _UNSUPPORTED:
            raise
        return not _seems_alive(_holder(handle))
    return True


def _sign(handle: int) -> None:
    """Write host and process id into the lock file, for the messages of other runs."""
    os.ftruncate(handle, 0)
    holder = {"host": socket.gethostname(), "pid": os.getpid()}
    os.pwrite(handle, json.dumps(holder).encode() + b"\n", 0)


def _holder(handle: int) -> dict[str, Any]:
    """Host and process id in an open lock file; empty if there are none, or none yet."""
    try:
        content = json.loads(os.pread(handle, _MAX_BYTES, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _seems_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that signed still runs; one of another host counts as running."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)  # signal 0 only checks that the process exists
    except OSError as fault:  # any other: it exists and belongs to another user
        return not isinstance(fault, ProcessLookupError)
    return True


def _no_lock(path: Path) -> str:
    return (
        f"{path} is not a lock file of prunus, although it has the name of one; remove it, or "
        "choose another folder"
    )
