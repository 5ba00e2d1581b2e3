"""What a GGUF file holds: its tensors with their types, its fields, and the record of its run."""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunus.formats.gguf.file import (
    RECORD_FIELD,
    StoredTensor,
    fields_of,
    header_of,
    new_fields,
    padded,
)
from prunus.formats.gguf.header import open_gguf
from prunus.formats.gguf.layout import GgufLayout, GgufTensor
from prunus.formats.gguf.types import PLAIN, TYPES, file_type
from prunus.formats.recipe import CompressionRecipe
from prunus.formats.records import CompressionRecord, FileSize

# The record in the file is filled up with spaces, so that the size of the file is known before the
# run. It gets this many bytes ...
_RECORD_BYTES = 16_000
# ... and this many for each linear.
_BYTES_PER_LINEAR = 500


class FileContents:
    """The fields and tensors of a GGUF file, and so its bytes.

    Args:
        layout: The tensors of the file, and its fields but for those that depend on the types.
        dtypes: Name of a tensor in the model -> the dtype in which the source stores it.
        linears: How many linears the record describes.

    Everywhere below, `types` are the types of linears, embedding and head by name. What has no
    type stays in F32, F16 or BF16.
    """

    def __init__(self, layout: GgufLayout, dtypes: Mapping[str, torch.dtype], linears: int) -> None:
        self.layout = layout
        self._dtypes = dtypes
        self._record_bytes = _RECORD_BYTES + _BYTES_PER_LINEAR * linears

    def type_of(self, tensor: GgufTensor, types: Mapping[str, str]) -> tuple[str, int, int]:
        """The name of the type of a tensor, the number of the type, and the bytes of the tensor."""
        name = types.get(tensor.module)
        count = math.prod(tensor.shape)
        if name is not None:
            kind = TYPES[name]
            return name, kind.number, kind.nbytes_of(count)
        dtype = self._dtypes.get(tensor.sources[0]) if tensor.is_matrix else None
        name, number = PLAIN.get(dtype or torch.float32, PLAIN[torch.float32])[:2]
        return name, number, count * (4 if number == 0 else 2)

    def stored(
        self, types: Mapping[str, str], read: Callable[[GgufTensor], torch.Tensor]
    ) -> list[StoredTensor]:
        """All tensors as they are written.

        Args:
            types: See the class.
            read: From a tensor to its content; called when the tensor is written.
        """
        return [
            StoredTensor(x.name, x.shape, *self.type_of(x, types)[1:], partial(read, x))
            for x in self.layout.tensors
        ]

    def bytes_by_type(self, types: Mapping[str, str]) -> Counter[str]:
        """Type -> bytes of all tensors that have it."""
        nbytes_by_type = Counter[str]()
        for tensor in self.layout.tensors:
            name, _, nbytes = self.type_of(tensor, types)
            nbytes_by_type[name] += nbytes
        return nbytes_by_type

    def fields(self, types: Mapping[str, str], record: str = "") -> dict[str, Any]:
        """The fields of the file.

        Args:
            types: See the class.
            record: The record of the run, as JSON. One that is too long for its place is left out.
        """
        by_type = self.bytes_by_type(types)
        writer = new_fields(self.layout.fields["general.architecture"].value)
        writer.add_file_type(file_type(by_type.most_common(1)[0][0]))
        size = len(record.encode())
        text = record if size <= self._record_bytes else ""
        writer.add_string(RECORD_FIELD, text + " " * (self._record_bytes - len(text.encode())))
        return self.layout.fields | fields_of(writer)

    def size(self, before: int, after: int, parts: Counter[str]) -> FileSize:
        """The size for people, from the bytes of the source, of the file and of its parts."""
        count = sum(math.prod(tensor.shape) for tensor in self.layout.tensors if tensor.sources)
        return FileSize.of(before, after, count, parts)

    def file_bytes(self, types: Mapping[str, str]) -> int:
        """The size of the file in bytes."""
        contents = (padded(self.type_of(tensor, types)[2]) for tensor in self.layout.tensors)
        return self._header_bytes + sum(contents)

    @functools.cached_property
    def _header_bytes(self) -> int:
        # The types do not change the size of the header.
        return len(header_of(self.fields({}), self.stored({}, lambda _: torch.zeros(0))))


def reproducible(record: CompressionRecord) -> str:
    """The record as JSON without times and hashes, so that equal runs give equal files."""
    content = record.model_dump(mode="json", exclude={"sha256", "hardware", "measured"})
    content |= {"state": "finished", "source": Path(record.source).name}
    content["totals"] = {
        name: value
        for name, value in content["totals"].items()
        if not name.endswith(("seconds", "memory_bytes"))
    }
    content["inputs"] |= {"outside": {}}
    content["recipe"] = record.recipe.without_folders().model_dump(mode="json")
    for block in content["blocks"]:
        block["seconds"] = 0.0
        for linear in block["linears"].values():
            linear["seconds"] = 0.0
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def read_record(path: Path) -> CompressionRecord | None:
    """The record in a GGUF file; None if prunus did not make it.

    Raises:
        ValueError: The file or its record is damaged.
    """
    text = open_gguf(path).get(RECORD_FIELD)
    return None if not text or not text.strip() else CompressionRecord.model_validate_json(text)


def finished_file(path: Path, recipe: CompressionRecipe) -> CompressionRecord | None:
    """The record of a file that a run of the same recipe made; None if nothing has this name.

    Raises:
        FileExistsError: Something else has this name, or a run of another recipe made the file.
        ValueError: The file is damaged.
    """
    if not os.path.lexists(path):
        return None
    earlier = read_record(path) if path.is_file() else None
    if earlier is None:
        raise FileExistsError(
            f"output {path} exists and is not a file that prunus compress made; it is left as it "
            "is. Move it away, or choose another name"
        )
    earlier.check_same_run(recipe.without_folders())
    return earlier
