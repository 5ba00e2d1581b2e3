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

import torch
from torch import Tensor

from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.layout import block_of, tensor_names, vocabulary_of, weights_stored_once
from prunus.formats.gguf.types import PLAIN_DTYPES
from prunus.model.kinds import IMAGE_TEXT
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource

#: Kinds of placements; the name of the tensor follows. See `placements_in`.
ROWS, COLUMNS, TRANSPOSED = "rows/", "columns/", "transposed/"
#: Kinds of what has no counterpart: a tensor of the file, a weight of the checkpoint.
FOREIGN, ABSENT = "foreign/", "absent/"
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


def weight_shapes(source: CheckpointSource, skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a checkpoint; what the model lacks has its stored name."""
    shapes = {name: tuple(x.shape) for name, x in skeleton.model.state_dict().items()}
    unknown = source.checkpoint.tensors.keys() - set(source.stored_names.values())
    return shapes | {key: source.checkpoint.tensors[key].shape for key in sorted(unknown)}


def placements_in(
    file: GgufFile, path: Path, source: CheckpointSource, skeleton: Skeleton
) -> dict[str, Tensor]:
    """Where the tensors of a file are in a checkpoint, and what has no counterpart.

    Args:
        file: `Template.file` of `path`.
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
    weights = _Weights(source, skeleton)
    # What has rows and columns, block after block.
    matrices = sorted(
        [name for name, x in file.tensors.items() if sum(side > 1 for side in x.shape) > 1],
        key=block_of,
    )
    dtype = compared_dtype(file)
    by_row = _Lookup(weights.matrices(), dtype)
    placements = dict[str, Tensor]()
    near = functools.cache(weights.near)
    for name in matrices:
        if (placed := by_row.places(file.exact(name), near(block_of(name)))) is not None:
            placements[ROWS + name] = placed
    if left := [name for name in matrices if ROWS + name not in placements]:
        unused = (x for x in weights.matrices() if x[0] not in by_row.uses)
        by_column = _Lookup(((number, weight.flatten(0, -2).T) for number, weight in unused), dtype)
        for name in left:
            weight = file.exact(name)
            for kind, rows in ((TRANSPOSED, weight), (COLUMNS, weight.flatten(0, -2).T)):
                if (placed := by_column.places(rows, near(block_of(name)))) is not None:
                    placements[kind + name] = placed
    _check_share(file, path, source, matrices, {x.partition("/")[2] for x in placements})
    return placements | _Comparison(file, path, weights, placements).unmatched()


def compared_dtype(file: GgufFile) -> torch.dtype:
    """The dtype in which weights are compared: that of the file, where not all are float32."""
    return next(
        (PLAIN_DTYPES[name] for name in ("BF16", "F16") if name in file.types), torch.float32
    )


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
    """The weights of a checkpoint.

    Attributes:
        source: The checkpoint.
        skeleton: Its model.
        shapes: Name -> shape; see `weight_shapes`.
        unknown: Stored names that the model has no place for.
        numbers: Name of each weight that is stored, of tied ones the first -> its number in
            `shapes`.
    """

    def __init__(self, source: CheckpointSource, skeleton: Skeleton) -> None:
        self.source, self.skeleton = source, skeleton
        self.shapes = weight_shapes(source, skeleton)
        self.unknown = source.checkpoint.tensors.keys() - set(source.stored_names.values())
        stored = {*weights_stored_once(source, skeleton), *source.pieces, *self.unknown}
        self.numbers = {name: x for x, name in enumerate(self.shapes) if name in stored}
        self._inside = re.compile(re.escape(skeleton.path) + r"\.(\d+)\.").match

    def matrices(self) -> Iterator[tuple[int, Tensor]]:
        """Every weight with rows, one after the other, after its number."""
        for name, number in self.numbers.items():
            if len(self.shapes[name]) > 1:
                yield number, self.source.weight(name)

    def block(self, name: str) -> int | None:
        """The block of a weight: -1 outside the blocks, and None if that is not known."""
        if match := self._inside(name):
            return int(match[1])
        return None if name in self.unknown else -1

    def is_near(self, name: str, block: int) -> bool:
        """Whether a block of the file may have a weight; -1 is what is outside the blocks."""
        # transformers does not load the blocks after those of the model.
        return block >= len(self.skeleton) or self.block(name) in (block, None)

    def near(self, block: int) -> set[int]:
        """The numbers of all weights that are near a block of the file."""
        return {number for name, number in self.numbers.items() if self.is_near(name, block)}

    def may_be_absent(self, name: str) -> bool:
        """Whether a file of the text model need not have a weight."""
        if name in self.unknown or math.prod(self.shapes[name]) < 2:
            return True  # it is not loaded, or is a field of the file
        if self.skeleton.kind is not IMAGE_TEXT:
            return False
        model, head = self.skeleton.model, self.skeleton.vocabulary_weights.head
        state = model.state_dict(keep_vars=True)
        parts = (model.get_decoder(), head and head.module)
        of_text = {
            id(x) for part in parts if part for x in part.state_dict(keep_vars=True).values()
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
        self.name_of = tensor_names(file.architecture, len(weights.skeleton))
        # Name of a weight -> the tensors of the file that have numbers of it.
        self.found = defaultdict[str, set[str]](set)
        # Name of a weight -> which of its rows (O, 1), or of its columns (1, I), the file lacks.
        self.lacking = {name: torch.ones(1, 1, dtype=torch.bool) for name in weights.numbers}
        names, left = list(weights.shapes), dict.fromkeys(file.tensors)
        for key, placed in placements.items():
            tensor = key.partition("/")[2]
            left.pop(tensor, None)
            number_O, place_O = placed.long().T
            for number in number_O.unique().tolist():
                name, is_row = names[number], key.startswith(ROWS)
                *rows, columns = weights.shapes[name]
                if name not in self.found:
                    sides = (math.prod(rows), 1) if is_row else (1, columns)
                    self.lacking[name] = torch.ones(sides, dtype=torch.bool)
                self.lacking[name].view(-1)[place_O[number_O == number]] = False
                self.found[name].add(tensor)
        # Tensors of the file that were not found, and name of a weight -> how many of its numbers
        # the file lacks. What must be in the file comes first: a tower may have a norm of the same
        # numbers.
        counts = {name: count for name in self.lacking if (count := self._count(name))}
        self.left = left
        self.missing = {x: counts[x] for x in sorted(counts, key=weights.may_be_absent)}

    def unmatched(self) -> dict[str, Tensor]:
        """The tensors of the file and the weights that have no counterpart; see `placements_in`."""
        for block in sorted({block_of(name) for name in self.left}):
            self._compare_block(block)
        self._check_places()
        absent = [name for name in self.missing if self._may_be_absent(name)]
        if lacking := [name for name in self.missing if name not in absent]:
            raise ValueError(
                f"{self.path} is not a file of this model: it lacks the numbers of "
                f"{few_of(lacking)} in {self.weights.source.checkpoint.folder}. {_REMEDY}"
            )
        keys = [FOREIGN + name for name in self.left] + [ABSENT + name for name in absent]
        return {key: torch.zeros(1, dtype=torch.int32) for key in keys}

    def _count(self, name: str) -> int:
        """How many numbers of a weight the file lacks before it is compared."""
        lacks = self.lacking[name]
        return int(lacks.sum()) * (math.prod(self.weights.shapes[name]) // max(1, lacks.numel()))

    def _may_be_absent(self, name: str) -> bool:
        if self.weights.may_be_absent(name):
            return True
        # The converter may cut rows off that no token has.
        is_lacking = self.lacking[name]
        kept = int((~is_lacking).sum())
        folder = self.weights.source.checkpoint.folder
        is_start = self.weights.block(name) == -1 and not bool(is_lacking[:kept].any())
        return is_start and 0 < vocabulary_of(folder)[1] <= kept

    def _check_places(self) -> None:
        """Check that the tensors of the file are in the blocks and under the names of the model."""
        for weight, names in self.found.items():
            block, own = self.weights.block(weight), self.own_name(weight)
            home = "no block" if block == -1 else f"block {block}"
            for name in names:
                is_near = self.weights.is_near(weight, block_of(name))
                is_named = own in names or own not in self.file.tensors
                # Which of two equal tensors has which name does not matter.
                if not (is_near and (is_named or torch.equal(*map(self.file.raw, (name, own))))):
                    raise ValueError(
                        f"{self.path} is not a file of this model: {name} has the numbers of "
                        f"{weight}, which belong to {own or home}. {_REMEDY}"
                    )

    def own_name(self, name: str) -> str:
        """The name that the file has for a weight by llama.cpp's table; empty if not known."""
        key = self.weights.source.stored_names.get(name, name).replace("language_model.", "")
        return self.name_of(key) or ""

    def _compare_block(self, block: int) -> None:
        """Find the tensors of a block of the file among the weights, by their numbers alone.

        One tensor is compared with each weight, with those of all experts joined, and with two or
        three that are joined; then two or three tensors with each weight.
        """

        def tensors() -> list[str]:
            return [name for name in self.left if block_of(name) == block]

        def units() -> list[tuple[str, ...]]:
            stacks = defaultdict[str, list[str]](list)
            for name in self.missing:
                if self.weights.is_near(name, block):
                    stacks[re.sub(r"\.\d+\.", ".N.", name)].append(name)
            singles = [(name,) for names in stacks.values() for name in names]
            return singles + [tuple(x) for x in stacks.values() if len(x) > 1]

        own = {self.own_name(name): name for name in self.missing}
        self._match(((name,), (own[name],)) for name in tensors() if name in own)
        for few, many in ((1, (1,)), (1, (2, 3)), (2, (1,)), (3, (1,))):
            joined = list(itertools.combinations(tensors()[: None if few == 1 else _JOINED], few))
            weights = [x for count in many for x in _joined(units(), count)]
            self._match(itertools.product(joined, weights))

    def _match(self, pairs: Iterable[tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
        """Take tensors of the file and weights with equal numbers from `left` and `missing`."""
        for tensors, weights in pairs:
            free = self.left.keys() >= set(tensors) and self.missing.keys() >= set(weights)
            if free and self._have_same(tensors, weights):
                for tensor in tensors:
                    del self.left[tensor]
                for weight in weights:
                    del self.missing[weight]
                    self.found[weight].update(tensors)

    def _have_same(self, tensors: tuple[str, ...], weights: tuple[str, ...]) -> bool:
        """Whether tensors of the file have the numbers of weights, in any order but in norms."""
        counts = (math.prod(self.file.shape(name)) for name in tensors)
        if sum(counts) != sum(self.missing[name] for name in weights):
            return False
        ours = torch.cat([self.file.exact(name).flatten() for name in tensors])
        theirs = torch.cat([self._rest(name) for name in weights])
        if not theirs.is_floating_point():
            return False
        # Half precision is added to as it is.
        slack = 1e-3 if theirs.dtype == torch.float16 else 1e-6
        in_order = all(name.endswith("norm.weight") for name in tensors)

        def arranged(numbers: Tensor) -> Tensor:
            return numbers if in_order else numbers.sort().values

        dtype, ours, theirs = ours.dtype, arranged(ours.float()), theirs.float()
        return any(
            torch.allclose(
                ours, arranged(change(theirs).to(dtype).float()), rtol=slack if index else 0, atol=0
            )
            for index, change in enumerate(_CHANGES)
        )

    def _rest(self, name: str) -> Tensor:
        """The numbers of a weight that the file still lacks, flat."""
        weight = self.weights.source.weight(name)
        rows = weight.reshape(-1, (1, *weight.shape)[-1])
        return rows[self.lacking[name].expand_as(rows)]


def _joined(units: list[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
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
