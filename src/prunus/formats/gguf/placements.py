"""Where the numbers of a GGUF file are in a checkpoint, and which are missing on either side.

    checkpoint ──► hashes of all rows ───┐
                                         ├──► where each row of the file is in the checkpoint
    file of the converter ──► hashes ────┘

Matrices without such rows are looked for by their columns. All else is compared number by number:
vectors, narrow matrices, and parts of matrices that are in the file in another form. Then every
weight of the checkpoint must be in the file, in the block in which the model has it.

Shape suffixes: O rows of one matrix, I its columns, N rows of all weights of one width.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.formats.gguf.file import GgufFile, tensor_names
from prunus.formats.gguf.layout import known_name, vocabulary_of, weights_stored_once
from prunus.formats.gguf.types import PLAIN
from prunus.model.kinds import IMAGE_TEXT
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource

#: Kinds of placements; the name of the tensor follows. See `placements_in`.
ROWS, COLUMNS, TRANSPOSED = "rows/", "columns/", "transposed/"
#: Kinds of what has no counterpart: a tensor of the file, a weight of the checkpoint.
FOREIGN, ABSENT = "foreign/", "absent/"
#: Name of a type in full precision -> its dtype.
DTYPES = {name: dtype for dtype, (name, _, _) in PLAIN.items()}
# The least share of the weights of a file's matrices that must be in the checkpoint.
_LEAST_SHARE = 0.95
# Shorter rows are often equal by chance.
_SHORTEST = 8
# Numbers that are hashed together: they take 8 bytes each meanwhile.
_HASHED = 2**22
# Rows by which the weights are compared that could have the same rows.
_COMPARED = 256
# Tensors of a block that are joined with each other at most, to compare them with one.
_JOINED = 24
# What the converter does to numbers: nothing; norms of Gemma and others; decays of Mamba.
_CHANGES = (lambda x: x, lambda x: x + 1, lambda x: -x.exp())


def matrices_of(file: GgufFile) -> list[str]:
    """The names of the tensors of a file that have rows and columns, block after block."""
    return sorted(
        [name for name, x in file.tensors.items() if sum(side > 1 for side in x.shape) > 1],
        key=_block,
    )


def content(file: GgufFile, name: str) -> Tensor:
    """A tensor as a file in full precision stores it, with rows first."""
    dtype = DTYPES[file.tensors[name].tensor_type.name]
    return file.raw(name).view(dtype).reshape(file.shape(name))


def weight_shapes(source: CheckpointSource, skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a checkpoint; what the model lacks has its stored name."""
    shapes = {name: tuple(x.shape) for name, x in skeleton.model.state_dict().items()}
    unknown = source.checkpoint.tensors.keys() - set(source.stored.values())
    return shapes | {key: source.checkpoint.tensors[key].shape for key in sorted(unknown)}


def placements_in(
    file: GgufFile, path: Path, source: CheckpointSource, skeleton: Skeleton
) -> dict[str, Tensor]:
    """Where the tensors of a file are in a checkpoint, and what has no counterpart.

    Args:
        file: What `open_container` returned for `path`.
        path: Its name, for messages.
        source: The checkpoint.
        skeleton: Its model.

    Returns:
        Kind and name of a matrix of the file -> int32 (O, 2): for each row the number of a weight
        in `weight_shapes` and the row there (`ROWS`), or the column there (`TRANSPOSED`); or
        (I, 2), for each column the weight and the column there (`COLUMNS`). An entry of zeros for
        each tensor of the file whose numbers the checkpoint lacks (`FOREIGN`), and for each of its
        weights that the file may lack (`ABSENT`), which are those that no model of text has.

    Raises:
        ValueError: The file lacks a weight, has one in another place, or less than 95 % of the
            weights of its matrices are in the checkpoint; names them.
    """
    matrices, weights = matrices_of(file), _Weights(source, skeleton)
    dtype = compared_dtype(file)
    by_row = _Lookup(weights.matrices(), dtype)
    placements = dict[str, Tensor]()
    for name in matrices:
        near = weights.near(_block(name))
        if (placed := by_row.places(content(file, name), near)) is not None:
            placements[ROWS + name] = placed
    if left := [name for name in matrices if ROWS + name not in placements]:
        unused = (x for x in weights.matrices() if x[0] not in by_row.uses)
        by_column = _Lookup(((number, weight.flatten(0, -2).T) for number, weight in unused), dtype)
        for name in left:
            weight, near = content(file, name), weights.near(_block(name))
            for kind, rows in ((TRANSPOSED, weight), (COLUMNS, weight.flatten(0, -2).T)):
                if (placed := by_column.places(rows, near)) is not None:
                    placements[kind + name] = placed
    _check_share(file, path, source, matrices, {x.partition("/")[2] for x in placements})
    return placements | _Comparison(file, path, weights, placements).unmatched()


def compared_dtype(file: GgufFile) -> torch.dtype:
    """The dtype in which weights are compared: that of the file, where not all are float32."""
    return next((DTYPES[name] for name in ("BF16", "F16") if name in file.types), torch.float32)


def _block(name: str) -> int:
    """The block of a tensor of a file; -1 for tensors outside the blocks."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def few_of(names: Sequence[str]) -> str:
    """Some names for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))


def _check_share(
    file: GgufFile, path: Path, source: CheckpointSource, matrices: list[str], placed: set[str]
) -> None:
    sizes = {name: math.prod(file.shape(name)) for name in matrices}
    missing = [name for name in matrices if name not in placed]
    share = 1 - sum(sizes[name] for name in missing) / max(1, sum(sizes.values()))
    if share < _LEAST_SHARE:
        raise ValueError(
            f"{path} is not a file of this model: {share:.0%} of the weights of its matrices are "
            f"in {source.checkpoint.folder}, and not those of {few_of(missing)}. {_REMEDY}"
        )


_REMEDY = "Give what llama.cpp's converter makes of the checkpoint, in F32, F16 or BF16"


class _Weights:
    """The weights of a checkpoint by number, as `weight_shapes` counts them.

    Attributes:
        source: The checkpoint.
        skeleton: Its model.
        names: The names. Of tied weights only the first is compared.
        compared: The numbers of the weights that are stored, each once.
        unknown: Stored names that the model has no place for.
        blocks: For each name its block, -1 outside the blocks, and None if that is not known.
    """

    def __init__(self, source: CheckpointSource, skeleton: Skeleton) -> None:
        self.source, self.skeleton = source, skeleton
        self.shapes = weight_shapes(source, skeleton)
        self.names = list(self.shapes)
        self.unknown = source.checkpoint.tensors.keys() - set(source.stored.values())
        stored = {*weights_stored_once(source, skeleton), *source.pieces, *self.unknown}
        self.compared = [number for number, name in enumerate(self.names) if name in stored]
        inside = re.compile(re.escape(skeleton.path) + r"\.(\d+)\.")
        # The numbers of all weights that are near a block of the file.
        self.near = functools.cache(self._near)
        found = [inside.match(name) for name in self.names]
        self.blocks = [
            int(match[1]) if match else None if name in self.unknown else -1
            for name, match in zip(self.names, found, strict=True)
        ]

    def matrices(self) -> Iterator[tuple[int, Tensor]]:
        """Every weight with rows, one after the other, after its number."""
        for number in self.compared:
            if len(self.shapes[self.names[number]]) > 1:
                yield number, self.source.weight(self.names[number])

    def is_near(self, number: int, block: int) -> bool:
        """Whether a block of the file may have a weight; -1 is what is outside the blocks."""
        # transformers does not load the blocks after those of the model.
        return block >= len(self.skeleton) or self.blocks[number] in (block, None)

    def _near(self, block: int) -> set[int]:
        return {number for number in self.compared if self.is_near(number, block)}

    def may_be_absent(self, number: int) -> bool:
        """Whether a file of the text model need not have a weight."""
        name, skeleton = self.names[number], self.skeleton
        if name in self.unknown or math.prod(self.shapes[name]) < 2:
            return True  # it is not loaded, or is a field of the file
        if skeleton.kind is not IMAGE_TEXT:
            return False
        state, model = skeleton.model.state_dict(keep_vars=True), skeleton.model
        heads = (model.get_decoder(), model.get_output_embeddings())
        of_text = {
            id(x) for part in heads if part for x in part.state_dict(keep_vars=True).values()
        }
        return name in state and id(state[name]) not in of_text


class _Comparison:
    """Compares what rows and columns did not find, and says what is missing.

    Args:
        file: The file.
        path: Its name, for messages.
        weights: The checkpoint.
        placements: Where the matrices of the file are; see `placements_in`.
    """

    def __init__(
        self, file: GgufFile, path: Path, weights: _Weights, placements: Mapping[str, Tensor]
    ) -> None:
        self.file, self.path, self.weights = file, path, weights
        # Number of a weight -> the tensors of the file that have numbers of it.
        self.found = defaultdict[int, set[str]](set)
        # Number of a weight -> which of its rows, or of its columns, the file has.
        self.used = dict[int, tuple[bool, Tensor]]()
        for key, placed in placements.items():
            number_O, place_O = placed[placed[:, 0].argsort(stable=True)].long().T
            numbers, counts = number_O.unique_consecutive(return_counts=True)
            parts = place_O.split(counts.tolist())
            for number, part_O in zip(numbers.tolist(), parts, strict=True):
                self.found[number].add(key.partition("/")[2])
                shape, by_row = weights.shapes[weights.names[number]], key.startswith(ROWS)
                length = math.prod(shape[:-1]) if by_row else shape[-1]
                new = by_row, torch.zeros(length, dtype=torch.bool)
                self.used.setdefault(number, new)[1][part_O] = True
        found = {key.partition("/")[2] for key in placements}
        # Tensors of the file that were not found, and number of a weight -> what the file lacks.
        self.left = dict.fromkeys(name for name in file.tensors if name not in found)
        # What must be in the file comes first: a tower may have a norm of the same numbers.
        lacking = [number for number in weights.compared if self._size(number)]
        lacking = sorted(lacking, key=weights.may_be_absent)
        self.missing = {number: self._size(number) for number in lacking}

    def unmatched(self) -> dict[str, Tensor]:
        """The tensors of the file and the weights that have no counterpart; see `placements_in`."""
        for block in sorted({_block(name) for name in self.left}):
            self._compare_block(block)
        self._check_places()
        absent = [x for x in self.missing if self._may_be_absent(x)]
        names = self.weights.names
        if lacking := [names[x] for x in self.missing if x not in absent]:
            raise ValueError(
                f"{self.path} is not a file of this model: it lacks the numbers of "
                f"{few_of(lacking)} in {self.weights.source.checkpoint.folder}. {_REMEDY}"
            )
        keys = [FOREIGN + name for name in self.left] + [ABSENT + names[x] for x in absent]
        return {key: torch.zeros(1, dtype=torch.int32) for key in keys}

    def _size(self, number: int) -> int:
        """How many numbers of a weight the file still lacks."""
        shape = self.weights.shapes[self.weights.names[number]]
        if number not in self.used:
            return math.prod(shape)
        is_used = self.used[number][1]
        return int((~is_used).sum()) * (math.prod(shape) // max(1, len(is_used)))

    def _may_be_absent(self, number: int) -> bool:
        if self.weights.may_be_absent(number):
            return True
        # The converter may cut rows off that no token has.
        by_row, is_used = self.used.get(number, (False, torch.zeros(0)))
        kept = int(is_used.sum())
        folder = self.weights.source.checkpoint.folder
        is_start = by_row and self.weights.blocks[number] == -1 and bool(is_used[:kept].all())
        return is_start and 0 < vocabulary_of(folder)[1] <= kept

    def _check_places(self) -> None:
        """Check that the tensors of the file are in the blocks and under the names of the model."""
        for number, names in self.found.items():
            weight, block = self.weights.names[number], self.weights.blocks[number]
            own, home = self.own_name(number), "no block" if block == -1 else f"block {block}"
            for name in names:
                is_near = self.weights.is_near(number, _block(name))
                is_named = own in names or own not in self.file.tensors
                # Which of two equal tensors has which name does not matter.
                if not (is_near and (is_named or torch.equal(*map(self.file.raw, (name, own))))):
                    raise ValueError(
                        f"{self.path} is not a file of this model: {name} has the numbers of "
                        f"{weight}, which belong to {own or home}. {_REMEDY}"
                    )

    @functools.cached_property
    def _table(self) -> Any:
        try:
            return tensor_names(self.file.architecture, len(self.weights.skeleton))
        except ValueError:  # a kind of model that the package does not know
            return None

    def own_name(self, number: int) -> str:
        """The name that the file has for a weight by llama.cpp's table; empty if not known."""
        name = self.weights.names[number]
        key = self.weights.source.stored.get(name, name).replace("language_model.", "")
        return str((self._table and known_name(self._table, key)) or "")

    def _compare_block(self, block: int) -> None:
        """Find the tensors of a block of the file among the weights, by their numbers alone.

        One tensor is compared with each weight, with those of all experts joined, and with two or
        three that are joined; then two or three tensors with each weight.
        """

        def names() -> list[str]:
            return [name for name in self.left if _block(name) == block]

        def units() -> list[tuple[int, ...]]:
            near, stacks = self.weights.near(block), defaultdict[str, list[int]](list)
            for number in self.missing:
                if number in near:
                    stacks[re.sub(r"\.\d+\.", ".N.", self.weights.names[number])].append(number)
            singles = [(number,) for numbers in stacks.values() for number in numbers]
            return singles + [tuple(x) for x in stacks.values() if len(x) > 1]

        own = {self.own_name(number): number for number in self.missing}
        self._match(((name,), (own[name],)) for name in names() if name in own)
        for few, many in ((1, (1,)), (1, (2, 3)), (2, (1,)), (3, (1,))):
            tensors = list(itertools.combinations(names()[: None if few == 1 else _JOINED], few))
            numbers = [x for n in many for x in _joined(units(), n)]
            self._match(itertools.product(tensors, numbers))

    def _match(self, pairs: Iterable[tuple[tuple[str, ...], tuple[int, ...]]]) -> None:
        """Take what has equal numbers from `left` and `missing`."""
        for names, numbers in pairs:
            free = self.left.keys() >= set(names) and self.missing.keys() >= set(numbers)
            if free and self._have_same(names, numbers):
                for name in names:
                    del self.left[name]
                for number in numbers:
                    del self.missing[number]
                    self.found[number].update(names)

    def _have_same(self, names: tuple[str, ...], numbers: tuple[int, ...]) -> bool:
        """Whether tensors of the file have the numbers of weights, in any order but in norms."""
        counts = (math.prod(self.file.shape(name)) for name in names)
        if sum(counts) != sum(self.missing[number] for number in numbers):
            return False
        ours = torch.cat([content(self.file, name).flatten() for name in names])
        weights = torch.cat([self._rest(number) for number in numbers])
        if not weights.is_floating_point():
            return False
        # Half precision is added to as it is.
        slack = 1e-3 if weights.dtype == torch.float16 else 1e-6
        in_order = all(name.endswith("norm.weight") for name in names)
        ours = ours.float() if in_order else ours.float().sort().values
        for index, change in enumerate(_CHANGES):
            theirs = change(weights.float())
            theirs = theirs.to(content(self.file, names[0]).dtype).float()
            theirs = theirs if in_order else theirs.sort().values
            if torch.allclose(ours, theirs, rtol=slack if index else 0, atol=0):
                return True
        return False

    def _rest(self, number: int) -> Tensor:
        """The numbers of a weight that the file still lacks, flat."""
        weight = self.weights.source.weight(self.weights.names[number])
        if number not in self.used:
            return weight.flatten()
        by_row, is_used = self.used[number]
        rows = weight.flatten(0, -2)
        return (rows[~is_used] if by_row else rows[:, ~is_used]).flatten()


def _joined(units: list[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """All ways to join `count` units, of not too many."""
    few = units if count == 1 else units[:_JOINED]
    return [sum(several, ()) for several in itertools.combinations(few, count)]


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

    def places(self, weight: Tensor, near: Collection[int]) -> Tensor | None:
        """For each row of a matrix the number of a weight and the row in it, int32 (O, 2).

        None if a row is in no weight. Of equal rows, those of the weights `near` come first.
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
        place_O[is_open_O] = torch.tensor(
            self._choose(spans, number_N, taken, near), dtype=torch.int64
        )
        self.uses.update(number_N[place_O].unique().tolist())
        return torch.stack([number_N[place_O], row_N[place_O]], dim=1).int()

    def _choose(
        self, spans: list[list[int]], number_N: Tensor, taken: set[int], near: Collection[int]
    ) -> list[int]:
        """A place for each row of a matrix that is equal to several rows of the weights.

        The weight that can give the most of them gives all that it can, before the next one. Of
        models with equal blocks or experts, a weight that gave rows to fewer matrices comes first,
        and then one before others: the order of the file is that of the model.

        Args:
            spans: The first place of each row and the one after the last.
            number_N: The weight of each place.
            taken: Weights that other rows of the matrix come from. They are preferred.
            near: Weights that are preferred among those that can give as many rows.
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
            best = max(
                options,
                key=lambda x: (x in taken, rows[x], x in near, -self.uses[x], -x),
                default=-1,
            )
            taken = taken | {best}
            for i in rest:
                if places := free[spans[i][0]].get(best):
                    chosen[i] = places.pop()
            rest = [i for i in rest[1:] if i not in chosen]
        # A file may have a row more often than the checkpoint.
        return [chosen.get(i, spans[i][0]) for i in range(len(spans))]
