"""What a GGUF file holds: its tensors with their types, its fields, and room for a record."""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from prunus.formats.gguf.file import RECORD_FIELD, new_fields
from prunus.formats.gguf.header import StoredTensor, header_of, padded
from prunus.formats.gguf.layout import GgufLayout, GgufTensor
from prunus.formats.gguf.types import FILE_TYPES, PLAIN, TYPES
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.source import CheckpointSource
from prunus.rounding.size_plan import TypedWeight

# The record in the file is filled up with spaces, so that the size of the file is known before the
# run. It gets this many bytes ...
_RECORD_BYTES = 16_000
# ... and this many for each linear.
_BYTES_PER_LINEAR = 500


class FileContents:
    """The fields and tensors of a GGUF file, and so its bytes.

    Args:
        layout: The tensors of the file, and its fields but for those that depend on the types.
        linears: How many linears the record describes; None for a file without a record.

    Attributes:
        layout: As given.
        record_bytes: The bytes of the place of the record.

    Everywhere below, `types` are the types of linears, embedding and head by name. What has no
    type stays in F32, F16 or BF16.
    """

    def __init__(self, layout: GgufLayout, linears: int | None) -> None:
        self.layout = layout
        names = len(json.dumps(layout.unmatched))
        of_linears = _RECORD_BYTES + _BYTES_PER_LINEAR * (linears or 0) + names
        self.record_bytes = 0 if linears is None else of_linears

    def type_of(self, tensor: GgufTensor, types: Mapping[str, str]) -> tuple[str, int, int]:
        """The name of the type of a tensor, the number of the type, and the bytes of the tensor."""
        name = types.get(tensor.module)
        count = math.prod(tensor.shape)
        if name is not None:
            kind = TYPES[name]
            return name, kind.number, kind.nbytes_of(count)
        name, number = PLAIN.get(tensor.dtype, PLAIN[torch.float32])[:2]
        return name, number, count * (4 if number == 0 else 2)

    def tensors(
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

    def type_list(self, types: Mapping[str, str]) -> str:
        """The types of all matrices, as a list for llama-quantize; see `layout.types_in`."""
        return "".join(
            f"^{re.escape(tensor.name)}$={self.type_of(tensor, types)[0].lower()}\n"
            for tensor in self.layout.tensors
            if tensor.is_matrix
        )

    def fields(self, types: Mapping[str, str], record: str = "") -> dict[str, Any]:
        """The fields of the file.

        Args:
            types: See the class.
            record: The record of the run, as JSON. One that is too long for its place is left out.
        """
        by_type = self.bytes_by_type(types)
        writer = new_fields(self.layout.fields["general.architecture"].value)
        writer.add_file_type(FILE_TYPES[by_type.most_common(1)[0][0]])
        size = len(record.encode())
        text = record if size <= self.record_bytes else ""
        if self.record_bytes:
            writer.add_string(RECORD_FIELD, text + " " * (self.record_bytes - len(text.encode())))
        return {**self.layout.fields, **writer.fields}

    def file_bytes(self, types: Mapping[str, str]) -> int:
        """The size of the file in bytes."""
        contents = (padded(self.type_of(tensor, types)[2]) for tensor in self.layout.tensors)
        return self._header_bytes + sum(contents)

    @functools.cached_property
    def _header_bytes(self) -> int:
        # The types do not change the size of the header.
        return len(header_of(self.fields({}), self.tensors({}, lambda _: torch.zeros(0))))


def contents_for(
    layout: GgufLayout, linears: int, weights: Mapping[str, TypedWeight], size: int | None
) -> tuple[FileContents, int]:
    """What a file holds, and the bytes of all that has no type, whatever the types are.

    It has no record if only so it has room for weights that lose nothing.

    Args:
        layout: The tensors of the file.
        linears: How many linears a record describes.
        weights: First module of each weight that has a type -> its types.
        size: The most bytes of the file; None if its bits or its types say how large it is.
    """
    types = {name: weight.quantizers[0].name for name, weight in weights.items()}
    typed = sum(weight.nbytes[0] for weight in weights.values())
    exact = sum(weight.least_lossless for weight in weights.values())
    whole, bare = FileContents(layout, linears), FileContents(layout, None)
    others, least = (x.file_bytes(types) - typed for x in (whole, bare))
    if size is not None and least + exact <= size < others + exact:
        return bare, least
    return whole, others


def bytes_of(
    source: CheckpointSource, shards: Checkpoint, types: Mapping[str, str], tensor: GgufTensor
) -> torch.Tensor:
    """The bytes of a tensor of the file, from the shards or from the file that has it.

    Args:
        source: The checkpoint.
        shards: What the run has written.
        types: Name of a module -> its type.
        tensor: The tensor.
    """
    if tensor.values is not None:
        return tensor.values()
    # Pieces of one tensor that have no type are in the shards as that tensor.
    keys = [source.stored_names.get(name, name) for name in tensor.sources]
    parts = [shards.whole(x) if x in shards.tensors else source.weight(x) for x in keys]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    rows = rows if tensor.rows is None else rows[tensor.rows]
    return rows if tensor.module in types else tensor.plain(rows)
