"""Tensors as a safetensors file, written atomically."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.model.checkpoint.atomic_files import replacing

#: Names that safetensors gives to dtypes, in the order in which a file holds them.
TENSOR_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32,
    "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in TENSOR_DTYPES.items()}
_PIECE = 2**27  # bytes to write between two calls of fsync


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as a flat uint8 tensor on the CPU."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class FileTensor:
    """A tensor that stays in its file until it is written to another one.

    Attributes:
        dtype: Dtype of the values.
        shape: Shape of the tensor.
        nbytes: Bytes of all values.
        pieces: Returns the values in order, as flat tensors that together have `nbytes` bytes. It
            reads the file anew at each call.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[torch.Tensor]]


#: What can be written: a tensor in memory, on any device, or one that lies in another file.
Writable = torch.Tensor | FileTensor


def save_safetensors(
    path: Path,
    tensors: Mapping[str, Writable],
    metadata: Mapping[str, str] | None = None,
    uncached: bool = False,
) -> str:
    """Write tensors as one safetensors file, atomically, and return its SHA-256 (hex).

    Equal tensors and metadata give equal bytes. `save_file` of the safetensors library puts the
    metadata in another order each time, and when killed it leaves a half-written file.

    Format (https://github.com/huggingface/safetensors): the length of the header as 8 bytes, the
    header as JSON, then the bytes of the tensors without gaps.

    Args:
        path: The file.
        tensors: Name -> tensor, of any dtype of `TENSOR_DTYPES`.
        metadata: Text for the header; None for nothing but the format's name.
        uncached: Drop written pages from the page cache at once. For runs that have little memory.

    Raises:
        OSError: The file cannot be written, for example because the disk is full; see `replacing`.
    """
    head, names, end = _head(tensors, metadata)
    with (
        replacing(path, len(head) + end) as file,
        ThreadPoolExecutor(1, thread_name_prefix="hash") as hashing,
    ):
        file.write(head)
        digest = hashlib.sha256(head)
        unwritten = 0
        for name in names:
            # One at a time: the copy of a tensor that is on another device, or not contiguous, is
            # released before the next one is made.
            for piece in _pieces(tensors[name]):
                # Hashing and writing both run without the interpreter's lock, at the same time.
                hashed = hashing.submit(digest.update, piece.numpy().data)
                file.write(piece.numpy().data)
                hashed.result()
                unwritten += len(piece)
                if unwritten >= _PIECE:
                    # Pages that wait to be written count against the memory limit of a container.
                    file.flush()
                    os.fsync(file.fileno())
                    if uncached and hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    unwritten = 0
    return digest.hexdigest()


def file_nbytes(tensors: Mapping[str, Any]) -> int:
    """Bytes of the file that `save_safetensors` makes of tensors with these shapes and dtypes.

    >>> file_nbytes({"a": torch.empty(2, 3)})
    120
    """
    head, _, end = _head(tensors, None)
    return len(head) + end


def _head(
    tensors: Mapping[str, Any], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str], int]:
    """The header of a file with its length, the names of the tensors in order, and their bytes."""
    # As in the library: wide dtypes first, which keeps all tensors aligned, then by name.
    rank = {dtype: position for position, dtype in enumerate(_CODES)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {
        "__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))
    }
    end = 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, names, end


def _pieces(tensor: Writable) -> Iterable[torch.Tensor]:
    """The bytes of a tensor in order, as flat uint8 tensors on the CPU."""
    if isinstance(tensor, FileTensor):
        return map(flat_bytes, tensor.pieces())
    return flat_bytes(tensor).split(_PIECE)
