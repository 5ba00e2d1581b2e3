"""Files read with limits, and files that are either whole or not there, with digests of them.

This file writes everything that prunus writes, in four steps: write to a temporary name in
the same folder, fsync the file, rename it, fsync the folder. After a kill or a power cut, a final
name therefore holds nothing, the old content, or all of the new content.

The order matters. Without the first fsync, a power cut may leave the final name with no data behind
it, because a file system may store the rename before the data. Without the second fsync, the rename
itself may be lost, although a record written later says that it took place.

The folder of a run is held by an open handle (`locked`), and all paths in it are resolved from that
handle. If somebody exchanges the folder for a link or another folder during the run, nothing is
written there, and the run ends.

Temporary names are random, and their files are created with O_EXCL and O_NOFOLLOW. So a link that
somebody placed in the folder is never followed, and two processes never write one temporary file. A
killed process leaves its temporary file; `remove_temporaries` clears a folder that is locked.

Strangers make the files that are read. Opening a FIFO waits for ever, and `/dev/zero` never ends. A
checkpoint may hold either, or a link to it. So a file is opened without waiting, and its type and
size are checked before it is read.

Outline: files that are read; the folder that is held; files that are written; JSON; the SHA-256 of
shards. Imports no torch, so that a report can be read without it. `tensor_files.py` has tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from prunus.words import in_bytes, reason

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
# Keys that all figures of a command have: the record of a run; eval, inspect, sweep, report; plan,
# generate, import.
_FIGURES = (
    *({"recipe", "inputs"}, {"models", "reference"}, {"linears", "left_dense"}),
    *({"models", "cells"}, {"title", "sections"}, {"written", "needs", "seconds"}),
    *({"model", "prompt", "text"}, {"architecture", "parameters", "dtype"}),
)
#: End of the name of every file that is not finished yet.
TEMPORARY_SUFFIX = ".partial"
# Linux allows names of 255 bytes. A temporary name takes over the first 200, and has room for a
# random part and its suffix.
_MAX_NAME, _OF_NAME = 255, 200
#: Records of results; earlier versions wrote the first two. A recovered checkpoint also has a copy
#: of the record of its source, which describes the source's shards. So the first record that is
#: there counts.
RECORD_FILES = (
    "prunus-pack.json",
    "prunus-unpack.json",
    "prunus-recovery.json",
    "prunus-compress.json",
    "prunus.json",
    "prunus-structure.json",
    "prunus-import.json",
)
#: The record of a sweep.
SWEEP_FILE = "results.json"
#: Absolute path of a folder that this process holds -> the open handle of that folder.
_held: dict[Path, int] = {}


# --- files that are read: regular ones only, with a limit for each kind ---


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


# --- files that are written ---


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[int]:
    """Keep a handle of `folder` open for the length of a `with` block, and yield the handle.

    While the block runs, `in_held` resolves every path inside the folder from this handle.

    Raises:
        OSError: The folder is missing, or cannot be opened.
    """
    handle, name = os.open(folder, os.O_RDONLY | os.O_DIRECTORY), Path(os.path.abspath(folder))
    _held[name] = handle
    try:
        yield handle
    finally:
        del _held[name]
        os.close(handle)


def in_held(path: Path) -> Path:
    """The path to write to or to remove instead of `path`: from a handle, if its folder is held.

    Linux offers open handles as paths. On other systems the check comes just before the work, and
    `path` itself is returned.

    Raises:
        FileExistsError: The held folder has been moved away or exchanged for something else.
    """
    absolute = Path(os.path.abspath(path))
    for folder in (absolute, *absolute.parents):
        if folder not in _held:
            continue
        state = os.fstat(_held[folder])
        if not folder.exists() or not os.path.samestat(state, folder.stat()):
            raise FileExistsError(
                f"{folder} was exchanged for something else while the run wrote to it. The run "
                "wrote nothing there and its finished work is kept: put the folder back, and the "
                "same command continues"
            )
        opened = Path(f"/proc/self/fd/{_held[folder]}")
        return opened / absolute.relative_to(folder) if opened.exists() else path
    return path


def remove(path: Path) -> None:
    """Remove a file or a link, or a folder with all that is in it, if it is there.

    A link to a folder is removed as a link: what it leads to stays.
    """
    path = in_held(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Check that the file or folder `path` can be made: the nearest folder above it takes it.

    Raises:
        ValueError: The name is longer than a file system allows.
        PermissionError: The nearest folder that exists is not writable, or is not a folder.
    """
    absolute = Path(os.path.abspath(path))
    if (length := len(os.fsencode(absolute.name))) > _MAX_NAME:
        raise ValueError(
            f"a name has at most {_MAX_NAME} bytes, and {absolute.name} has {length}; choose a "
            "shorter one"
        )
    candidates = (absolute, *absolute.parents) if path.is_dir() else absolute.parents
    above = next(folder for folder in candidates if os.path.exists(folder))
    allowed = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    # A file system without any bytes, such as /proc, takes no files, whatever its folders allow.
    if not allowed or not shutil.disk_usage(above).total:
        raise PermissionError(
            f"{path} cannot be created: {above} is not a folder that you may write to; "
            "choose another place"
        )


def check_file_place(
    path: Path, is_own: Callable[[Path], object], others: Iterable[Any] = ()
) -> None:
    """Check that a command may write a file to `path`: the one answer for all commands.

    A file is replaced only if it is empty, or if the same command has written it.

    Args:
        path: The file.
        is_own: Whether a command of the same name wrote the regular file that has this name; see
            `has_content` and `holds_figures`.
        others: What else the command reads and writes. Of these values only paths count.

    Raises:
        FileExistsError: Something else has this name.
        ValueError, OSError: No file of this name can be made; see `check_place`.
    """
    check_place(path)
    if os.path.lexists(path) and not (path.is_file() and (not path.stat().st_size or is_own(path))):
        raise FileExistsError(
            f"{path} exists and was not written by this command; it is left as it is. Move it "
            "away, or choose another name"
        )
    if any(isinstance(x, str | Path) and Path(x).resolve() == path.resolve() for x in others):
        raise FileExistsError(
            f"{path} is named twice in this command, which reads or writes it as something else; "
            "choose another name"
        )


def has_content(is_own: Callable[[bytes], object]) -> Callable[[Path], bool]:
    """Whether a file may be replaced, by its content. A model that is named by mistake is not read.

    Args:
        is_own: Whether a file of this content may be replaced.
    """
    return lambda path: path.stat().st_size < 2**30 and bool(is_own(path.read_bytes()))


def holds_figures(path: Path) -> bool:
    """Whether a file holds figures that a command wrote as JSON, and is no record of a result."""

    def is_figures(text: bytes) -> bool:
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(text)
            if not isinstance(content, dict) or path.name in RECORD_FILES:
                return False
            is_sweep = path.name == SWEEP_FILE and "cells" in content
            return not is_sweep and any(keys <= content.keys() for keys in _FIGURES)
        return False

    return has_content(is_figures)(path)


def fsync_folder(folder: Path) -> None:
    """Make the renames and removals of names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make `folder` and the missing ones above it, so that all of them survive a power cut."""
    folder = in_held(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path, nbytes: int | None = None) -> Iterator[BinaryIO]:
    """Replace the file `path` atomically: it becomes the new temporary file that is yielded.

    At the end of the `with` block the content is on the disk under its final name. After an error,
    also after Ctrl-C, the temporary file is removed and `path` stays as it was.

    Args:
        path: The file. Its folder must exist.
        nbytes: Size of the new content, for the error of a full disk; None if it is unknown.

    Raises:
        OSError: The content cannot be written. The error of a full disk says how much is free.
        FileExistsError: The folder was exchanged; see `in_held`.
    """
    final_path, path = path, in_held(path)
    begin = os.fsdecode(os.fsencode(path.name)[:_OF_NAME])
    temporary = path.with_name(f"{begin}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as fault:
        temporary.unlink(missing_ok=True)
        if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(final_path, nbytes) from fault
        if isinstance(fault, OSError) and fault.filename in (None, str(temporary)):
            fault.filename = str(final_path)  # and not a name that means nothing to the user
        raise
    fsync_folder(path.parent)


def move_file(path: Path, target: Path, replaces: bool) -> None:
    """Give a finished file another name on its disk, atomically.

    Args:
        path: The file.
        target: The new name.
        replaces: Whether something that has that name by now is replaced.

    Raises:
        FileExistsError: Something has the name `target` by now, and may not be replaced. Both files
            stay as they are.
    """
    source_path, target_path = in_held(path), in_held(target)
    try:
        if not replaces:
            # Unlike a rename, a link never replaces. The rename then does nothing but drop a name.
            os.link(source_path, target_path)
    except OSError as fault:
        # Some file systems have no links. There the check comes just before the work.
        if os.path.lexists(target_path):
            raise FileExistsError(
                f"{target} was made by somebody else during the run, and is left as it is. The "
                f"finished work is in {path.parent}: move that file away, and the same command "
                "continues"
            ) from fault
    os.replace(source_path, target_path)
    source_path.unlink(missing_ok=True)
    fsync_folder(target_path.parent)


def _no_space(path: Path, nbytes: int | None) -> OSError:
    """The error of a disk that became full while `path` was written."""
    size = "it" if nbytes is None else f"its {in_bytes(nbytes)}"
    free = in_bytes(shutil.disk_usage(path.parent).free)
    return OSError(
        errno.ENOSPC,
        f"No space left on the disk for {path}: {size} must fit, and {free} are free. "
        "Finished files are kept: make room, and the same command continues",
    )


def remove_temporaries(folder: Path) -> None:
    """Remove what killed runs left under temporary names, in a folder that this run holds."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        remove(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) atomically.

    The name of a file that is not UTF-8 holds surrogates, which cannot be encoded. They are written
    as escape sequences, which JSON reads back as they were.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented JSON.

    Raises:
        ValueError: It holds NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, from which nothing is trusted but that it is JSON.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not valid JSON, nested too deep, no regular file, or too large. The
            message names the file and the position of the fault.
    """
    return _parsed(path, read_limited(path))


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """The object in a JSON file that describes a model, from the bytes of the file.

    Raises:
        ValueError: It is not valid JSON, or no object.
    """
    found = _parsed(path, content)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object, as a configuration must be; copy it again")
    return found


def _parsed(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    # Numbers of thousands of digits are a ValueError, and brackets without end a RecursionError.
    except (ValueError, RecursionError) as fault:
        raise ValueError(
            f"{path} is not valid JSON: {reason(fault)}. Was it cut off while copying?"
        ) from fault


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of one file, without its permissions, atomically.

    Raises:
        ValueError: `source` is no regular file, or larger than its kind may be.
    """
    with open_regular(source) as original, replacing(target) as copy:
        shutil.copyfileobj(original, copy, 2**20)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes as a hex string.

    Raises:
        ValueError: It is no regular file, or larger than its kind may be.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the SHA-256 of every shard that a run wrote ---

# Every record of a result holds them in its field `sha256`. They are computed while the shard is
# written, from the bytes in memory. A disk that changes a bit later is therefore noticed.


def recorded_digests(folder: Path) -> dict[str, str]:
    """File name of a shard -> its SHA-256 (hex) in the record of a result.

    Empty for a folder without a record, which prunus did not write.

    Raises:
        ValueError: The record is damaged.
    """
    path = next((folder / name for name in RECORD_FILES if (folder / name).exists()), None)
    content = read_json(path) if path is not None else {}
    digests = content.get("sha256", {}) if isinstance(content, dict) else None
    if not isinstance(digests, dict) or not all(
        isinstance(digest, str) for digest in digests.values()
    ):
        raise ValueError(f"{path} is damaged: it maps no shards to their SHA-256; copy it again")
    return digests


def check_shard(path: Path, expected: str, remedy: str) -> None:
    """Check that a shard still has the bytes that were written.

    Args:
        path: The shard.
        expected: Its recorded SHA-256 (hex).
        remedy: What to do if it was changed, as the end of a sentence.

    Raises:
        ValueError: It was changed.
    """
    if file_digest(path) != expected:
        raise ValueError(
            f"{path} is not what was written: its SHA-256 is not the recorded one, so a disk or a "
            f"copy has changed it; {remedy}"
        )


def verify_shards(folder: Path) -> int:
    """Compare all shards of a checkpoint with the SHA-256 in its record; returns their number.

    Raises:
        FileNotFoundError: A shard is missing, or the folder has no record to compare with.
        ValueError: Shards were changed, or lie there without being in the record; names them all.
    """
    recorded = recorded_digests(folder)
    if not recorded:
        raise FileNotFoundError(
            f"{folder} has no record with the SHA-256 of its shards: prunus did not write it"
        )
    unknown = sorted({path.name for path in folder.glob("*.safetensors")} - recorded.keys())
    if missing := sorted(name for name in recorded if not (folder / name).exists()):
        raise FileNotFoundError(f"{folder} has lost {', '.join(missing)}; copy it again")
    changed = [name for name in sorted(recorded) if file_digest(folder / name) != recorded[name]]
    if changed or unknown:
        raise ValueError(
            f"{folder} is not what was written: {', '.join((*changed, *unknown))} differ from the "
            "SHA-256 in the record; copy the checkpoint again, or make it again with `overwrite`"
        )
    return len(recorded)
