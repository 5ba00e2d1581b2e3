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
from safetensors.torch import save_file

__all__ = [
    "TEMPORARY_SUFFIX",
    "copy_file",
    "file_digest",
    "fsync_folder",
    "read_json",
    "replacing",
    "save_safetensors",
    "write_json",
    "write_text",
]

TEMPORARY_SUFFIX = ".partial"


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
        raise ValueError(f"{path} is not valid JSON: {fault}. Was it cut off while copying?") from fault


def save_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any dtype, made contiguous on the CPU) as one safetensors file, atomically.

    The bytes depend on the tensors and the metadata alone, so equal content gives equal files.
    """
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(on_cpu, temporary, metadata={"format": "pt", **(metadata or {})})


def copy_file(source: Path, target: Path) -> None:
    """Copy one file's bytes (not its permissions) atomically."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes as a hex string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
