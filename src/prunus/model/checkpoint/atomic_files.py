"""Files that are either whole or not there.

Everything prunus writes goes through this page: a temporary name in the same folder, fsync, rename,
fsync of the folder. A reader, or a run that is resumed after a kill or a power cut, therefore finds under
a final name either nothing, the old content, or all of the new content.
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
#: How safetensors call the dtypes that are read and written, in the order in which a file holds them.
TENSOR_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_BYTES_AT_A_TIME = 2**27
_CODES = {dtype: code for code, dtype in TENSOR_DTYPES.items()}


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. A no-op where folders cannot be opened (Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it that are not there, so that they survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it becomes `path` atomically, on an error it is removed."""
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
    """Write `content` as indented JSON atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a malformed one raises ValueError with its name and the place of the fault."""
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
    """Write tensors (any dtype of `TENSOR_DTYPES`) as one safetensors file, atomically.

    The bytes depend on the tensors and the metadata alone, so equal content gives equal files. Not by the library's
    `save_file`: that puts metadata in another order each time, and what it is writing when it is killed stays in the
    folder under a name that nobody knows. With `uncached`, what is written leaves memory at once.

    Raises:
        OSError: it cannot be written, such as to a full disk.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        # As the library has it: wide numbers first, so that all are aligned, then by name.
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
            # One at a time: a tensor on another device, or one that is not contiguous, is copied for its turn only.
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            for piece in flat.split(_BYTES_AT_A_TIME):
                file.write(piece.numpy().data)
                unwritten += len(piece)
                if unwritten >= _BYTES_AT_A_TIME:
                    # Pages that wait to be written count against the memory of a control group.
                    file.flush()
                    os.fsync(file.fileno())
                    if uncached and hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    unwritten = 0


def copy_file(source: Path, target: Path) -> None:
    """Copy one file's bytes (not its permissions) atomically."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes as a hex string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
