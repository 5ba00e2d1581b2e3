"""Files that are either whole or not there.

Everything that prunus writes goes through this file, in four steps: write to a temporary name in
the same folder, fsync the file, rename it, fsync the folder. After a kill or a power cut, a final
name therefore holds nothing, the old content, or all of the new content.

The order matters. Without the first fsync, a power cut may leave the final name with no data behind
it, because a file system may store the rename before the data. Without the second fsync, the rename
itself may be lost, although a record written later says that it took place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "TEMPORARY_SUFFIX",
    "TENSOR_DTYPES",
    "copy_file",
    "file_digest",
    "fsync_folder",
    "make_folder",
    "read_json",
    "replacing",
    "save_safetensors",
    "write_json",
    "write_text",
]

TEMPORARY_SUFFIX = ".partial"
#: Names that safetensors gives to dtypes, in the order in which a file holds them.
TENSOR_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in TENSOR_DTYPES.items()}
_PIECE = 2**27  # bytes to write between two calls of fsync


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
    """Write `text` (UTF-8) atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented JSON.

    Raises:
        ValueError: it holds NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not valid JSON; names the file and the place of the fault.
        FileNotFoundError: there is no such file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise ValueError(
            f"{path} is not valid JSON: {fault}. Was it cut off while copying?"
        ) from fault


def save_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    uncached: bool = False,
) -> None:
    """Write tensors as one safetensors file, atomically.

    Equal tensors and metadata give equal bytes. `save_file` of the safetensors library is not used
    for two reasons: it puts the metadata in another order each time, and when killed it leaves a
    half-written file under a name of its own.

    Format (https://github.com/huggingface/safetensors): the length of the header as 8 bytes, the
    header as JSON, then the bytes of the tensors without gaps.

    Args:
        path: the file.
        tensors: name -> tensor, of any dtype of `TENSOR_DTYPES`, on any device.
        metadata: goes into the header.
        uncached: drop the written pages from the page cache at once, if memory is short.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        # As in the library: wide dtypes first, which keeps all tensors aligned, then by name.
        place = {dtype: position for position, dtype in enumerate(_CODES)}
        names = sorted(tensors, key=lambda name: (place[tensors[name].dtype], name))
        header: dict[str, Any] = {
            "__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))
        }
        end = 0
        for name in names:
            start, end = end, end + tensors[name].numel() * tensors[name].element_size()
            code, shape = _CODES[tensors[name].dtype], list(tensors[name].shape)
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        file.write(len(text).to_bytes(8, "little") + text)
        unwritten = 0
        for name in names:
            # One tensor at a time: one on another device, or not contiguous, is copied here, and
            # the copy goes before the next one comes.
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            for piece in flat.split(_PIECE):
                file.write(piece.numpy().data)
                unwritten += len(piece)
                if unwritten >= _PIECE:
                    # Pages that wait to be written count against the memory limit of a container.
                    file.flush()
                    os.fsync(file.fileno())
                    if uncached and hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    unwritten = 0


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of one file, without its permissions, atomically."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes as a hex string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
