"""Safetensors: a checkpoint whose tensors are read one at a time, and files written atomically.

Only safetensors are read, never pickles, which can run code, and no path is followed that an index
file names out of the checkpoint's folder.

Nothing is mapped: a mapped file that is cut short ends the process that touches it.
`Checkpoint.read` copies tensors into memory, so whatever happens to a file later changes nothing.
`Checkpoint.pieces` is for embeddings, which may be larger than a block.

Outline: `Checkpoint`; `save_safetensors`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prunus.hardware.numerics import check_finite
from prunus.model.checkpoint.files import check_regular, read_json, replacing

#: Names that safetensors gives to dtypes, in the order in which a file holds them.
TENSOR_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32,
    "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: The name of each dtype.
DTYPE_CODES = {dtype: code for code, dtype in TENSOR_DTYPES.items()}
_PIECE = 2**27  # bytes to write between two calls of fsync
#: The file that maps stored names to shards.
INDEX_NAME = "model.safetensors.index.json"
#: The only shard of a checkpoint without an index.
SINGLE_NAME = "model.safetensors"
#: Suffixes of files that are never read, because reading them can run code.
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_MAX_PREFETCH = 2**28  # bytes; see `_prefetch`
#: Bytes of a tensor to read at a time.
VALUES = 2**27


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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header of a shard says of one tensor.

    Attributes:
        file: Name of the shard.
        shape: Shape of the tensor.
        dtype: Dtype of the stored values.
        begin: Offset in the file of its first byte.
    """

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of the stored values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The safetensors files of one folder.

    Opening reads the headers only. Every shard must be there, whole, and hold what the index says.

    Args:
        folder: The checkpoint.
        only: Names of shards to read in place of the index, for a folder that is still being
            written.

    Attributes:
        folder: The checkpoint.
        tensors: Stored name -> what the header says of the tensor.
        fingerprint: SHA-256 (hex) over names, sizes and headers of the shards. It tells checkpoints
            apart without reading their weights.

    Raises:
        FileNotFoundError: The folder is missing, holds no safetensors, or lacks a shard.
        ValueError: The index or a shard is damaged, does not fit the other, or names a file outside
            the folder; or a shard has a dtype that is not supported.
    """

    def __init__(self, folder: Path, only: Sequence[str] | None = None) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder; expected a Hugging Face checkpoint folder"
            )
        self.folder = folder
        weight_map = self._read_index() if only is None else None
        files = (
            list(only or [SINGLE_NAME]) if weight_map is None else sorted(set(weight_map.values()))
        )
        digest = hashlib.sha256()
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        # Shard -> the state of its file when it was opened; see `check_unchanged`.
        self._opened: dict[str, tuple[int, int, int]] = {}
        for file in files:
            self._read_header(file, digest)
        if weight_map is not None:
            for name, file in weight_map.items():
                if name not in self.tensors or self.tensors[name].file != file:
                    raise ValueError(
                        f"{folder / INDEX_NAME} says that {name!r} is in {file}, but that file "
                        "does not hold it; the index and the shards do not belong together"
                    )
        self.fingerprint = digest.hexdigest()

    def _read_index(self) -> dict[str, str] | None:
        """Stored name -> shard, from the index file; None for a checkpoint of one file."""
        path = self.folder / INDEX_NAME
        if not path.exists():
            if (self.folder / SINGLE_NAME).exists():
                return None
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
            hint = (
                f" It holds {pickles[0]}, a pickle, which can run code when it is read and is "
                "never loaded: save the model as safetensors first (save_pretrained does)."
                if pickles
                else " Expected model.safetensors, or model.safetensors.index.json with its shards."
            )
            raise FileNotFoundError(f"{self.folder} holds no safetensors checkpoint.{hint}")
        content = read_json(path)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path} has no 'weight_map' that maps tensor names to files")
        for name, file in weight_map.items():
            # Plain names only: a separator or a drive could lead out of the folder.
            plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
            if not plain or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{path} places {name!r} in {file!r}: shards must be plain file names inside "
                    "the folder, ending in .safetensors"
                )
        return weight_map

    def _read_header(self, file: str, digest: hashlib._Hash) -> None:
        path = self.folder / file
        if not path.exists():
            raise FileNotFoundError(
                f"shard {file} is missing from {self.folder}; download or copy the checkpoint again"
            )
        check_regular(path)
        self._opened[file] = _state(path)
        try:
            with open(path, "rb") as file_start:
                begin = 8 + int.from_bytes(file_start.read(8), "little")
            # The library checks that offsets and file length agree and that there are no gaps
            # between tensors. So the sizes, added up in file order, are the offsets.
            with safe_open(path, framework="pt", backend="pread") as handle:
                names = list(handle.keys())
                self.metadata |= handle.metadata() or {}
                for name in handle.offset_keys():
                    piece = handle.get_slice(name)
                    code = piece.get_dtype()
                    if code not in TENSOR_DTYPES:
                        raise ValueError(
                            f"{path}: tensor {name!r} has dtype {code}, which is not supported; "
                            "give the model in bfloat16, float16 or float32"
                        )
                    info = TensorInfo(file, tuple(piece.get_shape()), TENSOR_DTYPES[code], begin)
                    self.tensors[name] = info
                    begin += info.nbytes
        except (SafetensorError, OSError) as fault:
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file: {fault}. "
                "It was probably cut off; download or copy it again"
            ) from fault
        digest.update(json.dumps([file, path.stat().st_size]).encode())
        for name in names:
            info = self.tensors[name]
            digest.update(json.dumps([name, list(info.shape), str(info.dtype)]).encode())

    def read(
        self, names: Iterable[str], pinned: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (stored name, tensor) on the CPU in the dtype of the file, shard by shard.

        Each tensor has memory of its own, so that later changes of the file do not reach it.

        Args:
            names: Stored names.
            pinned: Whether to use pinned memory, from which a CUDA device copies without the host
                waiting.

        Raises:
            FileNotFoundError: A shard is gone.
            ValueError: A shard was changed since it was opened.
        """
        for file, members in self._by_file(names):
            with self._open(file) as plain:
                for name in members:
                    info = self.tensors[name]
                    _prefetch(plain.fileno(), info)
                    content = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=pinned)
                    self._fill(content, plain, file, info.begin)
                    yield name, content.view(info.dtype).reshape(info.shape)

    def whole(self, name: str) -> torch.Tensor:
        """One tensor, as `read` yields it."""
        return next(tensor for _, tensor in self.read([name]))

    def first_matrix(self, name: str) -> torch.Tensor:
        """The first matrix of a tensor of three axes, such as one of many experts."""
        info = self.tensors[name]
        return next(self.pieces(name, info.nbytes // info.shape[0])).view(info.shape[1:])

    def file_tensors(self, names: Iterable[str]) -> dict[str, FileTensor]:
        """Stored name -> a tensor that is read piece by piece only when it is written to a result.

        Writing raises ValueError, which names the tensor, where a value is not finite.
        """
        infos = {name: self.tensors[name] for name in names}
        return {
            name: FileTensor(info.dtype, info.shape, info.nbytes, partial(self.finite_pieces, name))
            for name, info in infos.items()
        }

    def pieces(self, name: str, most: int = VALUES, begin: int = 0) -> Iterator[torch.Tensor]:
        """Yield the values of a tensor in order, as flat tensors of at most `most` bytes.

        `most`, and the byte `begin` of the first value, are multiples of the size of a value. The
        errors are those of `read`. The last check comes after the last piece, so only a complete
        loop has read one and the same file.
        """
        info = self.tensors[name]
        [(file, _)] = self._by_file([name])
        with self._open(file) as plain:
            for start in range(begin, info.nbytes, most):
                size = min(most, info.nbytes - start)
                content = torch.empty(size, dtype=torch.uint8)
                self._fill(content, plain, file, info.begin + start)
                yield content.view(info.dtype)
        self.check_unchanged([file])

    def finite_pieces(self, name: str) -> Iterator[torch.Tensor]:
        """`pieces`, or a ValueError that names the tensor where it is not finite."""
        for piece in self.pieces(name):
            check_finite({name: piece})
            yield piece

    def _by_file(self, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        """Yield each shard with those of its tensors that are to be read, after checking it."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        self.check_unchanged(by_file)
        yield from by_file.items()

    def check_unchanged(self, files: Iterable[str] | None = None) -> None:
        """Check that shards are still the files that were opened: same inode, length and time.

        Args:
            files: Names of shards; None for all.

        Raises:
            FileNotFoundError: A shard is gone.
            ValueError: A shard was replaced or written to.
        """
        for file in self._opened if files is None else files:
            with self._naming_what_is_gone(file):
                now = _state(self.folder / file)
            if now != self._opened[file]:
                raise ValueError(self._changed(file))

    def _fill(self, content: torch.Tensor, opened: FileIO, file: str, begin: int) -> None:
        """Fill a uint8 tensor from offset `begin` of a shard on, which may end too early by now."""
        opened.seek(begin)
        left = memoryview(content.numpy().data)
        while left:
            count = opened.readinto(left)
            if not count:
                raise ValueError(self._changed(file))
            left = left[count:]

    def _open(self, file: str) -> FileIO:
        """Open a shard, which may be gone since `check_unchanged` has looked."""
        with self._naming_what_is_gone(file):
            return open(self.folder / file, "rb", buffering=0)

    @contextlib.contextmanager
    def _naming_what_is_gone(self, file: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as fault:
            raise FileNotFoundError(
                f"{self.folder / file} is gone since it was opened; put it back, and the same "
                "command continues"
            ) from fault

    def _changed(self, file: str) -> str:
        return (
            f"{self.folder / file} was changed since it was opened, so what was read from it "
            "cannot be relied on. Put the checkpoint back as it was, and the same command continues"
        )

    def file_bytes(self) -> int:
        """Bytes of the shards when they were opened, headers included."""
        return sum(size for _, size, _ in self._opened.values())

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of the named tensors as stored."""
        return sum(self.tensors[name].nbytes for name in names)

    def stored_nbytes(self, name: str) -> int:
        """Bytes of a tensor in the files, also where the files have it in fewer bits."""
        return self.tensors[name].nbytes


def _prefetch(file: int, info: TensorInfo) -> None:
    """Bring a tensor into the page cache, without what lies around it in the file.

    Reading alone would also bring in what the system reads ahead: megabytes of tensors that are
    read later, and dropped before that if memory is short. So would asking for a tensor beyond
    `_MAX_PREFETCH`, which may not fit in memory twice.
    """
    if info.nbytes <= _MAX_PREFETCH and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, info.begin, info.nbytes, os.POSIX_FADV_WILLNEED)


def _state(path: Path) -> tuple[int, int, int]:
    """Inode, length and time of the last change: equal as long as a file is the same."""
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


# --- written files ---


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
    rank = {dtype: position for position, dtype in enumerate(DTYPE_CODES)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {
        "__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))
    }
    end = 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, names, end


def _pieces(tensor: Writable) -> Iterable[torch.Tensor]:
    """The bytes of a tensor in order, as flat uint8 tensors on the CPU."""
    if isinstance(tensor, FileTensor):
        return map(flat_bytes, tensor.pieces())
    return flat_bytes(tensor).split(_PIECE)
