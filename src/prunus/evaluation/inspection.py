"""The linears of a checkpoint: shape, dtype, sparsity, and the N:M patterns that hold.

A packed checkpoint also shows the bits per weight that each linear takes in the file.

Legend: O outputs, I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.model.checkpoint.atomic_files import verify_shards
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.packed.source import PackedSource, is_packed
from prunus.pruning.manifest import mean_bits
from prunus.runs.document import Table, table_of

Readable = CheckpointSource | ModuleSource | PackedSource

#: The patterns that are checked, the strictest first.
PATTERNS = ((1, 4), (2, 4), (2, 8), (4, 8))


@dataclass(frozen=True)
class LinearInfo:
    """One linear of a block.

    Attributes:
        block: index of the block.
        name: full name of the linear.
        shape: (outputs, inputs).
        dtype: dtype in which the weight is stored; "integers" for a quantised linear.
        zeros: number of weights that are exactly zero.
        patterns: the N:M patterns of `PATTERNS` that hold, such as "2:4".
        bits: bits per weight in the file, with all that belongs to the linear; None where the
            linear is not packed.
    """

    block: int
    name: str
    shape: tuple[int, int]
    dtype: str
    zeros: int
    patterns: tuple[str, ...]
    bits: float | None = None

    @property
    def sparsity(self) -> float:
        """Share of exact zeros, 0 to 1."""
        return self.zeros / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Inspection:
    """All linears of a model's blocks, and the other weights in its blocks, which no method prunes.

    Attributes:
        model: name of the model.
        blocks: number of blocks.
        linears: all linears, in the order of the model.
        left_dense: name -> shape of weights that stay dense.
        verified: number of shards whose bytes are those of the record; None if not compared.
    """

    model: str
    blocks: int
    linears: tuple[LinearInfo, ...]
    left_dense: dict[str, tuple[int, ...]]
    verified: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights in all linears."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """Share of exact zeros among the weights of all linears."""
        return sum(linear.zeros for linear in self.linears) / self.weights

    @property
    def bits(self) -> float | None:
        """Mean bits per weight of the packed linears; None where there are none."""
        return mean_bits(self.linears)

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON."""
        rows = [asdict(linear) | {"sparsity": linear.sparsity} for linear in self.linears]
        return {
            "model": self.model,
            "blocks": self.blocks,
            "weights": self.weights,
            "sparsity": self.sparsity,
            "bits": self.bits,
            "linears": rows,
            "verified": self.verified,
            "left_dense": {name: list(shape) for name, shape in self.left_dense.items()},
        }

    def table(self) -> Table:
        """One row per linear."""
        rows = [
            {
                "linear": linear.name,
                "out × in": " × ".join(map(str, linear.shape)),
                "dtype": linear.dtype,
                "zeros": linear.sparsity,
                "bits": linear.bits,
                "N:M that hold": ", ".join(linear.patterns) or None,
            }
            for linear in self.linears
        ]
        total = {"linear": "all", "out × in": f"{self.weights:,} weights", "zeros": self.sparsity}
        verified = f"{self.verified} shards have the bytes that were written"
        return table_of(
            f"{self.model}: {self.blocks} blocks",
            rows,
            {"zeros": ".2%", "bits": ".3f"},
            "" if self.verified is None else verified,
            total | {"bits": self.bits},
        )

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def inspect(
    model: str | Path | nn.Module, *, trust_remote_code: bool = False, verify: bool = False
) -> Inspection:
    """Inspect a checkpoint, one block in memory at a time, or a loaded model.

    Args:
        model: a checkpoint folder, a hub id, or a loaded transformers model.
        trust_remote_code: let transformers run the code of the checkpoint.
        verify: compare every shard with the SHA-256 in its record first.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: the checkpoint is damaged, or of an
            unknown kind; or it has no record to compare with.
    """
    verified = None
    source: Readable
    if isinstance(model, nn.Module):
        if verify:
            raise ValueError("a loaded model has no shards to compare; give its folder")
        source, name = ModuleSource(model), type(model).__name__
        skeleton = _bound(source, trust_remote_code)
    else:
        folder, name = resolve_folder(model), str(model)
        verified = verify_shards(folder) if verify else None
        source, skeleton = open_by_blocks(folder, trust_remote_code)
    dense: dict[str, tuple[int, ...]] = {}
    for index in range(len(skeleton)):
        dense |= skeleton.left_dense(index)
    return Inspection(name, len(skeleton), tuple(_linears(source, skeleton)), dense, verified)


def open_by_blocks(
    folder: Path, trust_remote_code: bool = False
) -> tuple[CheckpointSource | PackedSource, Skeleton]:
    """The weights of a checkpoint, ordinary or packed, and the model without weights."""
    source = (PackedSource if is_packed(folder) else CheckpointSource)(folder, trust_remote_code)
    return source, _bound(source, trust_remote_code)


def _bound(source: Readable, trust_remote_code: bool) -> Skeleton:
    skeleton = Skeleton(source.config, source.stored_dtype, trust_remote_code)
    source.bind(skeleton)
    return skeleton


def _linears(source: Readable, skeleton: Skeleton) -> Iterator[LinearInfo]:
    packed = source.packed if isinstance(source, PackedSource) else {}
    for index in range(len(skeleton)):
        stored = source.block(index)
        for linear in skeleton.linears(index):
            weight = stored[f"{linear.name}.weight"]
            weight_OI = weight.T if linear.transposed else weight
            full_name = f"{skeleton.block_name(index)}.{linear.name}"
            dtype, bits = packed.get(full_name, (str(weight.dtype).removeprefix("torch."), None))
            yield LinearInfo(
                block=index,
                name=full_name,
                shape=linear.shape,
                dtype=dtype,
                zeros=int((weight_OI == 0).sum()),
                patterns=tuple(f"{n}:{m}" for n, m in PATTERNS if holds(weight_OI, n, m)),
                bits=bits,
            )


def holds(weight_OI: torch.Tensor, n: int, m: int) -> bool:
    """Whether at most n of every m consecutive inputs of each row are not zero.

    >>> weight_OI = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    >>> holds(weight_OI, 2, 4), holds(weight_OI, 1, 4)
    (True, False)
    """
    rows, columns = weight_OI.shape
    if columns % m:
        return False
    kept = (weight_OI != 0).reshape(rows, columns // m, m).sum(dim=2)
    return bool((kept <= n).all())
