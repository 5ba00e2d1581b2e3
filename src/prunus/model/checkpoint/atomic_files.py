"""Files that are either whole or not there.

Everything that prunus writes goes through this file, in four steps: write to a temporary name in
the same folder, fsync the file, rename it, fsync the folder. After a kill or a power cut, a final
name therefore holds nothing, the old content, or all of the new content.

The order matters. Without the first fsync, a power cut may leave the final name with no data behind
it, because a file system may store the rename before the data. Without the second fsync, the rename
itself may be lost, although a record written later says that it took place.

This file imports no torch, so that a report can be read without it. `writer.py` has the tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "TEMPORARY_SUFFIX",
    "copy_file",
    "file_digest",
    "fsync_folder",
    "make_folder",
    "read_json",
    "replacing",
    "write_json",
    "write_text",
]

TEMPORARY_SUFFIX = ".partial"


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. Does nothing on Windows, which lacks this."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make `folder` and the missing ones above it, so that they survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace the file `path` atomically.

    Yields a temporary path to write to. When the block ends, the file there becomes `path`; after
    an error it is removed, and `path` stays as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.txt")
    ...     with replacing(path) as temporary:
    ...         _ = temporary.write_text("new")
    ...         path.exists()
    ...     path.read_text()
    False
    'new'
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        yield temporary
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) atomically.

    The name of a file that is not UTF-8 holds surrogates, which cannot be encoded. They are written
    as escape sequences, which JSON reads back as they were.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented JSON.

    Raises:
        ValueError: it holds NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not valid JSON, or nested too deep; names the file and the place of the
            fault.
        FileNotFoundError: there is no such file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # Numbers of thousands of digits are a ValueError, and brackets without end a RecursionError.
    except (ValueError, RecursionError) as fault:
        raise ValueError(
            f"{path} is not valid JSON: {fault}. Was it cut off while copying?"
        ) from fault


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of one file, without its permissions, atomically."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes as a hex string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
