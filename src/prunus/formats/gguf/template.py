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

import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunus.formats.fixed import check_template
from prunus.formats.gguf.file import GgufFile, open_gguf
from prunus.formats.gguf.header import GgufField
from prunus.formats.gguf.layout import (
    ARCHITECTURES,
    GgufLayout,
    GgufTensor,
    check_same,
    known_parameters,
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


def open_template(path: Path, folder: Path) -> GgufFile:
    """Open a GGUF file in full precision that has the tokens of the checkpoint in `folder`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, its weights are rounded, or it has another vocabulary.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and a template is a GGUF file: give FILE.gguf, which llama.cpp's "
            "converter makes of the checkpoint"
        )
    file = open_gguf(path)
    if few := file.types.keys() - PLAIN_DTYPES.keys():
        raise ValueError(
            f"{path} has weights in {', '.join(sorted(few))}, and a template is in F32, F16 or "
            "BF16: give the file that llama.cpp's converter makes of the checkpoint"
        )
    check_same(path, folder, file, {}, {})
    return file


def layout_in(
    path: Path, source: CheckpointSource, skeleton: Skeleton, earlier: Measurement
) -> tuple[GgufLayout, Measurement]:
    """The layout of a file in full precision, and what a resumed run reads instead of matching it.

    Args:
        path: The file.
        source: The checkpoint.
        skeleton: Its model.
        earlier: What an unfinished run has stored; empty for a new one.

    Raises:
        FileNotFoundError, ValueError: As `open_template` and `placements_in`.
    """
    file = open_template(path, source.checkpoint.folder)
    config = source.config.get_text_config()
    uncompared = check_template(path, file.architecture, file.get, config)
    header = file.data.read(0, file.header.size).tobytes()
    fingerprint = hashlib.sha256(source.fingerprint.encode() + header).hexdigest()
    kind = f"{fingerprint}/"
    placements = _of_kind(earlier.placements, kind) or placements_in(file, path, source, skeleton)
    lasting = {f"{kind}{name}": placed for name, placed in placements.items()}
    layout, digest = _with_copies(layout_by(file, placements, source, skeleton), file, path)
    if uncompared:
        layout.unmatched["config.json"] = uncompared
    # The text model of one that sees is known, too.
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
    if ARCHITECTURES.get(name) == file.architecture:
        known, tables = known_parameters(file.architecture, config.to_dict())
        layout.fields.update(_missing(file, path, known, tables))
    foreign = [x for x in layout.unmatched.get("the template", []) if not x.startswith("rope_")]
    if foreign:  # other than tables that follow from the configuration
        warnings.warn(
            f"{path} has {few_of(foreign)}, which {source.checkpoint.folder} lacks: the result gets"
            " it as it is",
            RuntimeWarning,
            stacklevel=2,
        )
    return layout, Measurement(placements=lasting, copied={digest: torch.zeros(1)})


def _missing(
    file: GgufFile, path: Path, known: Mapping[str, GgufField], tables: Mapping[str, Tensor]
) -> dict[str, GgufField]:
    """The fields that a template lacks, of those that follow from the configuration.

    llama.cpp's converter leaves out some, such as which blocks of Gemma 3 have a window.

    Args:
        file: The template.
        path: Where it is.
        known: Fields as they follow from the configuration.
        tables: Tensors likewise, by which the rotary embedding is scaled.

    Raises:
        ValueError: The template has one of them with another value; names it.
    """
    kind, stated = file.architecture, file.header.fields
    # `check_template` compares the heads.
    names = known.keys() - {f"{kind}.attention.head_count"} | {f"{kind}.{x}" for x in _OPTIONAL}
    theirs = {name: stated[name].value for name in names & stated.keys()}
    theirs |= {name: file.read(name).tolist() for name in file.tensors if name.startswith("rope_")}
    ours = {name: known[name].value for name in names & known.keys()}
    ours |= {name: table.tolist() for name, table in tables.items()}
    sixths = [index % 6 < 5 for index in range(file.get(f"{kind}.block_count", 0))]
    for name in sorted(theirs.keys() | tables.keys()):
        stands, follows = theirs.get(name), ours.get(name)
        # Without a field, llama.cpp takes these values.
        same = stands in (0, 1, "none", 6, sixths) if follows is None else _close(stands, follows)
        if not same:
            raise ValueError(
                f"{path} is not a file of this model: {name} is {str(stands)[:80]} there, and "
                f"{str(follows)[:80]} by config.json. Give what llama.cpp's converter makes of it"
            )
    return {name: field for name, field in known.items() if name not in stated}


def _close(value: Any, other: Any) -> bool:
    """Whether two values of fields are the same but for rounding to float32."""
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_close, value, other))
    return value == other or (isinstance(value, float) and math.isclose(value, other, rel_tol=1e-5))


def _of_kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `kind`, by the rest of their names."""
    return {key.removeprefix(kind): x for key, x in tensors.items() if key.startswith(kind)}


def _with_copies(layout: GgufLayout, file: GgufFile, path: Path) -> tuple[GgufLayout, str]:
    """A layout whose copies are checked when they are read, and a hash of all copies."""
    tensors, all_copies = [], hashlib.sha256()
    for tensor in layout.tensors:
        if not tensor.sources:
            digest = _digest(file.exact(tensor.name))
            all_copies.update(tensor.name.encode() + digest)
            tensor = replace(tensor, values=partial(_unchanged, file, path, tensor.name, digest))
        tensors.append(tensor)
    return replace(layout, tensors=tuple(tensors)), all_copies.hexdigest()


def _digest(values: Tensor) -> bytes:
    return hashlib.sha256(flat_bytes(values).numpy().data).digest()


def _unchanged(file: GgufFile, path: Path, name: str, digest: bytes) -> Tensor:
    """The content of a tensor whose hash was `digest` before the run."""
    values = file.exact(name)
    if _digest(values) != digest:
        raise ValueError(
            f"{path} was changed since the run began: {name} has other numbers. Put it back as it "
            "was, and the same command continues"
        )
    return values


def layout_by(
    file: GgufFile,
    placements: Mapping[str, Tensor],
    source: CheckpointSource,
    skeleton: Skeleton,
) -> GgufLayout:
    """The layout of a file, with a source for each tensor that can have a type.

    That is a tensor whose rows are those of linears of blocks, or of weights outside the blocks, in
    whole or in parts. Two such tensors have all their sources in common, or none.

    Args:
        file: What `open_template` returned.
        placements: What `placements_in` returned.
        source: The checkpoint.
        skeleton: Its model.
    """
    shapes = weight_shapes(source, skeleton)
    tensors, uses = [], defaultdict[str, set[object]](set)
    for name, stored in file.tensors.items():
        dtype = PLAIN_DTYPES[stored.tensor_type.name]
        tensor = GgufTensor(name, file.shape(name), dtype)
        may_have_type = tensor.is_matrix and name.endswith(".weight")
        if may_have_type and dtype == compared_dtype(file) and tensor.shape[-1] % _NARROWEST == 0:
            tensor = _with_sources(tensor, placements, shapes)
        tensors.append(tensor)
        for source_name in tensor.sources:
            uses[source_name].add((tensor.sources, tensor.columns))
    linears = (f"{name}.weight" for name in skeleton.all_linears())
    readable = {x for x in (*linears, *skeleton.outside_parameter_names) if len(uses[x]) == 1}
    foreign, absent = (sorted(_of_kind(placements, kind)) for kind in (FOREIGN, ABSENT))
    unmatched = {"the template": foreign, "the checkpoint": name_patterns(absent)}
    return GgufLayout(
        file.fields(),
        tuple(x if readable.issuperset(x.sources) else replace(x, sources=()) for x in tensors),
        {which: names for which, names in unmatched.items() if names},
    )


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
