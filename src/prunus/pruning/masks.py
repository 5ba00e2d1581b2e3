"""Masks of a whole model: which weights of each linear are zero, as bits.

They come from a model, from a file of masks or from a dictionary, and prune takes them in place of
a method's own choice. In memory and in files a weight takes one bit.

Shape suffixes: O outputs, I inputs, B bytes with the bits of eight inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.functional import pad

from prunus.model.checkpoint.files import check_file_place
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.checkpoint.tensor_files import Checkpoint, save_safetensors
from prunus.model.linears import Linear
from prunus.model.skeleton import Skeleton
from prunus.model.source import Readable, open_weights, tensors_digest
from prunus.words import did_you_mean

#: The suffix of files of masks and of statistics.
SUFFIX = ".safetensors"
_Content = TypeVar("_Content")
# The value of each of the eight bits of a byte.
_BITS = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Masks(Mapping[str, Tensor]):
    """Full name of a linear -> bool (out, in), True where the weight is zero.

    Attributes:
        shapes: Full name -> (out, in).
        packed_OB: Full name -> the bits, uint8, the first input in the lowest bit.

    >>> masks = Masks.pack({"up": torch.tensor([[True, False, True]])})
    >>> masks.packed_OB["up"], masks["up"]
    (tensor([[5]], dtype=torch.uint8), tensor([[ True, False,  True]]))
    """

    shapes: dict[str, tuple[int, int]]
    packed_OB: dict[str, Tensor]

    @classmethod
    def pack(cls, zeros: Mapping[str, Tensor]) -> Masks:
        """The masks of a dictionary.

        Args:
            zeros: Full name -> bool (out, in), True where the weight is zero.

        Raises:
            ValueError: A mask is no matrix of bool.
        """
        found = cls({}, {})
        for name, zero_OI in zeros.items():
            is_mask = isinstance(zero_OI, Tensor) and zero_OI.dtype == torch.bool
            if not is_mask or zero_OI.dim() != 2:
                raise ValueError(
                    f"the mask of {name} must be a bool tensor (out, in), True where the weight is "
                    f"removed; got {getattr(zero_OI, 'dtype', type(zero_OI).__name__)} "
                    f"{tuple(getattr(zero_OI, 'shape', ()))}"
                )
            found.add(name, zero_OI)
        return found

    def add(self, name: str, zero_OI: Tensor) -> None:
        """Add the mask of one linear."""
        rows, columns = zero_OI.shape
        bits = pad(zero_OI.cpu(), (0, -columns % 8)).reshape(rows, -1, 8)
        self.shapes[name] = (rows, columns)
        self.packed_OB[name] = (bits * _BITS).sum(dim=2, dtype=torch.uint8)

    def __getitem__(self, name: str) -> Tensor:
        rows, columns = self.shapes[name]
        bits = self.packed_OB[name][:, :, None] & _BITS
        return (bits != 0).reshape(rows, -1)[:, :columns]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def sha256(self) -> str:
        """A hash of all names, shapes and bits."""
        content = json.dumps(sorted(self.shapes.items())) + tensors_digest(self.packed_OB)
        return hashlib.sha256(content.encode()).hexdigest()

    def sparsity(self, names: Mapping[str, Any]) -> float:
        """The share of zeros among all weights of some linears; 0 for none."""
        zeros = sum(int(self[name].sum()) for name in names)
        weights = sum(rows * columns for rows, columns in map(self.shapes.__getitem__, names))
        return zeros / weights if weights else 0.0

    def check_fit(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Check that the masks are for a model with these linears.

        Args:
            shapes: Full name of each linear of the model -> (out, in).

        Raises:
            ValueError: A mask is for a linear that the model does not have, or of another shape.
        """
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise ValueError(
                    f"the masks name {name}, which is none of the model's {len(shapes)} linears"
                    f"{did_you_mean(name, shapes)}"
                )
            if shape != shapes[name]:
                raise ValueError(
                    f"the mask of {name} has shape {shape}, and the weight {shapes[name]}: the "
                    "masks are those of another model, or are transposed"
                )

    def save(self, path: Path) -> None:
        """Write a safetensors file: one uint8 tensor per linear, and the shapes as metadata.

        Raises:
            ValueError, FileNotFoundError, FileExistsError: As `check_file`.
        """
        save_safetensors(
            check_file(path, "masks"), self.packed_OB, {"masks": json.dumps(self.shapes)}
        )

    @classmethod
    def load(cls, path: Path) -> Masks:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or holds no masks.
        """
        checkpoint, shapes = open_stored(path, "masks", dict[str, tuple[PositiveInt, PositiveInt]])
        stored = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
        expected = {name: ((o, -(-i // 8)), torch.uint8) for name, (o, i) in shapes.items()}
        if stored != expected:
            raise ValueError(f"{path} is damaged: its tensors are not those that its header lists")
        return cls(shapes, dict(checkpoint.read(shapes)))


def masks(
    model: str | Path | nn.Module | Mapping[str, Tensor],
    output: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> Masks:
    """Which weights of a model are zero, read with one block in memory at a time.

    Args:
        model: A checkpoint folder, a hub id, a loaded model, a file that this function wrote, or
            masks of your own: full name of a linear -> bool (out, in), True where the weight is
            removed.
        output: Safetensors file for the masks; None writes none.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Returns:
        Full name of each linear of the blocks -> bool (out, in), True where the weight is zero. It
        holds one bit per weight, and makes a tensor when it is asked for one.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, OSError: The model or the file cannot be
            read, or the output cannot be written.
    """
    target = None if output is None else check_file(output, "masks", model)
    if isinstance(model, Masks):
        found = model
    elif isinstance(model, Mapping):
        found = Masks.pack(model)
    elif not isinstance(model, nn.Module) and Path(model).suffix == SUFFIX:
        found = Masks.load(Path(model))
    else:
        weights = model if isinstance(model, nn.Module) else open_folder(model, trust_remote_code)
        found = zeros_of(*open_weights(weights, trust_remote_code))
    if target is not None:
        found.save(target)
    return found


def stored_linears(
    source: Readable, skeleton: Skeleton
) -> Iterator[tuple[int, str, Linear, Tensor]]:
    """Yield block, full name, linear and stored weight (out, in); one block is in memory at a time.

    Args:
        source: The weights.
        skeleton: The model without weights.
    """
    for index in range(len(skeleton)):
        stored = source.block(index)
        for linear in skeleton.linears(index):
            weight = stored[f"{linear.name}.weight"]
            full_name = f"{skeleton.block_name(index)}.{linear.name}"
            yield index, full_name, linear, weight.T if linear.transposed else weight


def zeros_of(source: Readable, skeleton: Skeleton) -> Masks:
    """Which weights of the linears in the blocks are zero."""
    found = Masks({}, {})
    for _, name, _, weight_OI in stored_linears(source, skeleton):
        found.add(name, weight_OI == 0)
    return found


def compare_masks(masks: Masks, others: Masks) -> dict[str, dict[str, float | None]]:
    """The zeros of two models, for each linear that `others` has, by full name, and for "all".

    Returns:
        Shares of 0 to 1: `sparsity` of the first model, `other_sparsity`, `equal` (the weights that
        are zero in both or in none), and `intersection_over_union` of the zeros, which is None if
        neither model has any.

    Raises:
        ValueError: The masks are those of two architectures; names the linear.

    >>> masks, others = (Masks.pack({"up": torch.tensor([x]) < 1}) for x in ([0, 0, 2, 3], [0] * 4))
    >>> compare_masks(masks, others)["all"]
    {'sparsity': 0.5, 'other_sparsity': 1.0, 'equal': 0.5, 'intersection_over_union': 0.5}
    """
    others.check_fit(masks.shapes)
    counts = {}
    for name in others:
        zero_OI, other_OI = masks[name], others[name]
        sums = (int(x.sum()) for x in (zero_OI, other_OI, zero_OI & other_OI))
        counts[name] = (zero_OI.numel(), *sums)
    counts["all"] = tuple(sum(column) for column in zip(*counts.values(), strict=True))
    return {
        name: {
            "sparsity": zeros / weights,
            "other_sparsity": other / weights,
            "equal": 1 - (zeros + other - 2 * common) / weights,
            "intersection_over_union": common / union
            if (union := zeros + other - common)
            else None,
        }
        for name, (weights, zeros, other, common) in counts.items()
    }


def check_file(output: str | Path, what: str, *others: Any) -> Path:
    """The path of a file of tensors to write.

    Args:
        output: The file.
        what: What it will hold: "masks" or "statistics". Only such a file is replaced.
        *others: What else the caller reads; see `check_file_place`.

    Raises:
        ValueError: It has another suffix, so that nobody would know how to read it.
        FileExistsError: Something else has this name.
        FileNotFoundError: There is no such folder.
    """
    path = Path(output)
    if path.suffix != SUFFIX:
        raise ValueError(f"output {output} must end in {SUFFIX}, which is the only format")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output {output}: there is no folder {path.parent}, make it first")

    def is_own(path: Path) -> bool:
        with contextlib.suppress(ValueError):
            return what in Checkpoint(path.parent, only=[path.name]).metadata
        return False

    check_file_place(path, is_own, others)
    return path


def open_stored(path: Path, what: str, kind: type[_Content]) -> tuple[Checkpoint, _Content]:
    """Open a file that prunus wrote beside a model: its tensors, and what its header says of them.

    Args:
        path: The file.
        what: What it must hold: "masks" or "statistics".
        kind: The type of what the header says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file {path}: prunus.{what}(MODEL, …) writes such a file"
        )
    checkpoint = Checkpoint(path.parent, only=[path.name])
    if what not in checkpoint.metadata:
        raise ValueError(
            f"{path} holds no {what}: prunus.{what}(MODEL, …) writes such a file. A model is named "
            "by its folder"
        )
    try:
        return checkpoint, TypeAdapter(kind).validate_json(checkpoint.metadata[what])
    except ValidationError as fault:
        raise ValueError(f"{path} is damaged: its header does not describe {what}") from fault
