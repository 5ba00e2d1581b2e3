"""GGUF import: one file of llama.cpp becomes a checkpoint folder that transformers can read.

Quantised tensors are unpacked. The result has the weights that llama.cpp computes with, not those
that the model had before it was quantised.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from prunus.hardware.errors import did_you_mean, reason
from prunus.hardware.process_state import no_stderr
from prunus.model.checkpoint.atomic_files import (
    TEMPORARY_SUFFIX,
    fsync_folder,
    in_held,
    read_json,
    remove,
    remove_temporaries,
    write_json,
    write_text,
)
from prunus.model.checkpoint.gguf_card import imported_card
from prunus.model.checkpoint.gguf_file import GgufFile, check_extra
from prunus.model.checkpoint.gguf_model import complete_config, read_experts
from prunus.model.checkpoint.gguf_vocabulary import adds_bos, restore_split
from prunus.model.checkpoint.lock import LOCK_NAME, locked
from prunus.model.checkpoint.output_folder import is_vacant
from prunus.model.device import DTYPES
from prunus.model.kinds import CAUSAL
from prunus.model.meta_model import build_on_meta

# Types of values: a string, an array, and scalars with their struct codes.
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
# Lengths up to this value fit any model: some fields count what has no tensor.
_SMALL = 2**16
# Entries of all lists in a header, which the reader of the package makes objects of a kilobyte of.
# The largest vocabularies of today have 850,000 tokens, types and merges.
_MAX_ENTRIES = 2**21
_MAX_POSITIONS = 2**24  # tokens
_MAX_DEPTH = 4  # arrays in arrays
_MAX_DIMENSIONS = 8


def import_gguf(
    path: Path,
    dest: Path,
    *,
    overwrite: bool = False,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] | None = None,
    file: GgufFile | None = None,
) -> dict[str, Any]:
    """Write the model and tokenizer of a GGUF file to the folder `dest`.

    The files get their names when all of them are complete, and config.json last, so no loader
    takes a part for a model. The whole model is in memory for a while.

    Args:
        path: The GGUF file.
        dest: A folder that does not exist or is empty.
        overwrite: Whether to replace what `dest` holds. It stays there until the new files are
            complete.
        dtype: Dtype of the weights in the checkpoint, a name of `DTYPES`.
        progress: Called with a line of text before each step; None for silence.
        file: The GGUF file, if the caller has opened it; None opens it.

    Returns:
        `architecture` (llama.cpp's name), `parameters` (count), `tied` (whether head and embedding
        are one matrix), `chat_template` (whether there is one), `types` (those of the file -> share
        of the weights), `dtype`, `files` (names), `bytes` (of all files).

    Raises:
        FileNotFoundError: There is no such file.
        FileExistsError: `dest` holds something and `overwrite` is not set, or another run holds it.
        ModuleNotFoundError: The extra `gguf` is not installed.
        ValueError: It is no GGUF file, it is truncated or damaged, or transformers cannot import
            the model.
    """
    path, dest = Path(path), Path(dest)
    _check_arguments(path, dest, overwrite=overwrite, dtype=dtype)
    say = progress or (lambda line: None)
    say(f"reading {path.name}")
    file = file or open_gguf(path)
    with locked(dest):
        check_destination(dest, overwrite=overwrite)
        staging = in_held(dest / f"import{TEMPORARY_SUFFIX}")
        remove_temporaries(dest)
        staging.mkdir()
        try:
            say(f"unpacking {len(file.tensors)} tensors to {dtype}")
            # transformers and gguf show progress bars; the caller shows its own.
            with no_stderr(), file.read_once():
                summary = _convert(path, file, staging, DTYPES[dtype])
            restore_split(file, staging)
            _tidy(staging)
            say(f"writing {dest}")
            _put_in_place(staging, dest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    files = sorted(written for written in dest.iterdir() if written.is_file())
    return {
        "architecture": file.architecture,
        **summary,
        "types": file.types,
        "dtype": dtype,
        "files": [written.name for written in files],
        "bytes": sum(written.stat().st_size for written in files),
    }


def _check_arguments(path: Path, dest: Path, *, overwrite: bool, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(sorted(DTYPES))}, not {dtype!r}"
            f"{did_you_mean(dtype, DTYPES)}"
        )
    check_destination(dest, overwrite=overwrite)
    if not path.is_file():
        state = "not a file" if path.exists() else "no such file"
        raise FileNotFoundError(f"{path}: {state}; give a file of llama.cpp, NAME.gguf")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(
                f"{path}: not a GGUF file; it starts with {magic!r}, not b'GGUF'. Give a file of "
                "llama.cpp"
            )
    check_extra()


def check_destination(dest: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError unless the folder `dest` is missing, vacant, or may be overwritten."""
    if not is_vacant(dest) and not overwrite:
        raise FileExistsError(
            f"{dest}: the folder is not empty; choose another one or give `overwrite`"
        )


def _convert(path: Path, file: GgufFile, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Let transformers read a GGUF file and save it to `folder`; returns figures of the model."""
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Versions of transformers without GgufConfig unpack every GGUF file by default.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config is not None else {}
    try:
        described = complete_config(transformers.AutoConfig.from_pretrained(**source), file)
        _check_size(described, sum(int(tensor.n_elements) for tensor in file.tensors.values()))
        says_bos = {"add_bos_token": True} if adds_bos(file) else {}
        card = imported_card(file, path.name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source, **says_bos)
        if described.model_type in ("mixtral", "qwen2_moe", "qwen3_moe"):
            model, loading = read_experts(described, file, dtype), {}
        else:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                **source, **unpack, config=described, dtype=dtype, output_loading_info=True
            )
    except Exception as error:
        raise ValueError(
            f"{path}: transformers cannot import this file ({reason(error)})"
        ) from error
    # transformers would fill missing weights with random numbers.
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, loading.get(problem) or ())):
            raise ValueError(
                f"{path}: transformers does not fully know this kind of model: "
                f"{problem.replace('_', ' ')} {', '.join(names[:5])}"
                f"{' ...' if len(names) > 5 else ''}"
            )
    tied = _tie_if_one_matrix(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", card)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tied": tied,
        "chat_template": tokenizer.chat_template is not None,
    }


@torch.no_grad()
def _tie_if_one_matrix(model: Any) -> bool:
    """Tie the head to the embedding if both hold one matrix. Returns whether they are tied now.

    Many GGUF files store the embedding of a tied model twice, the second time as the head and in
    more bits. The two then differ by errors of rounding, at most by a fifth (Q2_K); matrices that
    were trained apart differ by more than their own size. The head's form is kept, which is the
    more precise one.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is head or embedding.shape != head.shape:
        return embedding is head
    if float((embedding - head).norm(dtype=torch.float32)) > 0.3 * float(head.float().norm()):
        return False
    model.get_input_embeddings().weight = head
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return True


def _check_size(config: Any, weights: int) -> None:
    """Refuse a model that is larger than the weights of its file, before it takes memory."""
    model = build_on_meta(CAUSAL, config, torch.float32, False)
    count = sum(parameter.numel() for parameter in model.parameters())
    # Tied weights are counted once here, and the file may store them once or twice.
    if count > 2 * weights:
        raise ValueError(f"its fields describe {count:,} weights, and its tensors hold {weights:,}")


def _tidy(folder: Path) -> None:
    """Remove traces of the GGUF file from config.json; give all files the same permissions."""
    config = read_json(folder / "config.json")
    for leftover in ("_model_name_or_path", "_name_or_path", "quantization_config"):
        config.pop(leftover, None)
    write_json(folder / "config.json", config)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # the safetensors library makes its files readable by their owner alone


def _put_in_place(staging: Path, dest: Path) -> None:
    """Move the files of a folder into `dest`, in the place of what is there."""
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    # The configuration makes a folder a model, so it is removed first and appears last.
    needed = (staging.name, LOCK_NAME)
    old = [path for path in dest.iterdir() if path.name not in needed]
    for path in sorted(old, key=lambda path: path.name != "config.json"):
        remove(path)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, in_held(dest / path.name))
        fsync_folder(dest)


# --- the header, parsed without trust in any number in it ---

# The reader of the package gguf trusts its input: an array that claims 2^60 entries keeps it busy
# until memory is full. So every length is compared with the rest of the file before it is followed.
# Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.


class _Cursor:
    """A position in the file that cannot leave it.

    Every method that reads moves the position on, and raises ValueError if the file ends before.

    Attributes:
        data: The mapped file.
        position: Offset of the next byte.
        entries: Entries of all arrays so far, compared with `_MAX_ENTRIES`.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = self.entries = 0

    def skip(self, count: int) -> int:
        """Move on by `count` bytes, and return the position before."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise ValueError(
                f"{count:,} bytes are announced at {start:,}, and {len(self.data) - start:,} are "
                "left"
            )
        return start

    def scalar(self, code: str) -> Any:
        """One little-endian number; `code` is its letter in the module struct."""
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.data, self.skip(size))[0]

    def string(self) -> str:
        """A string: its length as 8 bytes, then UTF-8. Other bytes become replacement marks."""
        length = self.scalar("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of GGUF's type `kind`. The content of an array is checked and dropped."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise ValueError(f"a value of type {kind} at {self.position:,}")
        inner, count = self.scalar("I"), self.scalar("Q")
        self.entries += count
        if self.entries > _MAX_ENTRIES:
            raise ValueError(
                f"its lists have {self.entries:,} entries up to {self.position:,}, and at most "
                f"{_MAX_ENTRIES:,} are read"
            )
        if inner in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[inner]))
            return None
        for _ in range(count):
            self.value(inner, depth + 1)
        return None


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file of a stranger: its header is checked before the package reads it.

    Raises:
        ValueError: It is truncated or damaged, or its lengths do not fit the shapes of its tensors.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            fields, tensors = _walk(_Cursor(data))
        _check_lengths(fields, str(fields.get("general.architecture", "unknown")), tensors)
        return GgufFile.open(path)
    except Exception as fault:  # the reader trusts its input and raises errors of many kinds
        raise ValueError(
            f"{path}: the GGUF file is truncated or damaged ({fault}); fetch it again"
        ) from fault


def _check_lengths(
    fields: dict[str, Any], architecture: str, tensors: dict[str, tuple[int, ...]]
) -> None:
    """Compare the lengths in the fields, which size the model, with the shapes of the tensors."""
    blocks = {match[1] for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    said = fields.get(f"{architecture}.block_count", 0)
    if not isinstance(said, int) or said != len(blocks) or not blocks:
        raise ValueError(
            f"{architecture}.block_count is {said!r}, and there are tensors of {len(blocks)} blocks"
        )
    if any(int(number[:9]) >= len(blocks) for number in blocks):
        raise ValueError(f"its blocks are not numbered from 0 to {len(blocks) - 1}")
    longest = max((side for shape in tensors.values() for side in shape), default=0)
    for name, value in fields.items():
        length = name.removeprefix(f"{architecture}.")
        if length == name or not isinstance(value, int) or isinstance(value, bool):
            continue
        positions = re.search(r"context_length|sliding_window", length)
        if value > (limit := _MAX_POSITIONS if positions else max(longest, _SMALL)):
            raise ValueError(f"{name} is {value:,}, and at most {limit:,} fits its tensors")


def _walk(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The fields of a header, and the shape of every tensor."""
    cursor.skip(4)  # the magic number
    if (version := cursor.scalar("I")) not in (2, 3):
        raise ValueError(f"version {version} of the format; versions 2 and 3 can be read")
    tensors, count = cursor.scalar("Q"), cursor.scalar("Q")
    if max(tensors, count) > _SMALL:
        raise ValueError(f"{tensors:,} tensors and {count:,} fields; at most {_SMALL:,} are read")
    fields = {}
    for _ in range(count):
        name = cursor.string()
        fields[name] = cursor.value(cursor.scalar("I"))
    shapes = {}
    for _ in range(tensors):
        name = cursor.string()
        dimensions = cursor.scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions:,} dimensions")
        shapes[name] = tuple(cursor.scalar("Q") for _ in range(dimensions))
        # Even at one bit per weight, a tensor has no more numbers than its file has bits.
        if math.prod(shapes[name]) > 8 * len(cursor.data):
            raise ValueError(f"{name} has shape {shapes[name]} in {len(cursor.data):,} bytes")
        cursor.skip(4 + 8)  # its type and offset
    return fields, shapes
