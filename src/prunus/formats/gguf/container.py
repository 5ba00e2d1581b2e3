"""The layout of a GGUF file of any family: the file says what there is.

llama.cpp's converter reorders rows (the rotary halves of Llama), joins experts, splits fused
weights, transposes, and reorders columns. No rule of a family is repeated here: each row of a
matrix in the file still holds the numbers of a row of the checkpoint, and hashes say of which:

    checkpoint ──► hashes of all rows ───┐
                                         ├──► where each row of the file is in the checkpoint
    file of the converter ──► hashes ────┘              │
                                                        └──► GgufLayout

Matrices without such rows are looked for by their columns. What has no source, and what is not the
weight of a linear, an embedding or a head, is copied from the file.

Shape suffixes: O rows of one matrix, I its columns, N rows of all weights of one width.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from prunus.formats.base import tensors_of_kind
from prunus.formats.fixed import check_template
from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.header import open_gguf
from prunus.formats.gguf.layout import GgufLayout, GgufTensor, check_same, weights_stored_once
from prunus.formats.gguf.types import PLAIN, TYPES
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource

#: Kinds of placements; the name of the tensor follows. See `placements_in`.
ROWS, COLUMNS, TRANSPOSED = "rows/", "columns/", "transposed/"
# The least share of the weights of a file's matrices that must be in the checkpoint.
_LEAST_SHARE = 0.95
# Shorter rows are often equal by chance.
_SHORTEST = 8
# Numbers that are hashed together: they take 8 bytes each meanwhile.
_HASHED = 2**22
# Rows by which the weights are compared that could have the same rows.
_COMPARED = 256
# The columns of a weight that can have a type are a multiple of these.
_NARROWEST = min(kind.span for kind in TYPES.values())
_DTYPES = {name: dtype for dtype, (name, _, _) in PLAIN.items()}


def open_container(path: Path, folder: Path) -> GgufFile:
    """Open a GGUF file in full precision that has the tokens of the checkpoint in `folder`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, its weights are rounded, or it has another vocabulary.
    """
    file = open_gguf(path)
    if few := file.types.keys() - _DTYPES.keys():
        raise ValueError(
            f"{path} has weights in {', '.join(sorted(few))}, and a template is in F32, F16 or "
            "BF16: give the file that llama.cpp's converter makes of the checkpoint"
        )
    check_same(path, folder, file, {}, {})
    return file


def fingerprint(file: GgufFile, source: CheckpointSource) -> str:
    """A text that differs for other files, by header and vectors, and for other checkpoints."""
    vectors = (file.raw(name).numpy() for name in file.tensors if name not in matrices_of(file))
    header = file.reader.data[: file.reader.data_offset].tobytes()
    parts = (source.fingerprint.encode(), header, *vectors)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def matrices_of(file: GgufFile) -> list[str]:
    """The names of the tensors of a file that have rows and columns, block after block."""
    return sorted(
        [name for name, x in file.tensors.items() if sum(side > 1 for side in x.shape) > 1],
        key=lambda name: int(name.split(".")[1]) if name.startswith("blk.") else -1,
    )


def content(file: GgufFile, name: str) -> Tensor:
    """A tensor as a file in full precision stores it, with rows first."""
    dtype = _DTYPES[file.tensors[name].tensor_type.name]
    return file.raw(name).view(dtype).reshape(shape_in(file, name))


def shape_in(file: GgufFile, name: str) -> tuple[int, ...]:
    """The shape of a tensor of a file in the order of torch, rows first."""
    return tuple(int(side) for side in reversed(file.tensors[name].shape))


# --- where the matrices of a file are in a checkpoint ---


def weight_shapes(source: CheckpointSource, skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a checkpoint; what the model lacks has its stored name."""
    shapes = {name: tuple(x.shape) for name, x in skeleton.model.state_dict().items()}
    unknown = source.checkpoint.tensors.keys() - set(source.stored.values())
    return shapes | {key: source.checkpoint.tensors[key].shape for key in sorted(unknown)}


def _weights(source: CheckpointSource, skeleton: Skeleton) -> Iterator[tuple[int, Tensor]]:
    """Every weight with rows, one after the other, with the number of its name in `weight_shapes`.

    Of tied weights there is the first.
    """
    unknown = source.checkpoint.tensors.keys() - set(source.stored.values())
    names = {*weights_stored_once(source, skeleton), *source.pieces, *unknown}
    for number, (name, shape) in enumerate(weight_shapes(source, skeleton).items()):
        if len(shape) > 1 and name in names:
            yield number, source.weight(name)


def placements_in(
    file: GgufFile, path: Path, source: CheckpointSource, skeleton: Skeleton
) -> dict[str, Tensor]:
    """Where the matrices of a file are in a checkpoint.

    Args:
        file: What `open_container` returned for `path`.
        path: Its name, for messages.
        source: The checkpoint.
        skeleton: Its model.

    Returns:
        Kind and name of a tensor of the file -> int32 (O, 2): for each row the number of a weight
        in `weight_shapes` and the row there (`ROWS`), or the column there (`TRANSPOSED`); or
        (I, 2), for each column the weight and the column there (`COLUMNS`). A matrix without a
        source is missing.

    Raises:
        ValueError: Less than 95 % of the weights of the matrices are in the checkpoint; names some
            matrices that are not.
    """
    matrices, dtype = matrices_of(file), _compared_dtype(file)
    by_row = _Lookup(_weights(source, skeleton), dtype)
    placements = dict[str, Tensor]()
    for name in matrices:
        if (placed := by_row.places(content(file, name))) is not None:
            placements[ROWS + name] = placed
    if left := [name for name in matrices if ROWS + name not in placements]:
        unused = (x for x in _weights(source, skeleton) if x[0] not in by_row.uses)
        by_column = _Lookup(((number, weight.flatten(0, -2).T) for number, weight in unused), dtype)
        for name in left:
            weight = content(file, name)
            for kind, rows in ((TRANSPOSED, weight), (COLUMNS, weight.flatten(0, -2).T)):
                if (placed := by_column.places(rows)) is not None:
                    placements[kind + name] = placed
    _check_share(file, path, source, matrices, {x.partition("/")[2] for x in placements})
    return placements


def _compared_dtype(file: GgufFile) -> torch.dtype:
    """The dtype in which weights are compared: that of the file, where not all are float32."""
    return next((_DTYPES[name] for name in ("BF16", "F16") if name in file.types), torch.float32)


def _check_share(
    file: GgufFile, path: Path, source: CheckpointSource, matrices: list[str], placed: set[str]
) -> None:
    sizes = {name: math.prod(shape_in(file, name)) for name in matrices}
    missing = [name for name in matrices if name not in placed]
    share = 1 - sum(sizes[name] for name in missing) / max(1, sum(sizes.values()))
    if share < _LEAST_SHARE:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" * (len(missing) > 3))
        raise ValueError(
            f"{path} is not a file of this model: {share:.0%} of the weights of its matrices are "
            f"in {source.checkpoint.folder}, and not those of {names}. Give what llama.cpp's "
            "converter makes of the checkpoint, in F32, F16 or BF16"
        )


def _hashes(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A hash of each row of a weight (…, I) in a dtype, int64 (O,).

    It is Σ_i a_i x_i modulo 2^64, with the bits of a number as an integer x_i, and random odd a_i.
    The chance that two different rows have the same one is 2^-48 at most, and 2^-32 in float32, of
    rows that differ in nothing but signs. It is near 2^-63 for others.
    """
    rows_OI = weight.reshape(-1, weight.shape[-1])
    integers = torch.int16 if dtype.itemsize == 2 else torch.int32
    generator, columns = torch.Generator().manual_seed(0), weight.shape[-1]
    factors_I = torch.randint(-(2**62), 2**62, (columns,), generator=generator) * 2 + 1
    return torch.cat(
        [
            part.to(dtype).contiguous().view(integers).long() @ factors_I
            for part in rows_OI.split(max(1, _HASHED // columns))
        ]
    )


class _Lookup:
    """Finds rows of matrices among those of all weights.

    Args:
        weights: Each weight after its number. Those with short rows are left out.
        dtype: What all rows are compared in.

    Attributes:
        uses: Number of a weight -> how many matrices have rows of it.
    """

    def __init__(self, weights: Iterable[tuple[int, Tensor]], dtype: torch.dtype) -> None:
        self.uses, self._dtype = Counter[int](), dtype
        parts = defaultdict[int, list[Tensor]](list)
        for number, weight in weights:
            if weight.is_floating_point() and weight.shape[-1] >= _SHORTEST:
                hashes_O = _hashes(weight, dtype)
                row_O = torch.arange(len(hashes_O))
                part = torch.stack([hashes_O, torch.full_like(row_O, number), row_O])
                parts[weight.shape[-1]].append(part)
        tables = {width: torch.cat(of_width, dim=1) for width, of_width in parts.items()}
        # Width -> int64 (3, N), the hash, the number of the weight and the row, in this order.
        self._sorted = {w: table[:, table[0].argsort(stable=True)] for w, table in tables.items()}

    def places(self, weight: Tensor) -> Tensor | None:
        """For each row of a matrix the number of a weight and the row in it, int32 (O, 2).

        None if a row is in no weight.
        """
        if weight.shape[-1] not in self._sorted:
            return None
        hashes_N, number_N, row_N = self._sorted[weight.shape[-1]]
        hashes_O = _hashes(weight, self._dtype)
        place_O = torch.searchsorted(hashes_N, hashes_O).clamp_max_(len(hashes_N) - 1)
        if not torch.equal(hashes_N[place_O], hashes_O):
            return None
        last_O = torch.searchsorted(hashes_N, hashes_O, right=True)
        is_open_O = last_O - place_O > 1
        taken = set(number_N[place_O[~is_open_O]].tolist())
        spans = torch.stack([place_O[is_open_O], last_O[is_open_O]], dim=1).tolist()
        place_O[is_open_O] = torch.tensor(self._choose(spans, number_N, taken), dtype=torch.int64)
        self.uses.update(number_N[place_O].unique().tolist())
        return torch.stack([number_N[place_O], row_N[place_O]], dim=1).int()

    def _choose(self, spans: list[list[int]], number_N: Tensor, taken: set[int]) -> list[int]:
        """A place for each row of a matrix that is equal to several rows of the weights.

        The weight that can give the most of them gives all that it can, before the next one. Of
        models with equal blocks or experts, a weight that gave rows to fewer matrices comes first,
        and then one before others: the order of the file is that of the model.

        Args:
            spans: The first place of each row and the one after the last.
            number_N: The weight of each place.
            taken: Weights that other rows of the matrix come from. They are preferred.
        """
        numbers = number_N.tolist()
        # First place of equal rows -> weight -> its places that are left, from the last on.
        free = {
            first: {
                number: list(places)[::-1]
                for number, places in itertools.groupby(range(first, last), numbers.__getitem__)
            }
            for first, last in {(first, last) for first, last in spans}
        }
        chosen, rest = dict[int, int](), list(range(len(spans)))
        while rest:
            compared = [free[spans[i][0]].items() for i in rest[:_COMPARED]]
            rows = Counter(number for items in compared for number, places in items if places)
            options = [number for number, places in free[spans[rest[0]][0]].items() if places]
            best = max(options, key=lambda x: (x in taken, rows[x], -self.uses[x], -x), default=-1)
            taken = taken | {best}
            for i in rest:
                if places := free[spans[i][0]].get(best):
                    chosen[i] = places.pop()
            rest = [i for i in rest[1:] if i not in chosen]
        # A file may have a row more often than the checkpoint.
        return [chosen.get(i, spans[i][0]) for i in range(len(spans))]


# --- what the file holds, by these placements ---


def layout_in(
    path: Path, source: CheckpointSource, skeleton: Skeleton, measurement: Path
) -> tuple[GgufLayout, dict[str, Tensor]]:
    """The layout of a file in full precision, and what a resumed run reads instead of matching it.

    Args:
        path: The file.
        source: The checkpoint.
        skeleton: Its model.
        measurement: A file that has the second part, if a run was stopped.

    Raises:
        FileNotFoundError, ValueError: As `open_container` and `placements_in`.
    """
    file = open_container(path, source.checkpoint.folder)
    check_template(path, file.architecture, file.get, source.config.get_text_config())
    kind = f"placements/{fingerprint(file, source)}/"
    earlier = load_file(measurement) if measurement.exists() else {}
    placements = tensors_of_kind(earlier, kind) or placements_in(file, path, source, skeleton)
    lasting = {f"{kind}{name}": placed for name, placed in placements.items()}
    return layout_by(file, placements, source, skeleton), lasting


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
        file: What `open_container` returned.
        placements: What `placements_in` returned.
        source: The checkpoint.
        skeleton: Its model.
    """
    shapes = weight_shapes(source, skeleton)
    tensors, uses = [], defaultdict[str, set[object]](set)
    for name, stored in file.tensors.items():
        dtype, values = _DTYPES[stored.tensor_type.name], partial(content, file, name)
        tensor = GgufTensor(name, shape_in(file, name), dtype, values=values)
        may_have_type = tensor.is_matrix and name.endswith(".weight")
        if may_have_type and dtype == _compared_dtype(file) and tensor.shape[-1] % _NARROWEST == 0:
            tensor = _with_sources(tensor, placements, shapes)
        tensors.append(tensor)
        for source_name in tensor.sources:
            uses[source_name].add((tensor.sources, tensor.columns))
    linears = (
        f"{skeleton.block_name(index)}.{linear.name}.weight"
        for index in range(len(skeleton))
        for linear in skeleton.linears(index)
    )
    readable = {x for x in (*linears, *skeleton.outside_parameter_names) if len(uses[x]) == 1}
    return GgufLayout(
        file.fields(),
        tuple(x if readable.issuperset(x.sources) else replace(x, sources=()) for x in tensors),
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
