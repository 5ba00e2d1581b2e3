"""What is in a checkpoint: the zeros and N:M patterns of its linears, and its size.

Models are compared at equal size: bytes of the files, and bits per weight of the linears in the
blocks. The latter leave out the embedding and the head, which no method prunes as a rule and which
are a third of a small model. Masks, scales and codes count.

Legend: O outputs, I inputs of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.document import Table, table_of
from prunus.engine.linear_record import mean_bits
from prunus.evaluation.eval_records import ModelSize
from prunus.formats.codec import Codec
from prunus.hardware.numerics import check_finite
from prunus.model.checkpoint.files import verify_shards
from prunus.model.checkpoint.resolve import open_folder, unpacked
from prunus.model.formats import reader_of
from prunus.model.open_folder import OpenFolder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, Readable, open_weights
from prunus.pruning.manifest import Manifest
from prunus.pruning.masks import (
    compare_masks,
    masks,
    stored_linears,
    zeros_of,
)

#: The patterns that are checked, the strictest first.
PATTERNS = ((1, 4), (2, 4), (2, 8), (4, 8))


@dataclass(frozen=True)
class LinearInfo:
    """One linear of a block."""

    #: Position of its block.
    block: int
    #: Full name.
    name: str
    #: (outputs, inputs)
    shape: tuple[int, int]
    #: The dtype in which the weight is stored, or its type in a compressed model.
    dtype: str
    #: Number of weights that are exactly zero.
    zeros: int
    #: The N:M patterns of `PATTERNS` that hold, such as "2:4".
    patterns: tuple[str, ...]
    #: Bits per weight in the file, with all that belongs to the linear; None in a plain checkpoint.
    bits: float | None = None

    @property
    def sparsity(self) -> float:
        """Share of exact zeros, 0 to 1."""
        return self.zeros / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Inspection:
    """All linears of a model's blocks, and the other weights in its blocks, which no method prunes.

    Attributes:
        model: Name of the model.
        blocks: Number of blocks.
        linears: All linears, in the order of the model.
        left_dense: Full name -> shape of weights that stay dense.
        verified: Number of shards whose bytes are those of the record; None if not compared.
        other: Name of the model whose zeros were compared with; None without one.
        compared: Full name of a linear, or "all" -> how its zeros compare with those of the other
            model; see `compare_masks`.
        audits: What a GGUF file holds, or two of them; see `formats.gguf.audit.FileAudit`.
        pruned: Full names of the linears that prunus pruned, by the record in the folder; empty
            without one.
        unread: Why no linears are listed: transformers does not read the file. None where they are,
            and where two files are compared.
    """

    model: str
    blocks: int
    linears: tuple[LinearInfo, ...]
    left_dense: dict[str, tuple[int, ...]]
    verified: int | None = None
    other: str | None = None
    compared: dict[str, dict[str, float | None]] = field(default_factory=dict)
    audits: tuple[Any, ...] = ()
    unread: str | None = None
    pruned: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def weights(self) -> int:
        """Number of weights in all linears."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """Share of exact zeros among the weights of all linears; 0 for none."""
        return sum(linear.zeros for linear in self.linears) / max(1, self.weights)

    @property
    def sparsity_of_pruned_linears(self) -> float | None:
        """Share of exact zeros in the linears that prunus pruned; None if it pruned none."""
        pruned = tuple(linear for linear in self.linears if linear.name in self.pruned)
        return replace(self, linears=pruned).sparsity if pruned else None

    @property
    def bits(self) -> float | None:
        """Mean bits per weight of the linears of a compressed model; None in a plain checkpoint."""
        return mean_bits(self.linears)

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON."""
        rows = [asdict(linear) | {"sparsity": linear.sparsity} for linear in self.linears]
        totals = {
            "weights": self.weights,
            "sparsity": self.sparsity,
            "sparsity_of_all_linears": self.sparsity,
            "sparsity_of_pruned_linears": self.sparsity_of_pruned_linears,
            "bits": self.bits,
        }
        return asdict(self) | totals | {"linears": rows, "pruned": sorted(self.pruned)}

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
        verified = f"shards that have the bytes that were written: {self.verified}"
        of_pruned = self.sparsity_of_pruned_linears
        notes = [
            *(
                []
                if of_pruned is None
                else [f"zeros of the pruned linears: {of_pruned:.2%}; of all: {self.sparsity:.2%}"]
            ),
            *(["bits: per weight of a linear, with its scales"] if self.bits else []),
            *([] if self.verified is None else [verified]),
        ]
        return table_of(
            f"{self.model}: {self.blocks} blocks",
            rows,
            {"zeros": ".2%", "bits": ".3f"},
            "\n".join(notes),
            total | {"bits": self.bits},
        )

    def comparison(self) -> Table | None:
        """How the zeros of each linear compare with those of the other model; None without one."""
        if not self.compared:
            return None
        *rows, total = (
            {
                "linear": name,
                "zeros": each["sparsity"],
                "zeros of the other": each["other_sparsity"],
                "equal bits": each["equal"],
                "intersection over union": each["intersection_over_union"],
            }
            for name, each in self.compared.items()
        )
        forms = dict.fromkeys([*rows[0]][1:], ".2%")
        note = "equal bits: weights that are zero in both or in none"
        return table_of(f"{self.model} and {self.other}", rows, forms, note, total)

    def tables(self) -> list[Table]:
        """What the files hold, the table of the linears, and that of the comparison."""
        audits = type(self.audits[0]).tables(self.audits, self.unread) if self.audits else []
        linears = [self.table()] if self.linears or not audits else []
        return [*audits, *linears, *filter(None, [self.comparison()])]

    def _repr_html_(self) -> str:
        """The tables in a notebook."""
        return "".join(table._repr_html_() for table in self.tables())


def inspect(
    model: str | Path | nn.Module,
    other: Any = None,
    *,
    trust_remote_code: bool = False,
    verify: bool = False,
) -> Inspection:
    """Inspect a checkpoint, one block in memory at a time, or a loaded model.

    Of a GGUF file, also of a family that transformers does not read, this says what it holds.

    Args:
        model: A checkpoint folder, a hub id, a GGUF file, or a loaded transformers model.
        other: A model to compare the zeros with, or masks; all that `prunus.masks` takes. If both
            are GGUF files, what they hold is shown side by side, and no linears. None compares
            nothing.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        verify: Whether to compare every shard with the SHA-256 in its record first.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: The checkpoint is damaged, of an
            unknown kind, or has no record to compare with.
    """
    verified, audits = None, _audits(model, other)
    opened: OpenFolder | nn.Module
    types: dict[str, tuple[str, float]] = {}
    pruned = frozenset[str]()
    other_name = str(other) if isinstance(other, str | Path) else other and type(other).__name__
    if isinstance(model, nn.Module):
        if verify:
            raise ValueError("a loaded model has no shards to compare; give its folder")
        name, opened = type(model).__name__, model
    else:
        name = str(model)
        folder = open_folder(model, trust_remote_code, unpacks=False)
        kind = folder.format
        if kind is not None and verify and Path(name).is_file():
            raise ValueError(f"{model} is one file, which has no shards to compare")
        record = (kind or Codec).read_record(Path(name))
        types = {} if record is None else record.stored_types
        # What is unpacked has other shards.
        stored = folder.path
        verified = verify_shards(stored) if verify else None
        if (stored / Manifest.FILE).is_file():
            blocks_of_run = Manifest.load(stored).blocks
            pruned = frozenset(f"{x.name}.{name}" for x in blocks_of_run for name in x.linears)
        blocks = audits[0].blocks if audits else 0
        held = Inspection(name, blocks, (), {}, other=other_name, audits=audits)
        if len(audits) > 1:
            return held
        try:
            opened = unpacked(folder)
        except ValueError as fault:
            if not audits or other is not None:
                raise
            return replace(held, unread=str(fault))
    source, skeleton = open_weights(opened, trust_remote_code)
    compared = {}
    if other is not None:
        others = masks(other, trust_remote_code=trust_remote_code)
        compared = compare_masks(zeros_of(source, skeleton), others)
    linears = tuple(_linears(source, skeleton, types))
    dense = dict(each for x in range(len(skeleton)) for each in skeleton.left_dense(x).items())
    found = (name, len(skeleton), linears, dense, verified, other_name, compared, audits)
    return Inspection(*found, pruned=pruned)


def _audits(*models: Any) -> tuple[Any, ...]:
    """What those of some models hold that are files of a format, such as GGUF files."""
    paths = [Path(x) for x in models if isinstance(x, str | Path) and Path(x).is_file()]
    kinds = [(path, kind) for path in paths if (kind := reader_of(path)) is not None]
    return tuple(filter(None, (kind.audit(path, reads_weights=True) for path, kind in kinds)))


def _linears(
    source: Readable,
    skeleton: Skeleton,
    types: Mapping[str, tuple[str, float]],
) -> Iterator[LinearInfo]:
    """The linears of all blocks; one block is in memory at a time.

    `types` are the types of linears and their bits where the source was unpacked from a file.
    """
    for index, full_name, linear, weight_OI in stored_linears(source, skeleton):
        check_finite({f"{full_name}.weight": weight_OI})
        dtype, bits = types.get(full_name, (str(weight_OI.dtype).removeprefix("torch."), None))
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

    False where m does not divide the number of inputs.

    >>> weight_OI = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    >>> holds(weight_OI, 2, 4), holds(weight_OI, 1, 4)
    (True, False)
    """
    rows, columns = weight_OI.shape
    if columns % m:
        return False
    nonzeros = (weight_OI != 0).reshape(rows, columns // m, m).sum(dim=2)
    return bool((nonzeros <= n).all())


# --- size ---


def file_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's safetensors."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def stored_size(folder: OpenFolder) -> ModelSize:
    """The size of a checkpoint or a file as it is stored. Reads headers only."""
    stored = folder.made_from or folder
    path, kind = stored.path, stored.format
    nbytes = file_bytes(path) if path.is_dir() else path.stat().st_size
    if kind is not None:
        return ModelSize(nbytes, (audit := kind.audit(path)) and audit.bits.get("linears"))
    return ModelSize(nbytes, _stored_bits(folder))


def _stored_bits(folder: OpenFolder) -> float | None:
    """Bits per weight; None for models that prunus cannot take apart."""
    try:
        source, skeleton = open_weights(folder, folder.trust_remote_code)
    except (ValueError, FileNotFoundError, NotImplementedError):
        return None
    assert isinstance(source, CheckpointSource)
    nbytes, weights = 0.0, 0
    for path, (_, linear) in skeleton.all_linears().items():
        name = f"{path}.weight"
        # Fused experts lie in one tensor together, which has no name of its own for each.
        key = source.pieces[name].key if name in source.pieces else source.stored_names[name]
        count, shape = math.prod(linear.shape), source.checkpoint.tensors[key].shape
        nbytes += source.checkpoint.stored_nbytes(key) * count / math.prod(shape)
        weights += count
    return 8 * nbytes / weights
