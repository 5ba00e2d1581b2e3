"""The header of a GGUF file, parsed without trust in any number in it.

The reader of the package gguf trusts its input: an array that claims 2^60 entries keeps it busy
until memory is full. So every length is compared with the rest of the file before it is followed.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import os
import re
import struct
from io import BufferedReader
from pathlib import Path
from typing import Any

from prunus.formats.gguf.file import GgufFile
from prunus.model.checkpoint.regular_files import open_regular

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


class _Cursor:
    """A position in the file that cannot leave it.

    Every method that reads moves the position on, and raises ValueError if the file ends before.

    Attributes:
        size: Bytes of the file.
        position: Offset of the next byte.
        entries: Entries of all arrays so far, compared with `_MAX_ENTRIES`.
    """

    def __init__(self, file: BufferedReader) -> None:
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self.position = self.entries = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start, self.position = self.position, self.position + count
        left = self.size - start
        if count > left or len(data := self._file.read(count)) < count:
            raise ValueError(f"{count:,} bytes are announced at {start:,}, and {left:,} are left")
        return data

    def scalar(self, code: str) -> Any:
        """One little-endian number; `code` is its letter in the module struct."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        """A string: its length as 8 bytes, then UTF-8. Other bytes become replacement marks."""
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

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
            self.take(count * struct.calcsize("<" + _SCALARS[inner]))
            return None
        for _ in range(count):
            self.value(inner, depth + 1)
        return None


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file of a stranger: its header is checked before the package reads it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file, truncated or damaged, or its lengths do not fit the
            shapes of its tensors.
    """
    with open_regular(path) as file:
        cursor = _Cursor(file)
        try:
            fields, tensors = _walk(cursor)
            _check_lengths(fields, str(fields.get("general.architecture", "unknown")), tensors)
            return GgufFile.open(path)
        except FileNotFoundError:
            raise
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
    cursor.take(4)  # the magic number
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
        if math.prod(shapes[name]) > 8 * cursor.size:
            raise ValueError(f"{name} has shape {shapes[name]} in {cursor.size:,} bytes")
        cursor.take(4 + 8)  # its type and offset
    return fields, shapes
