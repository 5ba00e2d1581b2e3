"""The format of llama.cpp, Ollama and LM Studio: one file, whose weights have types.

The run writes shards as every other run does, with the bytes of GGUF's types in them, to the folder
OUT.gguf.part. At the end the file is put together from them in the same folder, with the record
among its fields. Then the record says that the run is finished, and the file gets its name:

    write FOLDER/model.gguf ► finished ► rename it to OUT.gguf ► and what lies beside it ►
    remove the folder

A kill at any moment leaves nothing outside the folder but the whole file. Beside it lie
OUT.Modelfile for Ollama and OUT.README.md, the model card.

The order of this file: the contents of a GGUF file and their record, then the format itself.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from prunus.engine.folder import BlockFolder, find_earlier, remove_result
from prunus.engine.linear_job import LinearSelection
from prunus.engine.linear_options import LinearOptions
from prunus.engine.options import RunOptions
from prunus.engine.output import MEASUREMENT
from prunus.formats.base import MixFormat
from prunus.formats.cards import quantized_card
from prunus.formats.gguf.container import layout_in
from prunus.formats.gguf.file import (
    RECORD_FIELD,
    check_extra,
    fields_of,
    new_fields,
    open_gguf,
    write_gguf,
)
from prunus.formats.gguf.header import StoredTensor, header_of, padded
from prunus.formats.gguf.import_checkpoint import import_gguf
from prunus.formats.gguf.layout import GgufLayout, GgufTensor, layout_of, types_in
from prunus.formats.gguf.modelfile import modelfile
from prunus.formats.gguf.speeds import Q4_K_M_BITS, preset_time, speeds_of
from prunus.formats.gguf.types import (
    FILE_TYPES,
    FULL_TYPES,
    PLAIN,
    TYPES,
    GgufType,
    type_for,
    type_named,
    types_for,
)
from prunus.formats.recipe import CompressionRecipe
from prunus.formats.records import CompressionRecord, FileSize
from prunus.hardware.sizes import in_bytes
from prunus.methods.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.model.checkpoint.atomic_files import (
    check_file_place,
    check_place,
    move_file,
    replacing,
    write_text,
)
from prunus.model.checkpoint.output_folder import check_apart
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.formats import reader_of
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource

#: Name of the whole file in the folder of the run.
FILE = "model.gguf"
# The ends of the names of what lies beside the file.
_BESIDE = (".Modelfile", ".README.md")
# Whether prunus wrote such a file: it says so.
_is_own = re.compile(b"prunus").search
# Bits of embeddings and head -> their type.
_HEAD_TYPES: dict[int | str, str] = {4: "Q4_K", 6: "Q6_K", 8: "Q8_0"}


# --- what a file holds: its tensors with their types, its fields, and the record of its run ---

# The record in the file is filled up with spaces, so that the size of the file is known before the
# run. It gets this many bytes ...
_RECORD_BYTES = 16_000
# ... and this many for each linear.
_BYTES_PER_LINEAR = 500


class FileContents:
    """The fields and tensors of a GGUF file, and so its bytes.

    Args:
        layout: The tensors of the file, and its fields but for those that depend on the types.
        linears: How many linears the record describes.

    Everywhere below, `types` are the types of linears, embedding and head by name. What has no
    type stays in F32, F16 or BF16.
    """

    def __init__(self, layout: GgufLayout, linears: int) -> None:
        self.layout = layout
        names = len(json.dumps(layout.unmatched))
        self._record_bytes = _RECORD_BYTES + _BYTES_PER_LINEAR * linears + names

    def type_of(self, tensor: GgufTensor, types: Mapping[str, str]) -> tuple[str, int, int]:
        """The name of the type of a tensor, the number of the type, and the bytes of the tensor."""
        name = types.get(tensor.module)
        count = math.prod(tensor.shape)
        if name is not None:
            kind = TYPES[name]
            return name, kind.number, kind.nbytes_of(count)
        name, number = PLAIN.get(tensor.dtype, PLAIN[torch.float32])[:2]
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
        text = record if size <= self._record_bytes else ""
        writer.add_string(RECORD_FIELD, text + " " * (self._record_bytes - len(text.encode())))
        return self.layout.fields | fields_of(writer)

    def size(self, before: int, after: int, parts: Counter[str]) -> FileSize:
        """The size for people, from the bytes of the source, of the file and of its parts."""
        count = sum(math.prod(x.shape) for x in self.layout.tensors if x.name[:5] != "rope_")
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


class GgufFormat(MixFormat):
    """A GGUF file, made from a checkpoint or from a GGUF file in full precision."""

    PROGRAMS: ClassVar[dict[str, str]] = {
        "llama.cpp": "llama-cli -m OUT",
        "Ollama": "ollama create NAME -f BASE.Modelfile && ollama run NAME",
        "LM Studio": "lms import OUT --copy",
    }
    UPLOADS: ClassVar[dict[str, str]] = {
        "to the hub": "hf upload NAME OUT",
        "for Ollama": "hf upload NAME BASE.Modelfile",
        "its card": "hf upload NAME BASE.README.md README.md",
    }
    #: The file that the run makes; `folder` sets it.
    path: Path
    # The layout that a template has; None where the recipe names none.
    _container: GgufLayout | None = None

    unpack = staticmethod(import_gguf)
    read_record = staticmethod(read_record)

    @staticmethod
    def stored_bits(path: Path) -> float | None:
        """Bits per weight of the matrices in the blocks of any GGUF file."""
        return open_gguf(path).block_bits

    def folder(self, model: str | Path, output: Path) -> Path:
        """The folder OUT.gguf.part of the run, once output and model are checked.

        Raises:
            ValueError: The model is a GGUF file whose weights are rounded, or it overlaps the
                folder.
            FileExistsError: The output is a folder, or the folder of the run is a link.
            ModuleNotFoundError: The package `gguf` is not installed.
        """
        check_extra()
        is_gguf = reader_of(model) is type(self)
        if is_gguf and (few := open_gguf(Path(model)).types.keys() - FULL_TYPES):
            raise ValueError(
                f"{model} has weights in {', '.join(sorted(few))}, which were rounded already. "
                "Give a file in F32, F16, BF16 or Q8_0, or the checkpoint that it was made from"
            )
        folder = output.with_name(f"{output.name}.part")
        check_place(folder)
        check_apart(output, Path(model))
        if output.is_dir() or folder.is_symlink():
            wrong = f"{output} is a folder" if output.is_dir() else f"{folder} is a link"
            raise FileExistsError(f"{wrong}: move it away, or choose another name for the file")
        self.path = output
        for suffix in _BESIDE:
            check_file_place(output.with_suffix(suffix), _is_own)
        return folder

    def earlier(
        self, model: str | Path, folder: Path, recipe: LinearOptions, options: RunOptions
    ) -> CompressionRecord | None:
        """The record of the run to go on with, or that of the finished file; None for neither.

        Raises:
            FileExistsError: Something else has the name of the file.
        """
        done = None if options.overwrite else finished_file(self.path, self.recipe)
        earlier = find_earlier(self.RECORD, folder, recipe, options, Path(model))
        # A kill may come between the name of the file and the end of its folder.
        is_over = earlier is None or (earlier.state == "finished" and not (folder / FILE).exists())
        return done if done is not None and is_over else earlier

    def is_complete(self, earlier: CompressionRecord) -> bool:
        """Whether the record is that of a whole file, of whose run nothing is left."""
        # A record in a finished file names no shards.
        return earlier.state == "finished" and not earlier.sha256

    def close(self, folder: Path) -> None:
        """Remove the folder of the run; after a kill, files may still be in it."""
        self._move_beside(folder)
        remove_result(folder, CompressionRecord.FILE)

    def select(
        self, selection: LinearSelection, source: CheckpointSource | ModuleSource, model: Skeleton
    ) -> LinearSelection:
        """The linears that can be stored as integers, and that a template has as linears."""
        self.takes_pieces = self.recipe.template is not None
        selection = super().select(selection, source, model)
        if self.recipe.template is None:
            return selection
        assert isinstance(source, CheckpointSource)
        earlier = self.path.with_name(f"{self.path.name}.part") / MEASUREMENT
        self._container, self.lasting = layout_in(self.recipe.template, source, model, earlier)
        sources = {name for tensor in self._container.tensors for name in tensor.sources}
        return selection.limited(model, lambda name: f"{name}.weight" in sources)

    def check(self) -> None:
        """Check stacked experts, types, and that these reach the bits or the size.

        Raises:
            ValueError: The format cannot do what the recipe asks for.
        """
        if self.recipe.type is not None and not self._names_file:
            type_named(self.recipe.type)
        # Reading the times refuses names and files that are none.
        if self._times and self.recipe.type is not None and self.recipe.fast_on is not None:
            raise ValueError("`fast_on` chooses types, and `type` gives them: drop one of the two")
        linears = self.job.selected_linears()
        for names in self.stacks.values():
            if len({name in linears for name in names}) > 1:
                raise ValueError(
                    f"a GGUF file has one type for {names[0]} and all other experts of its block, "
                    "and `ignore` matches some of them: let it match all or none"
                )
        self.check_reach("a GGUF file")

    @functools.cached_property
    def contents(self) -> FileContents:
        """The fields and tensors of the file."""
        layout = self._container or layout_of(self.job.checkpoint, self.job.skeleton)
        return FileContents(layout, len(self.job.selected_linears()))

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """First module of each tensor with a type -> its rows, those of a 3D one too, and columns.

        Tensors that are parts of one weight count together.
        """
        names = self.job.selected_linears().keys() | self.modules_outside
        rows = Counter[str]()
        for tensor in self.contents.layout.tensors:
            rows[tensor.module] += math.prod(tensor.shape[:-1])
        return {x: (rows[x], self._tensors[x].shape[-1]) for x in rows if x in names}

    @functools.cached_property
    def _tensors(self) -> dict[str, GgufTensor]:
        """Name of a module -> a tensor that has its weight, or a part of that."""
        return {name: x for x in self.contents.layout.tensors for name in x.modules}

    def quantizers(self, name: str, with_reserve: bool | None = None) -> list[GgufType]:
        """The types that a module can have: one where the recipe decides, else all that fit.

        Args:
            name: Name of a linear, an embedding or a head.
            with_reserve: Whether types count that are kept in reserve; None where they are needed.
        """
        columns, order = self._tensors[name].shape[-1], self._tensors[name].columns
        kind = self._head_type if name in self.modules_outside else self.recipe.type
        if self._names_file:
            kind = self._types_in_file.get(name, kind)
        if kind is not None:
            return [replace(type_for(kind, columns), columns=order)]
        with_reserve = self._needs_reserve if with_reserve is None else with_reserve
        types = types_for(columns, with_reserve)
        return [replace(x, columns=order) for x in types] if order else types

    @functools.cached_property
    def _needs_reserve(self) -> bool:
        """Whether no other types make a file as small as the recipe asks for.

        They decode slowly, so a choice of types that decode fast does without them.
        """
        return self.recipe.fast_on is None and self.budget < sum(
            min(self.nbytes_of(kind, shape) for kind in self.quantizers(name, with_reserve=False))
            for name, shape in self.shapes.items()
        )

    @property
    def _head_type(self) -> str | None:
        """The type of embedding and head; None where their losses choose it."""
        if self.recipe.head_bits is not None:
            return _HEAD_TYPES.get(self.recipe.head_bits)
        # Where types are not chosen by their losses, it is that of llama.cpp's own files.
        return self.recipe.type and ("Q8_0" if self.recipe.type == "Q8_0" else "Q6_K")

    @property
    def _names_file(self) -> bool:
        """Whether the recipe names a file with types in place of a type."""
        return self.recipe.type not in (None, *TYPES) and os.path.isfile(self.recipe.type or "")

    @functools.cached_property
    def _types_in_file(self) -> dict[str, str]:
        """Name of a module -> its type in that file, but for those that `head_bits` is about."""
        recipe, source = self.recipe, self.job.checkpoint.checkpoint
        given = set() if recipe.head_bits is None else self.modules_outside
        modules = self.shapes.keys() - given
        return types_in(
            Path(recipe.type or ""), source.folder, self.contents.layout.tensors, modules
        )

    def nbytes_of(self, quantizer: GroupQuantizer, shape: tuple[int, ...]) -> int:
        """The bytes of a weight with those that fill it up to the next tensor."""
        return padded(super().nbytes_of(quantizer, shape))

    @functools.cached_property
    def _times(self) -> dict[str, float]:
        """Type -> nanoseconds per weight on the processor that the recipe names, or a usual one."""
        return speeds_of(self.recipe.fast_on or "cpu")

    def _weights_per_token(self, name: str) -> float:
        """How many weights of a tensor are multiplied for each token; `name` is its module."""
        if name in self.modules_outside and name != self.head:
            return 0.0  # an embedding looks up one row
        config, shape = self.job.checkpoint.config.get_text_config(), self._tensors[name].shape
        used = getattr(config, "num_experts_per_tok", None) if len(shape) > 2 else None
        return math.prod(self.shapes[name]) * (used / shape[0] if used else 1.0)

    def time_of(self, name: str, quantizer: GroupQuantizer, shape: tuple[int, ...]) -> float:
        """Nanoseconds that a tensor takes for each token."""
        return self._times[quantizer.name] * self._weights_per_token(name)

    @property
    def most_time(self) -> float:
        """What llama.cpp's presets of this size take for each token, in nanoseconds."""
        if self.recipe.fast_on is None:
            return super().most_time
        # All but the head has the bits that the head leaves.
        rows, columns = self.shapes.get(self.head or "", (0, 256))
        bits = 8 * self.budget - type_for("Q6_K", columns).bits * rows * columns
        return self._preset_time(bits / (self._weights - rows * columns))

    def _preset_time(self, bits: float) -> float:
        """Nanoseconds that a preset takes for each token, with this many bits in its linears."""
        return sum(
            self._weights_per_token(name)
            * preset_time(self._times, TYPES["Q6_K"].bits if name == self.head else bits, shape[-1])
            for name, shape in self.shapes.items()
        )

    @functools.cached_property
    def stacks(self) -> dict[str, list[str]]:
        """First module of a tensor -> its modules: all experts of a block have one tensor."""
        return {tensor.module: tensor.modules for tensor in self.contents.layout.tensors}

    @functools.cached_property
    def others(self) -> int:
        """The bytes of the file that do not depend on the types."""
        # Those of any types will do.
        types = dict.fromkeys(self.shapes, "Q8_0")
        weights = sum(self.nbytes_of(TYPES["Q8_0"], shape) for shape in self.shapes.values())
        return self.contents.file_bytes(types) - weights

    def describe(self) -> dict[str, object]:
        """The size of the file, what takes it, and its speed in units of Q4_K_M's, for a plan."""
        types = self.types or (self.types_of({}) if self.recipe.type else {})
        parts = self.contents.bytes_by_type(types) if types else self.planned_parts()
        source, unmatched = self.job.checkpoint.checkpoint, self.contents.layout.unmatched
        size = self.contents.size(source.file_bytes(), self.file_bytes(), parts).model_dump()
        return {"file": size, "decoding": self._speed(types), "unmatched": unmatched}

    def _speed(self, types: Mapping[str, str]) -> float:
        """How fast processors decode the file, in units of Q4_K_M's speed.

        Args:
            types: Name of a module -> its type. Without any, the speed is what a choice keeps.
        """
        took = (
            sum(self._times[types[x]] * self._weights_per_token(x) for x in self.shapes)
            if types
            else self.most_time
        )
        return self._preset_time(Q4_K_M_BITS) / took

    def file_bytes(self) -> int:
        """Bytes of the file, as planned; once types are chosen, of the file with these."""
        return self.contents.file_bytes(self.types) if self.types else super().file_bytes()

    def temporary_bytes(self) -> int:
        """Bytes of the shards of the run."""
        # The file is put together from shards that are as large.
        return self.file_bytes()

    @property
    def measures_loss(self) -> bool:
        """Whether types are chosen by the loss that they cause, or scales by that of columns.

        A type that is given needs neither. The types of a file may be those of an earlier choice,
        and then this file gets the same bytes.
        """
        return super().measures_loss or self._names_file

    def chosen(self) -> str:
        """How many bytes of the file have each type, and how fast it decodes on a processor."""
        parts = self.contents.bytes_by_type(self.types).most_common()
        return (
            f"the file holds {', '.join(f'{in_bytes(n)} in {kind}' for kind, n in parts)}; "
            f"processors decode it about {self._speed(self.types):.2f} times as fast as Q4_K_M"
            + ("" if self.recipe.fast_on else "; with `fast_on` time counts too")
        )

    def tensors_of(self, key: str, weight: GroupedWeight) -> dict[str, torch.Tensor]:
        """The bytes of a linear, under the name of its weight."""
        return {key: weight.data_OB}

    def weight_from(
        self, key: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """The dense weight of a linear; its bytes leave `tensors`."""
        quantizer = self.quantizer(self.module_of[key])
        return GroupedWeight(quantizer, tensors.pop(key)).dense().to(dtype)

    def finish(self, folder: BlockFolder, record: CompressionRecord) -> None:
        """Write the file, say in the record that it is finished, and give it its name."""
        self._write_file(folder, record)
        record.state = "finished"
        folder.save()
        self.check_finished(folder, record)

    def check_finished(self, folder: BlockFolder, record: CompressionRecord) -> None:
        """Give the file its name, unless something else has it by now."""
        file = folder.folder / FILE
        if not file.exists():  # The user has moved the file away since.
            self._write_file(folder, record)
        replaces = self.job.options.overwrite or finished_file(self.path, self.recipe) is not None
        move_file(file, self.path, replaces)
        self._move_beside(folder.folder)

    def _move_beside(self, folder: Path) -> None:
        """Give their names to the files that lie beside the result."""
        for suffix in _BESIDE:
            if (file := folder / suffix[1:]).exists():
                target = self.path.with_suffix(suffix)
                check_file_place(target, _is_own)
                move_file(file, target, replaces=True)

    def card_path(self, path: Path) -> Path:
        """The model card, beside the file."""
        return path.with_suffix(_BESIDE[1])

    def store_record(self, path: Path, record: CompressionRecord) -> None:
        """Replace the record in a finished file; one that is too long for its place is left out."""
        file = open_gguf(path)
        before = file.get(RECORD_FIELD).encode()
        text = reproducible(record).encode().ljust(len(before))
        with path.open("rb") as source, replacing(path, path.stat().st_size) as copy:
            header = source.read(file.header.size)
            copy.write(header.replace(before, text) if len(text) == len(before) else header)
            shutil.copyfileobj(source, copy, 2**20)

    def _write_file(self, folder: BlockFolder, record: CompressionRecord) -> None:
        """Put the file together from the shards, in their folder."""
        source = self.job.checkpoint.checkpoint
        shards = Checkpoint(folder.folder, only=list(record.sha256))
        parts = self.contents.bytes_by_type(record.types)
        after = self.contents.file_bytes(record.types)
        record.size = self.contents.size(source.file_bytes(), after, parts)
        record.unmatched = self.contents.layout.unmatched
        tensors = self.contents.stored(record.types, partial(self._content, shards, record.types))
        fields = self.contents.fields(record.types, reproducible(record))
        text = modelfile(self.path.name, source.folder, fields)
        write_text(folder.folder / "Modelfile", text)
        write_text(folder.folder / "README.md", self.card(record))
        write_gguf(folder.folder / FILE, fields, tensors)

    def card(self, record: CompressionRecord) -> str:
        """The model card, which lies beside the file."""
        bits = f"{record.totals.get('bits', 0.0):.2f}"
        card = quantized_card(
            record,
            self.path.name,
            f"as a GGUF file for llama.cpp, Ollama and LM Studio, with {bits} bits per weight in "
            "its linears.",
            self.commands(Path(self.path.name)),
            tags=["gguf"],
            fields={"library_name": "gguf", "pipeline_tag": "text-generation"},
            source=self.job.checkpoint.checkpoint.folder,
        )
        return card.replace(f"`{record.FILE}`", f"the field `{RECORD_FIELD}` of the file")

    def _content(
        self, shards: Checkpoint, types: Mapping[str, str], tensor: GgufTensor
    ) -> torch.Tensor:
        """The bytes of a tensor of the file, from the shards or from the file that has it."""
        if tensor.values is not None:
            return tensor.values()
        source = self.job.checkpoint
        # Pieces of one tensor that have no type are in the shards as that tensor.
        keys = [source.stored.get(name, name) for name in tensor.sources]
        parts = [shards.whole(x) if x in shards.tensors else source.weight(x) for x in keys]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        rows = rows if tensor.rows is None else rows[tensor.rows]
        return rows if tensor.module in types else tensor.plain(rows)
