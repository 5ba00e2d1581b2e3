"""A checkpoint on disk as named tensors that are read one at a time.

Knows file formats and nothing else: no model class, no block, no pruning. Only safetensors are read,
never pickle, and no path that an index file names is followed out of the checkpoint's folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from prunus.model.checkpoint.atomic_files import TENSOR_DTYPES, read_json

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "Checkpoint",
    "TensorInfo",
    "auxiliary_files",
    "resolve_folder",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# Weights in any format and prunus' own files: everything else beside them is copied along.
_NOT_AUXILIARY = {
    ".safetensors",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".partial",
    *_PICKLE_SUFFIXES,
}
_OWN_FILES = {INDEX_NAME, "prunus.json", "README.md"}
_LONGEST_HEADER, _PIECE = 10**8, 1 << 16  # the library refuses longer ones
_LARGE = 2**28  # bytes; see `_fetch`


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor: its file, shape, dtype, and where in the file it begins (in bytes)."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The safetensors of one folder.

    Opening reads the headers only: every shard must be there, whole, and hold what the index says.

    Args:
        folder: the checkpoint.
        only: read these shards and no index, for a folder that is still being written.

    Raises:
        FileNotFoundError: no such folder, no safetensors in it, or a shard is missing.
        ValueError: the index or a shard is damaged, or the index names a file outside the folder.
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
        self._opened: dict[str, tuple[int, int, int]] = {}
        for file in files:
            self._read_header(file, digest)
        if weight_map is not None:
            for name, file in weight_map.items():
                if name not in self.tensors or self.tensors[name].file != file:
                    raise ValueError(
                        f"{folder / INDEX_NAME} says that {name!r} is in {file}, but that file does not hold it; "
                        "the index and the shards do not belong together"
                    )
        #: SHA-256 over shard names, sizes and headers: tells checkpoints apart without reading the weights.
        self.fingerprint = digest.hexdigest()

    def _read_index(self) -> dict[str, str] | None:
        path = self.folder / INDEX_NAME
        if not path.exists():
            if (self.folder / SINGLE_NAME).exists():
                return None
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
            hint = (
                f" It holds {pickles[0]}, a pickle, which can run code when it is read and is never loaded: "
                "save the model as safetensors first (save_pretrained does)."
                if pickles
                else " Expected model.safetensors, or model.safetensors.index.json with its shards."
            )
            raise FileNotFoundError(f"{self.folder} holds no safetensors checkpoint.{hint}")
        content = read_json(path)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path} has no 'weight_map' that maps tensor names to files")
        for name, file in weight_map.items():
            # Plain names only: a separator, a drive or '..' could lead out of the folder.
            if (
                not isinstance(file, str)
                or not file
                or Path(file).name != file
                or "\\" in file
                or file == ".."
            ):
                raise ValueError(
                    f"{path} places {name!r} in {file!r}: shards must be plain file names inside the folder"
                )
            if not file.endswith(".safetensors"):
                raise ValueError(
                    f"{path} places {name!r} in {file!r}, which is not a .safetensors file"
                )
        return weight_map

    def _read_header(self, file: str, digest: hashlib._Hash) -> None:
        path = self.folder / file
        if not path.exists():
            raise FileNotFoundError(
                f"shard {file} is missing from {self.folder}; download or copy the checkpoint again"
            )
        self._opened[file] = _state(path)
        try:
            begin = _read_header_alone(path)
            # The library sees to it that offsets and file length agree and that nothing lies between tensors.
            with safe_open(path, framework="pt") as handle:
                names = list(handle.keys())
                for name in handle.offset_keys():
                    piece = handle.get_slice(name)
                    code = piece.get_dtype()
                    if code not in TENSOR_DTYPES:
                        raise ValueError(
                            f"{path}: tensor {name!r} has dtype {code}, which is not supported"
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

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) on the CPU in the dtype of the file.

        The tensors are views of the mapped file: convert or copy what is to be kept, and let go of them
        before the next is taken, so that the pages can leave memory.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        self.check_unchanged(by_file)
        for file, members in by_file.items():
            with (
                safe_open(self.folder / file, framework="pt") as handle,
                open(self.folder / file, "rb") as plain,
            ):
                for name in members:
                    _fetch(plain.fileno(), self.tensors[name])
                    yield name, handle.get_tensor(name)

    def check_unchanged(self, files: Iterable[str] | None = None) -> None:
        """See that `files` of the checkpoint, by default all, are those that were opened.

        Whoever made something of weights asks before that gets its name: a mapped file shows what is written to it later.

        Raises:
            FileNotFoundError: one is gone.
            ValueError: one was replaced or written to.
        """
        for file in self._opened if files is None else files:
            try:
                now = _state(self.folder / file)
            except FileNotFoundError as fault:
                raise FileNotFoundError(
                    f"{self.folder / file} is gone since it was opened; put it back, and the same command goes on"
                ) from fault
            if now != self._opened[file]:
                raise ValueError(
                    f"{self.folder / file} was changed since it was opened: what was read of it cannot be relied on. "
                    "Put the checkpoint back as it was, and the same command goes on"
                )

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of the named tensors as stored."""
        return sum(self.tensors[name].nbytes for name in names)


def _fetch(file: int, info: TensorInfo) -> None:
    """Bring a tensor into the page cache, and nothing of what lies around it.

    Touched through the mapping, its pages would bring along as much as the system reads ahead, megabytes on some disks,
    of tensors whose turn comes later: where memory is short these are read again. Beyond `_LARGE` bytes that is little
    beside the tensor, which might not fit in memory as a whole, or be an embedding of which a few rows are wanted.
    """
    if info.nbytes <= _LARGE and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, info.begin, info.nbytes, os.POSIX_FADV_WILLNEED)


def _read_header_alone(path: Path) -> int:
    """Bring a file's header into the page cache, and nothing of what follows it; gives the length of the two.

    Mapped, its first page would bring along as much as the system reads ahead, megabytes on some disks: of every shard,
    long before its turn, and where memory is short once more when it comes.
    """
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        end = 8 + int.from_bytes(file.read(8), "little")
        for start in range(8, min(end, os.fstat(file.fileno()).st_size, _LONGEST_HEADER), _PIECE):
            file.seek(start)
            file.read(_PIECE)
        return end


def _state(path: Path) -> tuple[int, int, int]:
    """What tells that a file is still the same: its number, length and time of the last writing."""
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def auxiliary_files(folder: Path, code: bool = False) -> list[Path]:
    """Files of a checkpoint folder that travel with the weights: config, tokenizer, chat template, licence.

    Python files travel only where the user trusts the checkpoint's `code`.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix not in _NOT_AUXILIARY
        and (code or path.suffix != ".py")
        and path.name not in _OWN_FILES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
    )


def resolve_folder(model: str | Path) -> Path:
    """The folder of `model`: itself where it is one, otherwise a snapshot downloaded from the hub.

    Downloads safetensors, configuration and tokenizer files only.

    Raises:
        FileNotFoundError: neither a folder nor a hub id, or the hub cannot be reached.
    """
    path = Path(model)
    if path.is_dir():
        return path
    name = str(model)
    if path.is_file():
        hint = (
            "; turn it into a checkpoint first: prunus import FILE.gguf DEST"
            if path.suffix == ".gguf"
            else ""
        )
        raise FileNotFoundError(
            f"{name} is a file; expected the folder of a Hugging Face checkpoint{hint}"
        )
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local or not name:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a hub id")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        )
    except Exception as fault:
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise FileNotFoundError(
            f"{name!r} is neither a local folder nor a model that could be downloaded from the hub: {reason}"
        ) from fault
    return Path(found)
