"""GGUF files: fields and tensors are read, and files written.

llama.cpp's package `gguf` decodes the types of tensors, and knows the names of fields and tensors.
Files of strangers are checked; see `open_gguf`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from prunus.formats.gguf.header import (
    GgufField,
    Header,
    ListedTensor,
    StoredTensor,
    header_of,
    padded,
    read_header,
)
from prunus.formats.gguf.package import package
from prunus.formats.gguf.types import PLAIN_DTYPES, TYPES, GgufType
from prunus.hardware.process_state import replaced
from prunus.model.checkpoint.files import open_regular, replacing
from prunus.rounding.group_quantizer import GroupedWeight
from prunus.words import require_library

# Types that the package cannot decode, by their numbers; versions up to 0.19 do not know them.
_OWN = {TYPES["Q2_0"].number: TYPES["Q2_0"]}
# Weights that are unpacked at a time: 64 MB in float32.
_UNPACKED = 2**24
#: The field with the record of the run that made a file.
RECORD_FIELD = "prunus.compress"
#: A list of types or an importance matrix of prunus, as bytes.
OWN_LISTS = re.compile(
    rb"(\^[\w\\.-]+\$=\w+\n)+|GGUF.{28}general\.architecture.{12}prunus.*", re.DOTALL
)
# Lengths up to this value fit any model: some fields count what has no tensor.
_SMALL = 2**16
_MAX_POSITIONS = 2**24  # tokens
# Fields that describe how a file is stored, and not its model.
_OF_STORAGE = (
    "GGUF.", "general.architecture", "general.file_type", "general.alignment", "split.", "prunus.",
)  # fmt: skip


def check_extra() -> None:
    """Raise ModuleNotFoundError unless the packages for GGUF files are installed."""
    for module in ("gguf", "accelerate"):
        require_library(module, "a GGUF file", "gguf")


class _FileBytes:
    """The bytes of an open file, which is closed with this object.

    They are read and not mapped, so that a file that is cut short kills no process.
    """

    def __init__(self, path: Path) -> None:
        with open_regular(path) as opened:
            self._handle = os.dup(opened.fileno())
        weakref.finalize(self, os.close, self._handle)
        self._path, self.size = path, os.fstat(self._handle).st_size

    def read(self, start: int, count: int) -> Any:
        """Some bytes as a new array, uint8.

        Raises:
            ValueError: The file ends before them: it was cut short since it was opened.
        """
        data, done = np.empty(count, dtype=np.uint8), 0
        while done < count:
            if not (size := os.preadv(self._handle, [data[done:].data], start + done)):
                raise ValueError(
                    f"{self._path} was cut short while it was read: it ends before byte "
                    f"{start + count:,}. Put it back as it was, and run the same command again"
                )
            done += size
        return data


@dataclass(frozen=True)
class TensorInFile:
    """A tensor of an open file, whose content is read when it is used.

    Attributes:
        data: The bytes of the file.
        name: llama.cpp's name of the tensor.
        shape: Its shape in the order of the file, columns first.
        tensor_type: Its type in the package, or that of prunus if the package cannot decode it.
        data_offset: Where its content begins in the file.
        row_bytes: Bytes of a row.
    """

    data: _FileBytes
    name: str
    shape: tuple[int, ...]
    tensor_type: Any
    data_offset: int
    row_bytes: int

    @classmethod
    def of(cls, data: _FileBytes, header: Header, listed: ListedTensor) -> TensorInFile:
        """A tensor that the header of a file lists.

        Raises:
            ValueError: Its type is not known or does not fit its shape, or the file ends before it.
        """
        gguf, start = package(), header.size + listed.offset
        kind = _OWN.get(listed.type_id) or gguf.GGMLQuantizationType(listed.type_id)
        width, nbytes = gguf.GGML_QUANT_SIZES.get(kind) or (kind.span, kind.nbytes)
        columns = math.prod(listed.sides[:1])
        found = cls(data, listed.name, listed.sides, kind, start, columns // width * nbytes)
        if columns % width or start + found.n_bytes > data.size:
            raise ValueError(
                f"{found.name} of shape {found.shape} in {kind.name} ends beyond the "
                f"{data.size:,} bytes of the file, or within a group of {width} columns"
            )
        return found

    @property
    def n_elements(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of its content."""
        return math.prod(self.shape[1:]) * self.row_bytes

    def rows(self, first: int, count: int) -> Any:
        """The bytes of some rows of the content, an array of uint8 (count, bytes of a row)."""
        start = self.data_offset + first * self.row_bytes
        return self.data.read(start, count * self.row_bytes).reshape(count, self.row_bytes)


def new_fields(architecture: str) -> Any:
    """A writer of the package without a file; `fields` is what was added, key -> `GgufField`."""

    def add_key_value(
        self: Any, key: str, val: Any, vtype: int, sub_type: int | None = None
    ) -> None:
        vars(self).setdefault("fields", {})[key] = GgufField(val, vtype, sub_type)

    # All methods of the package that add a field call this one, the first before `__init__` ends.
    kind = type("FieldsOnly", (package().GGUFWriter,), {"add_key_value": add_key_value})
    return kind(None, architecture)


def _as_package_has(field: GgufField) -> Any:
    """A field as the package's reader has it: parts, which of them are values, and types."""
    is_list = isinstance(field.value, list)
    parts = [
        x.encode() if isinstance(x, str) else [x]
        for x in (field.value if is_list else [field.value])
    ]
    return SimpleNamespace(parts=parts, data=range(len(parts)), types=[*field[1 : 2 + is_list]])


class _Unpacked(NamedTuple):
    """A tensor for transformers, which is unpacked when it is used: no type need be known there."""

    file: GgufFile
    name: str
    tensor_type: int = 0  # float32

    @property
    def data(self) -> Any:
        """The weights, float32."""
        return self.file.read(self.name).numpy()


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file.

    Attributes:
        header: What its header says.
        tensors: Name -> tensor, whose data are read when they are used.
        data: The bytes of the file.
    """

    header: Header
    tensors: dict[str, TensorInFile]
    data: _FileBytes

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read a header; for files of strangers see `open_gguf`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no regular file, its header is damaged, or it ends before a tensor.
        """
        data = _FileBytes(path)
        with open_regular(path) as file:
            header = read_header(file)
        return cls(
            header,
            {listed.name: TensorInFile.of(data, header, listed) for listed in header.tensors},
            data,
        )

    def read_by_transformers(self) -> contextlib.AbstractContextManager[None]:
        """While active, transformers takes this file as it is open.

        Otherwise it would read the header two or three times, which takes many seconds if the
        vocabulary is large, and map the file: one that is cut short ends the process.
        """
        fields = {key: _as_package_has(field) for key, field in self.header.fields.items()}
        tensors = [_Unpacked(self, name) for name in self.tensors]
        reader = SimpleNamespace(fields=fields, tensors=tensors)
        return replaced(package(), "GGUFReader", lambda path: reader)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a field; `default` if it is missing."""
        return self.header.fields.get(key, GgufField(default, 0)).value

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the kind of model."""
        return str(self.get("general.architecture", "unknown"))

    def fields(self) -> dict[str, GgufField]:
        """All fields that describe the model, with their types, to write them again.

        Fields that describe the storage (`_OF_STORAGE`) are left out: they differ in the next file.
        """
        stored = self.header.fields.items()
        described = {key: field for key, field in stored if not key.startswith(_OF_STORAGE)}
        return {**new_fields(self.architecture).fields, **described}

    def read(self, name: str) -> torch.Tensor:
        """A tensor, unpacked to float32, with rows first.

        llama.cpp counts sides the other way round.

        Raises:
            ValueError: There is no such tensor.
        """
        return torch.cat(list(self.rows(name))).reshape(*self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the order of torch, rows first.

        Raises:
            ValueError: There is no such tensor.
        """
        if name not in self.tensors:
            raise ValueError(f"it has no tensor {name}")
        return tuple(int(side) for side in reversed(self.tensors[name].shape))

    def rows(self, name: str, rows_O: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """Some rows of a tensor, unpacked to float32 (rows, I), a part in memory at a time.

        Args:
            name: The tensor. The rows of the experts in it follow each other.
            rows_O: int64, their numbers in the order wanted; None for all.
        """
        tensor, kind, shape = self.tensors[name], self.tensors[name].tensor_type, self.shape(name)
        rows_O = torch.arange(math.prod(shape[:-1])) if rows_O is None else rows_O
        for part_O in rows_O.split(max(1, _UNPACKED // max(1, shape[-1]))):
            # Rows of one head are in another order, so that few between them are read in vain.
            first, last = map(int, part_O.aminmax()) if len(part_O) else (0, -1)
            data = tensor.rows(first, last + 1 - first)[(part_O - first).numpy()]
            yield (
                GroupedWeight(kind, torch.from_numpy(data)).dense()
                if isinstance(kind, GgufType)
                else torch.from_numpy(np.array(package().quants.dequantize(data, kind)))
            )

    def raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor as they are stored, uint8."""
        rows = math.prod(self.shape(name)[:-1])
        return torch.from_numpy(self.tensors[name].rows(0, rows).reshape(-1))

    def exact(self, name: str) -> torch.Tensor:
        """A tensor in F32, F16 or BF16 as it is stored, rows first."""
        dtype = PLAIN_DTYPES[self.tensors[name].tensor_type.name]
        return self.raw(name).view(dtype).reshape(self.shape(name))

    @property
    def linears(self) -> list[str]:
        """Names of the matrices in the blocks, but for routers; experts are one of three sides."""
        return [
            name
            for name, tensor in self.tensors.items()
            if name.startswith("blk.") and len(tensor.shape) > 1 and "ffn_gate_inp" not in name
        ]

    def bits(self, names: Iterable[str]) -> float | None:
        """Bits per weight of some tensors; None for none."""
        tensors = [self.tensors[name] for name in names]
        count = sum(tensor.n_elements for tensor in tensors)
        return 8 * sum(tensor.n_bytes for tensor in tensors) / count if count else None

    @property
    def block_bits(self) -> float | None:
        """Bits per weight of the linears in the blocks; None if there are none."""
        return self.bits(self.linears)

    @property
    def types(self) -> dict[str, float]:
        """Name of a type -> share of all weights (0 to 1) that have it, the largest first."""
        sizes = Counter[str]()
        for tensor in self.tensors.values():
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        return {name: round(size / sizes.total(), 4) for name, size in sizes.most_common()}


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file of a stranger, and compare its lengths with the shapes of its tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file, truncated or damaged, or its lengths do not fit.
    """
    try:
        file = GgufFile.open(path)
        _check_lengths(file)
        return file
    except FileNotFoundError:
        raise
    except Exception as fault:  # a damaged header raises errors of many kinds
        raise ValueError(
            f"{path}: the GGUF file is truncated or damaged ({fault}); fetch it again"
        ) from fault


def _check_lengths(file: GgufFile) -> None:
    """Compare the lengths in the fields, which size the model, with the shapes of the tensors."""
    architecture = file.architecture
    blocks = {match[1] for name in file.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    said = file.get(f"{architecture}.block_count", 0)
    if not isinstance(said, int) or said != len(blocks) or not blocks:
        raise ValueError(
            f"{architecture}.block_count is {said!r}, and there are tensors of {len(blocks)} blocks"
        )
    if any(int(number[:9]) >= len(blocks) for number in blocks):
        raise ValueError(f"its blocks are not numbered from 0 to {len(blocks) - 1}")
    longest = max(_SMALL, *(side for x in file.tensors.values() for side in x.shape))
    for name, (value, *_) in file.header.fields.items():
        if name.startswith(f"{architecture}.") and type(value) is int:
            counts_tokens = "context_length" in name or "sliding_window" in name
            if value > (limit := _MAX_POSITIONS if counts_tokens else longest):
                raise ValueError(f"{name} is {value:,}, and at most {limit:,} fits its tensors")


def write_gguf(
    path: Path, fields: Mapping[str, GgufField], tensors: Sequence[StoredTensor]
) -> None:
    """Write a GGUF file atomically, one tensor in memory at a time.

    Args:
        path: The file.
        fields: Key -> value with its type.
        tensors: The tensors in the order of the file.

    Raises:
        OSError: The file cannot be written, for example because the disk is full; see `replacing`.
    """
    header = header_of(fields, tensors)
    contents = sum(padded(tensor.nbytes) for tensor in tensors)
    with replacing(path, len(header) + contents) as file:
        file.write(header)
        for tensor in tensors:
            content = tensor.read().contiguous().reshape(-1).view(torch.uint8)
            assert len(content) == tensor.nbytes, tensor.name
            file.write(content.numpy().data)
            file.write(b"\0" * (padded(tensor.nbytes) - tensor.nbytes))


def write_importances(
    path: Path, importances: Mapping[str, torch.Tensor], chunks: tuple[int, int], text: str
) -> None:
    """Write an importance matrix for llama-quantize, which tells it what errors in a column cost.

    For each tensor it has two of float32, and llama-quantize takes their quotient:

        NAME.in_sum2   (experts, I), the sum over tokens of each squared input; 1 expert if none
        NAME.counts    (experts, 1), the number of tokens

    Args:
        path: The file.
        importances: Name of a tensor -> the mean square of each input, float32 (experts, I).
        chunks: How many windows were measured, and how many tokens of each.
        text: What their text is.
    """
    # llama.cpp writes no architecture here. This one is by what `OWN_LISTS` knows the file.
    writer, tokens = new_fields("prunus"), float(chunks[0] * chunks[1])
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text])
    writer.add_uint32("imatrix.chunk_count", chunks[0])
    writer.add_uint32("imatrix.chunk_size", chunks[1])
    stored = [
        StoredTensor(f"{name}.{part}", tuple(x.shape), 0, 4 * x.numel(), partial(torch.clone, x))
        for name, mean_EI in importances.items()
        for part, x in (
            ("in_sum2", mean_EI * tokens),
            ("counts", torch.full((len(mean_EI), 1), tokens)),
        )
    ]
    write_gguf(path, writer.fields, stored)
