"""The folder of a run that makes a GGUF file, and the file itself.

The run writes shards as every other run does, with the bytes of GGUF's types in them. At the end
the file is put together from them in the same folder, with the record among its fields. Then the
record says that the run is finished, and the file gets its name:

    write FOLDER/model.gguf ► finished ► rename it to OUT.gguf ► remove the folder

A kill at any moment leaves nothing outside the folder but the whole file.
"""

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
from safetensors.torch import load_file

from prunus.compression.output import MEASUREMENT, CompressedFolder
from prunus.compression.records import CompressionRecipe, CompressionRecord, FileSize
from prunus.formats.gguf.types import PLAIN, TYPES, file_type
from prunus.hardware.errors import naming
from prunus.methods.group_fits import round_in_groups
from prunus.methods.group_quantizer import GroupedWeight
from prunus.model.checkpoint.atomic_files import move_file
from prunus.model.checkpoint.gguf import open_gguf
from prunus.model.checkpoint.gguf_file import (
    RECORD_FIELD,
    StoredTensor,
    fields_of,
    header_of,
    new_fields,
    padded,
    write_gguf,
)
from prunus.model.checkpoint.gguf_layout import GgufLayout, GgufTensor
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.checkpoint.writer import Writable
from prunus.pruning.manifest import LinearRecord

#: Name of the whole file in the folder of the run.
FILE = "model.gguf"
# The record in the file is filled up with spaces to this many bytes, so that the size of the file
# is known before the run.
_RECORD_BYTES, _BYTES_PER_LINEAR = 16_000, 500


class GgufPlan:
    """What a GGUF file will hold: its tensors with their types, and so its bytes.

    The model stores weights in `dtypes`, and the record describes `linears` linears.
    """

    def __init__(self, layout: GgufLayout, dtypes: Mapping[str, torch.dtype], linears: int) -> None:
        self.layout, self._dtypes = layout, dtypes
        self._record_bytes = _RECORD_BYTES + _BYTES_PER_LINEAR * linears

    def type_of(self, tensor: GgufTensor, types: Mapping[str, str]) -> tuple[str, int, int]:
        """Type, its number, and bytes of a tensor, by the types of linears, embedding and head."""
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
        """All tensors as they are written."""
        return [
            StoredTensor(x.name, x.shape, *self.type_of(x, types)[1:], partial(read, x))
            for x in self.layout.tensors
        ]

    def bytes_by_type(self, types: Mapping[str, str]) -> Counter[str]:
        """Type -> bytes of all tensors that have it."""
        found = Counter[str]()
        for tensor in self.layout.tensors:
            name, _, nbytes = self.type_of(tensor, types)
            found[name] += nbytes
        return found

    def fields(self, types: Mapping[str, str], record: str = "") -> dict[str, Any]:
        """The fields of the file. A record that is too long for its place is left out."""
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
        """The size of the file."""
        contents = (padded(self.type_of(tensor, types)[2]) for tensor in self.layout.tensors)
        return self._header_bytes + sum(contents)

    @functools.cached_property
    def _header_bytes(self) -> int:
        # The types do not change the size of the header.
        return len(header_of(self.fields({}), self.stored({}, lambda _: torch.zeros(0))))


class GgufFolder(CompressedFolder):
    """The folder of a run whose result is a GGUF file at `path`."""

    def __init__(
        self, folder: Path, record: CompressionRecord, job: Any, path: Path, plan: GgufPlan
    ) -> None:
        super().__init__(folder, record, job)
        self._path, self._plan = path, plan

    def prepare(self) -> None:
        """The types of what lies outside the blocks are not known yet; see `finish_outside`."""

    def tensors_of(self, name: str, weight: GroupedWeight) -> dict[str, torch.Tensor]:
        return {self.key(name): weight.data_OB}

    def weight_from(
        self, tensors: dict[str, torch.Tensor], name: str, record: LinearRecord, dtype: torch.dtype
    ) -> torch.Tensor:
        weight = GroupedWeight(TYPES[self.record.types[name]], tensors.pop(self.key(name)))
        return weight.dense().to(dtype)

    def outside(self, tensors: dict[str, Writable]) -> dict[str, Writable]:
        inside = {f"{block.name}.{name}" for block in self.record.blocks for name in block.linears}
        source, known = self.job.checkpoint.checkpoint, load_file(self.folder / MEASUREMENT)
        for name, kind in self.record.types.items():
            if name not in inside:
                key, importance_I = self.key(name), known.get(f"{name}.importance")
                with naming(key):
                    rounded = round_in_groups(source.whole(key), TYPES[kind], importance_I)
                tensors[key] = rounded.data_OB
        return tensors

    def complete(self, changed: Mapping[str, torch.Tensor]) -> None:
        self.ranks.on_rank_0(self._write_file)
        self.record.state = "finished"
        self.save()
        self.check_finished()

    def check_finished(self) -> None:
        """Give the file its name, unless something else has it by now."""
        self.ranks.on_rank_0(self._name_file)

    def _name_file(self) -> None:
        if not (self.folder / FILE).exists():  # The user has moved the file away since.
            self._write_file()
        overwrite, recipe = self.job.options.overwrite, self.record.recipe
        replaces = overwrite or finished_file(self._path, recipe) is not None
        move_file(self.folder / FILE, self._path, replaces)

    def finish_outside(self) -> None:
        """Write the shard of what lies outside the blocks, once all types are known."""
        super().prepare()

    def _write_file(self) -> None:
        types, record = self.record.types, self.record
        source = self.job.checkpoint.checkpoint
        shards = Checkpoint(self.folder, only=list(record.sha256))
        parts, after = self._plan.bytes_by_type(types), self._plan.file_bytes(types)
        record.size = self._plan.size(source.file_bytes(), after, parts)
        stored = self._plan.stored(types, partial(self._content, shards))
        write_gguf(self.folder / FILE, self._plan.fields(types, reproducible(record)), stored)

    def _content(self, shards: Checkpoint, tensor: GgufTensor) -> torch.Tensor:
        """The bytes of a tensor of the file, from the shards."""
        if tensor.values is not None:
            return tensor.values
        parts = [shards.whole(self.job.checkpoint.stored[name]) for name in tensor.sources]
        rows = tensor.arranged(parts[0] if len(parts) == 1 else torch.cat(parts))
        return rows if tensor.is_matrix else rows.float() + tensor.shift


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
    """The record in a GGUF file; None if prunus did not make it. Raises for a damaged file."""
    text = open_gguf(path).get(RECORD_FIELD)
    return None if not text or not text.strip() else CompressionRecord.model_validate_json(text)


def finished_file(path: Path, recipe: CompressionRecipe) -> CompressionRecord | None:
    """The record of a file that a run of the same recipe made; None if nothing has this name.

    FileExistsError for all else.
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
