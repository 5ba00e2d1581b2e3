"""GGUF files through llama.cpp's package `gguf`: fields and tensors are read, and files written.

Files of strangers are checked first; see `header.open_gguf`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunus.formats.gguf.package import package
from prunus.formats.gguf.types import TYPES
from prunus.hardware.errors import require_library
from prunus.hardware.process_state import replaced
from prunus.methods.group_quantizer import GroupedWeight
from prunus.model.checkpoint.atomic_files import replacing
from prunus.model.checkpoint.regular_files import open_regular

# Weights that are unpacked at a time: 64 MB in float32.
_UNPACKED = 2**24
#: The field with the record of the run that made a file.
RECORD_FIELD = "prunus.compress"
#: A list of types or an importance matrix of prunus, as bytes.
OWN_LISTS = re.compile(
    rb"(\^[\w\\.-]+\$=\w+\n)+|GGUF.{28}general\.architecture.{12}prunus.*", re.DOTALL
)
# Fields that describe how a file is stored, and not its model.
_OF_STORAGE = (
    "GGUF.", "general.architecture", "general.file_type", "general.alignment", "split.", "prunus.",
)  # fmt: skip


def check_extra() -> None:
    """Raise ModuleNotFoundError unless the packages for GGUF files are installed."""
    for module in ("gguf", "accelerate"):
        require_library(module, "a GGUF file", "gguf")


def dequantize(data: Any, kind: Any) -> Any:
    """The weights of a tensor as the package has it, also of Q2_0, which the package cannot decode.

    Args:
        data: Its bytes, uint8.
        kind: Its type in the package.
    """
    if kind != TYPES["Q2_0"].number:
        return package().quants.dequantize(data, kind)
    return GroupedWeight(TYPES["Q2_0"], torch.tensor(data).flatten(0, -2)).dense().numpy()


class _Contents:
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


@functools.cache
def _reader_class() -> Any:
    """The package's reader of headers, which is given the open file (`opened`) before it begins.

    It takes slices of a mapped file. Here they are read. For the content of each tensor it gets
    zeros that take no memory; `_StoredContent` reads the content when it is used.
    """

    def get(self: Any, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if hasattr(self, "data_offset"):  # the header is over
            return np.broadcast_to(np.zeros((), dtype), (int(count),))
        self.opened.seek(offset)
        return np.frombuffer(self.opened.read(np.dtype(dtype).itemsize * int(count)), dtype)

    return type("HeaderReader", (package().GGUFReader,), {"_get": get})


class _StoredContent:
    """A tensor of the package's reader whose `data` are read from the file when they are used."""

    def __init__(self, contents: _Contents, info: Any) -> None:
        self.contents, self.info = contents, info

    def __getattr__(self, name: str) -> Any:
        return getattr(self.info, name)

    @property
    def data(self) -> Any:
        """The whole content, in the shape and the dtype that the package gives it."""
        return self.rows(0, math.prod(self.info.data.shape[:-1])).reshape(self.info.data.shape)

    def rows(self, first: int, count: int) -> Any:
        """Some rows of the content, (count, I)."""
        like = self.info.data
        nbytes = like.shape[-1] * like.itemsize
        raw = self.contents.read(self.info.data_offset + first * nbytes, count * nbytes)
        return raw.view(like.dtype).reshape(count, like.shape[-1])


def tensor_names(architecture: str, blocks: int) -> Any:
    """The package's table of the names of tensors in a kind of model.

    Args:
        architecture: llama.cpp's name of the kind, such as `llama`.
        blocks: Number of blocks, for which the table holds names.

    Raises:
        ValueError: The package does not know the kind.
    """
    kinds = {name: kind for kind, name in package().MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise ValueError(f"the package gguf knows no kind of model {architecture!r}; update it")
    return package().get_tensor_name_map(kinds[architecture], blocks)


def new_fields(architecture: str) -> Any:
    """A writer of the package without a file, to which fields are added; see `fields_of`."""
    return package().GGUFWriter(None, architecture)


def fields_of(writer: Any) -> dict[str, Any]:
    """The fields of a writer: key -> value with its type."""
    return dict(writer.kv_data[0])


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was checked.

    Attributes:
        reader: The `GGUFReader` of the package.
        tensors: Name -> tensor of that reader, whose data are read when they are used.
        contents: The bytes of the file.
    """

    reader: Any
    tensors: dict[str, Any]
    contents: _Contents

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read a header; for files of strangers see `open_gguf`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no regular file, or it ends before a tensor does.
        """
        contents, reader = _Contents(path), _reader_class().__new__(_reader_class())
        with open_regular(path) as reader.opened:
            reader.__init__(path)
        tensors = {x.name: _StoredContent(contents, x) for x in reader.tensors}
        for name, tensor in tensors.items():
            if tensor.data_offset + tensor.n_bytes > contents.size:
                raise ValueError(f"{name} ends beyond the {contents.size:,} bytes of the file")
        reader.tensors = [*tensors.values()]
        return cls(reader, tensors, contents)

    @contextlib.contextmanager
    def read_once(self) -> Iterator[None]:
        """While active, transformers takes this file as it is open: a header takes seconds.

        The package's table of names is made once as well. transformers asks for it for every module
        of a model, 397 times in SmolLM2-135M, and each takes some 10 ms.
        """
        kind, package().GGUFReader = package().GGUFReader, lambda _: self.reader
        name_maps = functools.cache(package().get_tensor_name_map)
        try:
            with (
                replaced(package(), "get_tensor_name_map", name_maps),
                replaced(package(), "dequantize", dequantize),
            ):
                yield
        finally:
            package().GGUFReader = kind

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a field; `default` if it is missing."""
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the kind of model."""
        return str(self.get("general.architecture", "unknown"))

    def fields(self) -> dict[str, Any]:
        """All fields that describe the model, with their types, to write them again.

        Fields that describe the storage (`_OF_STORAGE`) are left out: they differ in the next file.
        """
        writer = new_fields(self.architecture)
        for key, field in self.reader.fields.items():
            if not key.startswith(_OF_STORAGE):
                kinds = [*field.types, None]
                writer.add_key_value(key, field.contents(), kinds[0], kinds[1])
        return fields_of(writer)

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
        tensor, shape = self.tensors[name], self.shape(name)
        rows_O = torch.arange(math.prod(shape[:-1])) if rows_O is None else rows_O
        for part_O in rows_O.split(max(1, _UNPACKED // max(1, shape[-1]))):
            # Rows of one head are in another order, so that few between them are read in vain.
            first, last = map(int, part_O.aminmax()) if len(part_O) else (0, -1)
            data = tensor.rows(first, last + 1 - first)[(part_O - first).numpy()]
            yield torch.from_numpy(np.array(dequantize(data, tensor.tensor_type)))

    def raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor as they are stored, uint8."""
        return torch.from_numpy(self.tensors[name].data.view(np.uint8).reshape(-1))

    @property
    def block_bits(self) -> float | None:
        """Bits per weight of the matrices in the blocks, but for routers; None if there are none.

        They are the linears of a model; experts are one tensor of three sides.
        """
        matrices = [
            tensor
            for name, tensor in self.tensors.items()
            if name.startswith("blk.") and len(tensor.shape) > 1 and "ffn_gate_inp" not in name
        ]
        count = sum(int(tensor.n_elements) for tensor in matrices)
        return 8 * sum(int(tensor.n_bytes) for tensor in matrices) / count if count else None

    @property
    def types(self) -> dict[str, float]:
        """Name of a type -> share of all weights (0 to 1) that have it, the largest first."""
        sizes = Counter[str]()
        for tensor in self.tensors.values():
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        return {name: round(size / sizes.total(), 4) for name, size in sizes.most_common()}


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


def write_gguf(path: Path, fields: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> None:
    """Write a GGUF file atomically, one tensor in memory at a time.

    Args:
        path: The file.
        fields: Key -> value with its type, as `fields_of` returns them.
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
    write_gguf(path, fields_of(writer), stored)


def padded(nbytes: int) -> int:
    """The bytes that a tensor takes in a file, up to the beginning of the next one.

    Tensors begin at multiples of 32 bytes, the alignment that holds where a file states none.

    >>> padded(32), padded(33)
    (32, 64)
    """
    return -(-nbytes // 32) * 32


def header_of(fields: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> bytes:
    """Everything in a file before its tensors, packed by the package, and zeros up to them."""
    gguf_writer = package().gguf_writer
    writer, file = new_fields(fields["general.architecture"].value), io.BytesIO()
    writer.kv_data[0] = dict(fields)
    for tensor in tensors:
        kind = package().GGMLQuantizationType(tensor.type_id)
        writer.tensors[0][tensor.name] = gguf_writer.TensorInfo(tensor.shape, kind, tensor.nbytes)
    writer.fout, writer.state = [file], gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return file.getvalue().ljust(padded(file.tell()), b"\0")
