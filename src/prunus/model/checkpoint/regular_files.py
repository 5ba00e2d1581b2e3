"""Read files from untrusted checkpoints: regular files only, with a size limit for each type.

Opening a FIFO waits for ever, and `/dev/zero` never ends. A checkpoint may hold either, or a link
to it. So a file is opened without waiting, and its type and size are checked before it is read.
Imports no torch, so that a report can be read without it.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

_MIB = 2**20
#: End of a file's name -> its most bytes. Weights and other files have no limit here.
_MAX_BYTES = {
    "config.json": 16 * _MIB,
    ".json": 256 * _MIB,
    ".jinja": 4 * _MIB,
    ".md": 4 * _MIB,
    ".model": 256 * _MIB,
    ".txt": 256 * _MIB,
}
_KINDS = {
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISCHR: "a character device",
    stat.S_ISBLK: "a block device",
    stat.S_ISSOCK: "a socket",
    stat.S_ISDIR: "a folder",
}


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, in binary mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file, or larger than its kind may be (`_MAX_BYTES`).
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer. It changes nothing for others.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _check_state(path, os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_limited(path: Path) -> bytes:
    """The content of a file; the errors are those of `open_regular`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # A file that grows meanwhile is not followed.
        return file.read(size)


def read_card(path: Path) -> str | None:
    """The text of a model card; None if there is none.

    Cards are for people, and old ones are not all UTF-8. So bytes that cannot be decoded become
    replacement characters.

    Raises:
        ValueError: It is no regular file, or too large for a card.
    """
    try:
        return read_limited(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None


def check_regular(path: Path) -> None:
    """Check the type and the size of a file, without opening it; errors as of `open_regular`."""
    _check_state(path, path.stat())


def check_folder(folder: Path) -> None:
    """Check all files of a checkpoint folder with `check_regular`, before transformers reads them.

    transformers opens configuration, tokenizer and chat templates on its own, without such checks.
    Of the folders in it, transformers looks into the one with chat templates alone.

    Raises:
        ValueError: A file is no regular file, or larger than its kind may be; names it.
    """
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        # A link to nothing is reported by whoever needs the file.
        if path.exists() and not path.is_dir():
            check_regular(path)


def _check_state(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        kind = next((name for test, name in _KINDS.items() if test(state.st_mode)), "special")
        link = f", through the link to {os.readlink(path)}" if path.is_symlink() else ""
        raise ValueError(
            f"{path} is {kind}{link}; expected a regular file: remove it, or put the file there"
        )
    largest = next((size for end, size in _MAX_BYTES.items() if path.name.endswith(end)), None)
    if largest is not None and state.st_size > largest:
        raise ValueError(
            f"{path} has {state.st_size:,} bytes, and a file of this kind may have {largest:,}; it "
            "is damaged or no part of a checkpoint: remove it, or download it again"
        )
