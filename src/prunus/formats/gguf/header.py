"""The header of a GGUF file: its fields and the list of its tensors, as bytes and back.

A header is parsed without trust in any number in it. An array that claims 2^60 entries would keep a
reader busy until memory is full, so every length is compared with the rest of the file before it is
followed. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.

All numbers are little-endian. A text is its length in 8 bytes, and UTF-8:

    magic "GGUF", version (4 bytes), number of tensors (8), number of fields (8)
    per field: its key, the type of its value (4), the value; see `_packed`
    per tensor: its name, number of sides (4), sides (8 each) with columns first, type (4), and
        where it begins after the header (8)
    zeros up to a multiple of the alignment
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, NamedTuple

import torch

from prunus.formats.gguf.package import package

# Types of values: a text, a list, and scalars with their struct codes.
_TEXT, _LIST = 8, 9
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
# The most tensors, and the most fields.
_MAX_COUNT = 2**16
# Entries of all lists in a header. The largest vocabularies of today have 850,000 tokens, types and
# merges.
_MAX_ENTRIES = 2**21
_MAX_DEPTH = 4  # lists in lists
_MAX_DIMENSIONS = 8


class GgufField(NamedTuple):
    """A value of a header with its type; the numbers of types are those of the format.

    Attributes:
        value: A number, a text, or a list of them; bytes are a list of numbers up to 255.
        type: The type of the value.
        sub_type: The type of the entries of a list; None for that of its first one.
    """

    value: Any
    type: int
    sub_type: int | None = None


class ListedTensor(NamedTuple):
    """A tensor as a header lists it.

    Attributes:
        name: llama.cpp's name of the tensor.
        sides: Its shape in the order of the file, columns first.
        type_id: llama.cpp's number of its type.
        offset: Where its content begins after the header, in bytes.
    """

    name: str
    sides: tuple[int, ...]
    type_id: int
    offset: int


class Header(NamedTuple):
    """What the header of a file says.

    Attributes:
        fields: Key -> value with its type.
        tensors: The tensors in the order of the file.
        size: Bytes of the header, up to the first tensor.
    """

    fields: dict[str, GgufField]
    tensors: list[ListedTensor]
    size: int


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

    def text(self) -> str:
        """A text: its length as 8 bytes, then UTF-8."""
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int, depth: int = 0) -> GgufField:
        """A value of GGUF's type `kind`."""
        if kind in _SCALARS:
            return GgufField(self.scalar(_SCALARS[kind]), kind)
        if kind == _TEXT:
            return GgufField(self.text(), kind)
        if kind != _LIST or depth >= _MAX_DEPTH:
            raise ValueError(f"a value of type {kind} at {self.position:,}")
        inner, count = self.scalar("I"), self.scalar("Q")
        self.entries += count
        if self.entries > _MAX_ENTRIES:
            raise ValueError(
                f"its lists have {self.entries:,} entries up to {self.position:,}, and at most "
                f"{_MAX_ENTRIES:,} are read"
            )
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner]}"
            return GgufField([*struct.unpack(form, self.take(struct.calcsize(form)))], kind, inner)
        return GgufField([self.value(inner, depth + 1).value for _ in range(count)], kind, inner)


def read_header(file: BufferedReader) -> Header:
    """Read the header of an open file.

    Raises:
        ValueError: A number in it cannot be true, or it names two things alike.
    """
    cursor = _Cursor(file)
    if (magic := cursor.take(4)) != b"GGUF":
        raise ValueError(f"not a GGUF file; it starts with {magic!r}, not b'GGUF'")
    if (version := cursor.scalar("I")) not in (2, 3):
        raise ValueError(f"version {version} of the format; versions 2 and 3 can be read")
    tensors, count = cursor.scalar("Q"), cursor.scalar("Q")
    if max(tensors, count) > _MAX_COUNT:
        raise ValueError(
            f"{tensors:,} tensors and {count:,} fields; at most {_MAX_COUNT:,} are read"
        )
    fields = {cursor.text(): cursor.value(cursor.scalar("I")) for _ in range(count)}
    listed = [_listed(cursor) for _ in range(tensors)]
    if len(fields) < count or len({x.name for x in listed}) < tensors:
        raise ValueError("two fields or two tensors have the same name")
    alignment = fields.get("general.alignment", GgufField(32, 4)).value
    if not isinstance(alignment, int) or alignment.bit_count() != 1:
        raise ValueError(f"an alignment of {alignment!r}")
    return Header(fields, listed, padded(cursor.position, alignment))


def _listed(cursor: _Cursor) -> ListedTensor:
    """The next entry of the list of tensors."""
    name, dimensions = cursor.text(), cursor.scalar("I")
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {dimensions:,} dimensions")
    sides = tuple(cursor.scalar("Q") for _ in range(dimensions))
    # Even at one bit per weight, a tensor has no more numbers than its file has bits.
    if math.prod(sides) > 8 * cursor.size:
        raise ValueError(f"{name} has shape {sides} in {cursor.size:,} bytes")
    return ListedTensor(name, sides, cursor.scalar("I"), cursor.scalar("Q"))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to write.

    Attributes:
        name: llama.cpp's name of the tensor.
        shape: Its shape in the order of torch, rows first.
        type_id: llama.cpp's number of its type.
        nbytes: Bytes of its content in that type.
        read: Returns the content, `nbytes` bytes. It is called when the tensor is written.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int
    read: Callable[[], torch.Tensor]


def padded(nbytes: int, alignment: int = 32) -> int:
    """The bytes that a tensor takes in a file, up to the beginning of the next one.

    Tensors begin at multiples of `alignment` bytes; 32 holds where a file states none.

    >>> padded(32), padded(33)
    (32, 64)
    """
    return -(-nbytes // alignment) * alignment


def header_of(fields: Mapping[str, GgufField], tensors: Sequence[StoredTensor]) -> bytes:
    """Everything in a file before its tensors, and zeros up to them."""
    parts, begin = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))], 0
    for key, field in fields.items():
        parts += [_packed(key, _TEXT), struct.pack("<I", field.type), _packed(*field)]
    for x in tensors:
        form, sides = f"<I{len(x.shape)}QIQ", reversed(x.shape)
        parts += [
            _packed(x.name, _TEXT),
            struct.pack(form, len(x.shape), *sides, x.type_id, begin),
        ]
        begin += padded(x.nbytes)
    header = b"".join(parts)
    return header.ljust(padded(len(header)), b"\0")


def _packed(value: Any, kind: int, of: int | None = None) -> bytes:
    """A value of a header without its type.

    A list begins with the type `of` its entries (4 bytes) and their number (8).

    >>> _packed("ab", _TEXT)
    b'\\x02\\x00\\x00\\x00\\x00\\x00\\x00\\x00ab'
    """
    if kind in _SCALARS:
        return struct.pack("<" + _SCALARS[kind], value)
    if kind == _TEXT:
        text = value.encode() if isinstance(value, str) else value
        return struct.pack("<Q", len(text)) + text
    kind_of = package().GGUFValueType.get_type
    of = of if of is not None else 0 if isinstance(value, bytes) else int(kind_of(value[0]))
    return struct.pack("<IQ", of, len(value)) + b"".join(_packed(entry, of) for entry in value)
