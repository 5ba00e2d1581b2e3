"""What a GGUF file says before its weights, walked through without believing a number in it.

The reader in package gguf trusts its input: an array that claims 2^60 entries keeps it busy until memory is full. Here
every length is compared with what is left of the file before it is followed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

__all__ = ["check_header"]

_STRING, _ARRAY = 8, 9
# Type of a value -> its struct code.
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
_DEEPEST = 4  # arrays in arrays
_MOST_DIMENSIONS = 8


class _Walk:
    """A place in the file, which can only be moved inside it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self.order = "<"

    def skip(self, count: int) -> int:
        """Go on by `count` bytes; returns where they begin."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError(
                f"{count:,} bytes are announced at {start:,}, and {len(self.data) - start:,} are left"
            )
        return start

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack_from(self.order + code, self.data, self.skip(size))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of type `kind`; of an array nothing is kept."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth >= _DEEPEST:
            raise ValueError(f"a value of type {kind} at {self.at:,}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[inner]))
            return None
        if count > len(self.data) - self.at:
            raise ValueError(f"an array of {count:,} entries at {self.at:,}")
        for _ in range(count):
            self.value(inner, depth + 1)
        return None


def check_header(path: Path) -> dict[str, Any]:
    """`architecture` and number of `tensors` of a GGUF file.

    Raises:
        ValueError: it is truncated or damaged, or describes more blocks than it has tensors.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            fields, tensors = _walk(_Walk(data))
    except (ValueError, struct.error) as fault:
        raise ValueError(
            f"{path}: the GGUF file is truncated or damaged ({fault}); fetch it again"
        ) from fault
    architecture = fields.get("general.architecture", "unknown")
    for name, value in fields.items():
        if name.endswith(".block_count") and (
            not isinstance(value, int) or not 0 <= value <= tensors
        ):
            raise ValueError(
                f"{path}: the GGUF file is damaged: {name} is {value!r}, and there are {tensors} tensors"
            )
    return {"architecture": str(architecture), "tensors": tensors}


def _walk(walk: _Walk) -> tuple[dict[str, Any], int]:
    walk.skip(4)  # the magic number
    version = walk.scalar("I")
    if version and version & 0xFFFF == 0:
        walk.order = ">"
        version = struct.unpack(">I", struct.pack("<I", version))[0]
    if version not in (2, 3):
        raise ValueError(f"version {version} of the format, of which 2 and 3 can be read")
    tensors, count = walk.scalar("Q"), walk.scalar("Q")
    if max(tensors, count) > len(walk.data):
        raise ValueError(f"{tensors:,} tensors and {count:,} fields in {len(walk.data):,} bytes")
    fields = {}
    for _ in range(count):
        name = walk.string()
        fields[name] = walk.value(walk.scalar("I"))
    for _ in range(tensors):
        walk.string()
        dimensions = walk.scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions:,} dimensions")
        walk.skip(8 * dimensions + 4 + 8)
    return fields, tensors
