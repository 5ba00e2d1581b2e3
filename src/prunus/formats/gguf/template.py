"""The layout of a GGUF file of any family: the file says what there is.

llama.cpp's converter reorders rows (the rotary halves of Llama), joins experts, splits fused
weights, transposes, and reorders columns. No rule of a family is repeated here: each row of a
matrix in the file still holds the numbers of a row of the checkpoint, and hashes say of which:

    checkpoint ──► hashes of all rows ───┐
                                         ├──► where each row of the file is in the checkpoint
    file of the converter ──► hashes ────┘              │
                                                        └──► GgufLayout

What has no source, and what is not the weight of a linear, an embedding or a head, is copied from
the file. `placements.py` compares the two.

Shape suffixes: O rows of one matrix, I its columns.
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunus.formats.fixed import check_template
from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.header import GgufField
from prunus.formats.gguf.layout import (
    ARCHITECTURES,
    GgufLayout,
    GgufTensor,
    known_parameters,
    open_same,
)
from prunus.formats.gguf.placements import (
    ABSENT,
    COLUMNS,
    FOREIGN,
    ROWS,
    compared_dtype,
    few_of,
    placements_in,
    weight_shapes,
)
from prunus.formats.gguf.types import PLAIN_DTYPES, TYPES
from prunus.model.checkpoint.tensor_files import flat_bytes
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.rounding.type_choice import Measurement
from prunus.words import name_patterns

# Fields that only some files of a known family have, and that change what llama.cpp computes.
_OPTIONAL = (
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.type",
)
# The columns of a weight that can have a type are a multiple of these.
_NARROWEST = min(kind.span for kind in TYPES.values())


@dataclass(frozen=True)
class Template:
    """A GGUF file in full precision, matched with the checkpoint that it was made of.

    All that follows from both is found when it is asked for, and kept.

    Attributes:
        path: The file.
        source: The checkpoint.
        skeleton: Its model.
        earlier: The placements that an unfinished run has stored, of any file; empty for a new run.
    """

    path: Path
    source: CheckpointSource
    skeleton: Skeleton
    earlier: Mapping[str, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def file(self) -> GgufFile:
        """The opened file, which has the tokens of the checkpoint.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, its weights are rounded, or it has another vocabulary.
        """
        if self.path.is_dir():
            raise ValueError(
                f"{self.path} is a folder, and a template is a GGUF file: give FILE.gguf, which "
                "llama.cpp's converter makes of the checkpoint"
            )
        file = open_same(self.path, self.source.checkpoint.folder)
        if few := file.types.keys() - PLAIN_DTYPES.keys():
            raise ValueError(
                f"{self.path} has weights in {', '.join(sorted(few))}, and a template is in F32, "
                "F16 or BF16: give the file that llama.cpp's converter makes of the checkpoint"
            )
        return file

    @functools.cached_property
    def layout(self) -> GgufLayout:
        """The layout of a result: the tensors and the fields of the file.

        Fields that llama.cpp's converter leaves out are added. A tensor without a source is read
        from the file when it is written, which must then hold the same numbers as now.

        Raises:
            FileNotFoundError, ValueError: As `file` and `placements_in`, or the file has another
                value of a field that follows from the configuration; names it.
        """
        config = self.source.config.get_text_config()
        uncompared = check_template(self.path, self.file.architecture, self.file.get, config)
        unmatched = {
            "the template": sorted(_of_kind(self.placements, FOREIGN)),
            "the checkpoint": name_patterns(sorted(_of_kind(self.placements, ABSENT))),
            "config.json": uncompared,
        }
        tensors = tuple(
            replace(x, values=partial(self._unchanged, x.name, self._copies[x.name]))
            if x.name in self._copies
            else x
            for x in self.tensors
        )
        fields = self.file.fields() | self._missing_fields(config)
        # Tables of the rotary embedding follow from the configuration.
        foreign = [x for x in unmatched["the template"] if not x.startswith("rope_")]
        if foreign:
            warnings.warn(
                f"{self.path} has {few_of(foreign)}, which {self.source.checkpoint.folder} lacks: "
                "the result gets it as it is",
                RuntimeWarning,
                stacklevel=1,
            )
        return GgufLayout(fields, tensors, {which: x for which, x in unmatched.items() if x})

    @functools.cached_property
    def lasting(self) -> Measurement:
        """What a resumed run reads instead of matching the file, and a hash of all copies."""
        placements = {f"{self._fingerprint}{name}": x for name, x in self.placements.items()}
        all_copies = hashlib.sha256(b"".join(x.encode() + y for x, y in self._copies.items()))
        return Measurement(placements=placements, copied={all_copies.hexdigest(): torch.zeros(1)})

    @functools.cached_property
    def placements(self) -> dict[str, Tensor]:
        """Where the tensors of the file are in the checkpoint; see `placements_in`."""
        return _of_kind(self.earlier, self._fingerprint) or placements_in(
            self.file, self.path, self.source, self.skeleton
        )

    @functools.cached_property
    def _fingerprint(self) -> str:
        """What the names of placements of this file and this checkpoint begin with."""
        header = self.file.data.read(0, self.file.header.size).tobytes()
        return f"{hashlib.sha256(self.source.fingerprint.encode() + header).hexdigest()}/"

    @functools.cached_property
    def tensors(self) -> tuple[GgufTensor, ...]:
        """The tensors of the file, with sources for those that can have a type.

        A tensor can have one if its rows are those of linears of blocks, or of weights outside the
        blocks, in whole or in parts. Two such tensors have all their sources in common, or none.
        """
        shapes = weight_shapes(self.source, self.skeleton)
        tensors, uses = [], defaultdict[str, set[object]](set)
        for name, stored in self.file.tensors.items():
            dtype = PLAIN_DTYPES[stored.tensor_type.name]
            tensor = GgufTensor(name, self.file.shape(name), dtype)
            fits = tensor.is_matrix and tensor.shape[-1] % _NARROWEST == 0
            if fits and name.endswith(".weight") and dtype == compared_dtype(self.file):
                tensor = _with_sources(tensor, self.placements, shapes)
            tensors.append(tensor)
            for source_name in tensor.sources:
                uses[source_name].add((tensor.sources, tensor.columns))
        linears = (f"{name}.weight" for name in self.skeleton.all_linears())
        outside = self.skeleton.outside_parameter_names
        readable = {name for name in (*linears, *outside) if len(uses[name]) == 1}
        return tuple(
            x if readable.issuperset(x.sources) else replace(x, sources=()) for x in tensors
        )

    @functools.cached_property
    def _copies(self) -> dict[str, bytes]:
        """Name of a tensor without a source -> the hash of its numbers."""
        return {x.name: _digest(self.file.exact(x.name)) for x in self.tensors if not x.sources}

    def _unchanged(self, name: str, digest: bytes) -> Tensor:
        """The content of a tensor whose hash was `digest` before the run."""
        values = self.file.exact(name)
        if _digest(values) != digest:
            raise ValueError(
                f"{self.path} was changed since the run began: {name} has other numbers. Put it "
                "back as it was, and the same command continues"
            )
        return values

    def _missing_fields(self, config: Any) -> dict[str, GgufField]:
        """The fields that the file lacks, of those that follow from the configuration.

        llama.cpp's converter leaves out some, such as which blocks of Gemma 3 have a window. Those
        that are there must have the values of the configuration. Empty for an unknown family.
        """
        kind, stated = self.file.architecture, self.file.header.fields
        # The text model of one that sees is known, too.
        if ARCHITECTURES.get(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")) != kind:
            return {}
        known, tables = known_parameters(kind, config.to_dict())
        # `check_template` compares the heads.
        names = known.keys() - {f"{kind}.attention.head_count"} | {f"{kind}.{x}" for x in _OPTIONAL}
        theirs = {name: stated[name].value for name in names & stated.keys()}
        theirs |= {
            name: self.file.read(name).tolist()
            for name in self.file.tensors
            if name.startswith("rope_")
        }
        ours = {name: known[name].value for name in names & known.keys()}
        ours |= {name: table.tolist() for name, table in tables.items()}
        sixths = [index % 6 < 5 for index in range(self.file.get(f"{kind}.block_count", 0))]
        for name in sorted(theirs.keys() | tables.keys()):
            stands, follows = theirs.get(name), ours.get(name)
            # Without a field, llama.cpp takes these values.
            usual = (0, 1, "none", 6, sixths)
            if not (stands in usual if follows is None else _close(stands, follows)):
                raise ValueError(
                    f"{self.path} is not a file of this model: {name} is {str(stands)[:80]} there, "
                    f"and {str(follows)[:80]} by config.json. Give what llama.cpp's converter "
                    "makes of it"
                )
        return {name: field for name, field in known.items() if name not in stated}


def _digest(values: Tensor) -> bytes:
    return hashlib.sha256(flat_bytes(values).numpy().data).digest()


def _close(value: Any, other: Any) -> bool:
    """Whether two values of fields are the same but for rounding to float32."""
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_close, value, other))
    return value == other or (isinstance(value, float) and math.isclose(value, other, rel_tol=1e-5))


def _of_kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `kind`, by the rest of their names."""
    return {key.removeprefix(kind): x for key, x in tensors.items() if key.startswith(kind)}


def _with_sources(
    tensor: GgufTensor, placements: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> GgufTensor:
    """A tensor with its sources in the order of the model, and the order of its rows or columns."""
    names, kind = list(shapes), COLUMNS if COLUMNS + tensor.name in placements else ROWS
    if (placed := placements.get(kind + tensor.name)) is None:
        return tensor
    numbers, (number_O, place_O) = placed[:, 0].unique(), placed.T.contiguous()
    sources = tuple(names[number] for number in numbers.tolist())
    if kind == COLUMNS:
        is_all = sorted(place_O.tolist()) == list(range(shapes[sources[0]][-1]))
        return replace(tensor, sources=sources if is_all else (), columns=tuple(place_O.tolist()))
    counts = torch.tensor([math.prod(shapes[name][:-1]) for name in sources])
    order_O = (counts.cumsum(0) - counts)[torch.searchsorted(numbers, number_O)] + place_O
    is_whole = torch.equal(order_O, torch.arange(int(counts.sum())))
    return replace(tensor, sources=sources, rows=None if is_whole else order_O)
