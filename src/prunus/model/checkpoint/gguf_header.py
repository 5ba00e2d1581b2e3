"""The header of a GGUF file, parsed without trust in any number in it.

The reader of the package gguf trusts its input: an array that claims 2^60 entries keeps it busy
until memory is full. So this file walks through the header first. It compares every length with the
rest of the file before it follows it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

# Types of values: a string, an array, and scalars with their struct codes.
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
# Lengths up to this value fit any model: some fields count what has no tensor.
_SMALL = 2**16
_MAX_POSITIONS = 2**24  # tokens
_MAX_DEPTH = 4  # arrays in arrays
_MAX_DIMENSIONS = 8


class _Cursor:
    """A position in the file that cannot leave it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0
        self.byte_order = "<"

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
        size = struct.calcsize("<" + code)
        return struct.unpack_from(self.byte_order + code, self.data, self.skip(size))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of type `kind`. The content of an array is checked and dropped."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise ValueError(f"a value of type {kind} at {self.position:,}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[inner]))
            return None
        # Every other entry takes at least a byte, so more entries than bytes cannot be true.
        if count > len(self.data) - self.position:
            raise ValueError(f"an array of {count:,} entries at {self.position:,}")
        for _ in range(count):
            self.value(inner, depth + 1)
        return None


def check_header(path: Path) -> dict[str, Any]:
    """Check the header of a GGUF file.

    Returns:
        `architecture`, number of `tensors`, and number of `weights` in all of them.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            fields, tensors = _walk(_Cursor(data))
    except (ValueError, struct.error) as fault:
        raise ValueError(
            f"{path}: the GGUF file is truncated or damaged ({fault}); fetch it again"
        ) from fault
    architecture = str(fields.get("general.architecture", "unknown"))
    try:
        _check_lengths(fields, architecture, tensors)
    except ValueError as fault:
        raise ValueError(f"{path}: the GGUF file is damaged: {fault}; fetch it again") from None
    weights = sum(math.prod(shape) for shape in tensors.values())
    return {"architecture": architecture, "tensors": len(tensors), "weights": weights}


def _check_lengths(
    fields: dict[str, Any], architecture: str, tensors: dict[str, tuple[int, ...]]
) -> None:
    """Compare the lengths in the fields with the shapes of the tensors.

    A library that believes the fields would make a model of their size, or leave out blocks.
    """
    blocks = {match[1] for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    said = fields.get(f"{architecture}.block_count", 0)
    if not isinstance(said, int) or said != len(blocks) or not blocks:
        raise ValueError(
            f"{architecture}.block_count is {said!r}, and there are tensors of {len(blocks)} blocks"
        )
    if any(int(number[:9]) >= len(blocks) for number in blocks):
        raise ValueError(f"its blocks are not numbered from 0 to {len(blocks) - 1}")
    exact: dict[str, int] = {}
    if len(embedding := tensors.get("token_embd.weight", ())) == 2:
        exact = {"embedding_length": embedding[0], "vocab_size": embedding[1]}
    if len(up := tensors.get("blk.0.ffn_up.weight", ())) == 2:
        exact["feed_forward_length"] = up[1]
    longest = max((side for shape in tensors.values() for side in shape), default=0)
    for name, value in fields.items():
        length = name.removeprefix(f"{architecture}.")
        if length == name or not isinstance(value, int) or isinstance(value, bool):
            continue
        if length in exact and value != exact[length]:
            raise ValueError(f"{name} is {value:,}, and its tensors have {exact[length]:,} there")
        positions = re.search(r"context_length|sliding_window", length)
        if value > (limit := _MAX_POSITIONS if positions else max(longest, _SMALL)):
            raise ValueError(f"{name} is {value:,}, and at most {limit:,} fits its tensors")


def _walk(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The fields of a header, and the shape of every tensor."""
    cursor.skip(4)  # the magic number
    version = cursor.scalar("I")
    if version and version & 0xFFFF == 0:
        # A small number with its bytes swapped: the file is big-endian.
        cursor.byte_order = ">"
        version = struct.unpack(">I", struct.pack("<I", version))[0]
    if version not in (2, 3):
        raise ValueError(f"version {version} of the format; versions 2 and 3 can be read")
    tensors, count = cursor.scalar("Q"), cursor.scalar("Q")
    if max(tensors, count) > len(cursor.data):
        raise ValueError(f"{tensors:,} tensors and {count:,} fields in {len(cursor.data):,} bytes")
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
