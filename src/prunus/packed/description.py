"""What a packed checkpoint declares in `config.json`, and whether its tensors agree.

Everything here is read from files that may be damaged or hostile. Names, numbers and shapes are
checked against each other and against the shards' headers before any weight is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from prunus.packed.coding import padded
from prunus.packed.weight import Coding, PackedWeight

__all__ = [
    "FORMAT_VERSION",
    "METHOD",
    "REFUSAL",
    "Description",
    "PackedShape",
    "Stored",
    "StoredTensor",
]

#: `quant_method` in config.json.
METHOD = "prunus"
#: This number grows whenever a reader of an earlier version would misread the files.
FORMAT_VERSION = 2
#: This text stands where transformers expects the name of a weights file. Without prunus,
#: transformers refuses the checkpoint with an error that quotes it. With prunus, the quantizer
#: removes it first.
REFUSAL = (
    "this checkpoint is packed by prunus: pip install prunus, then import prunus before loading it"
)

Stored = Literal["bfloat16", "float16", "int8"]
_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
# Far above any real model, and small enough that a product of two such numbers fits in 64 bits.
_MAX_FEATURES = 2**31


class PackedShape(NamedTuple):
    """Shape of one packed linear.

    Attributes:
        out_features, in_features: size of the dense weight.
        stored: number of stored entries.
        rare: number of rare values among coded ones; None where values are not coded.
    """

    out_features: int
    in_features: int
    stored: int
    rare: int | None = None


class StoredTensor(NamedTuple):
    """Shape and dtype of a tensor, as a shard's header gives them."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Description:
    """The packed linears of a checkpoint.

    Attributes:
        values: dtype in which entries are stored.
        linears: module name (`model.layers.0.mlp.up_proj`) -> shape.
        version: version of the format.
    """

    values: Stored
    linears: Mapping[str, PackedShape]
    version: int = FORMAT_VERSION

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of stored values."""
        return _DTYPES[self.values]

    def tensors(self, linear: str) -> dict[str, StoredTensor]:
        """Return the tensors that stand for one linear's weight: name -> shape and dtype."""
        rows, columns, stored, rare = self.linears[linear]
        length = stored if rare is None else padded(stored)
        expected = {"weight": StoredTensor((length,), self.dtype if rare is None else torch.uint8)}
        # In version 1 of the format every weight had a mask.
        if stored < rows * columns or self.version == 1:
            expected["weight_mask"] = StoredTensor((rows, -(-columns // 8)), torch.uint8)
        if self.values == "int8":
            expected["weight_scales"] = StoredTensor((rows,), torch.float32)
        if rare is not None:
            expected["weight_codes"] = StoredTensor((length // 2,), torch.uint8)
            expected["weight_high_bytes"] = StoredTensor((16,), torch.uint8)
            expected["weight_rare_at"] = StoredTensor((rare,), torch.int64)
            expected["weight_rare"] = StoredTensor((rare,), torch.uint8)
        return {f"{linear}.{name}": tensor for name, tensor in expected.items()}

    def weight(self, linear: str, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
        """Return a linear's weight, built from the tensors that `Description.tensors` names."""
        rows, columns, _, rare = self.linears[linear]
        coding = (
            None
            if rare is None
            else Coding(*(tensors[f"{linear}.weight_{name}"] for name in Coding._fields))
        )
        return PackedWeight(
            (rows, columns),
            tensors[f"{linear}.weight"],
            tensors.get(f"{linear}.weight_mask"),
            tensors.get(f"{linear}.weight_scales"),
            coding,
        )

    def check_tensors(self, found: Mapping[str, StoredTensor]) -> None:
        """Compare the declared tensors with those of the shards.

        Args:
            found: name -> shape and dtype of every tensor in the shards.

        Raises:
            ValueError: a tensor is missing, or has another shape or dtype.
        """
        for linear in self.linears:
            for name, expected in self.tensors(linear).items():
                if name not in found:
                    raise ValueError(
                        f"the packed checkpoint holds no tensor {name!r}; is it whole, and was it "
                        "packed by prunus?"
                    )
                if found[name] != expected:
                    raise ValueError(
                        f"{name!r} is {found[name].dtype} {found[name].shape} in the file, but "
                        f"config.json asks for {expected.dtype} {expected.shape}; config and "
                        "weights do not belong together"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Return the `quantization_config` of config.json."""
        return {
            "quant_method": METHOD,
            "version": self.version,
            "values": self.values,
            "linears": {
                name: [number for number in shape if number is not None]
                for name, shape in self.linears.items()
            },
        }

    @classmethod
    def from_dict(cls, content: Any) -> Description:
        """Read a `quantization_config`.

        Raises:
            ValueError: it does not describe a packed checkpoint in a version that this prunus can
                read.
        """
        if not isinstance(content, Mapping) or content.get("quant_method") != METHOD:
            raise ValueError(f"config.json has no quantization_config with quant_method {METHOD!r}")
        version = content.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(
                f"the packed format's version must be a positive integer, got {version!r}"
            )
        if version > FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint is packed in version {version} of the format; this prunus reads "
                f"up to version {FORMAT_VERSION}: update prunus"
            )
        values = content.get("values")
        if not isinstance(values, str) or values not in _DTYPES:
            raise ValueError(f"packed values must be one of {', '.join(_DTYPES)}, got {values!r}")
        linears = content.get("linears")
        if not isinstance(linears, Mapping) or not linears:
            raise ValueError("quantization_config names no packed linears")
        may_be_coded = values == "bfloat16" and version > 1
        shapes = {_name(name): _shape(name, shape, may_be_coded) for name, shape in linears.items()}
        return cls(values, shapes, version)  # type: ignore[arg-type]


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name or not all(part for part in name.split(".")):
        raise ValueError(f"{name!r} is not the name of a linear")
    return name


def _shape(name: str, shape: Any, may_be_coded: bool) -> PackedShape:
    integers = isinstance(shape, list | tuple) and all(type(number) is int for number in shape)
    if not integers or len(shape) not in ((3, 4) if may_be_coded else (3,)):
        expected = "three integers (out, in, stored)" + (
            ", or four with rare" if may_be_coded else ""
        )
        raise ValueError(f"the shape of packed linear {name!r} must be {expected}, got {shape!r}")
    rows, columns, stored, *rare = shape
    if not (
        0 < rows < _MAX_FEATURES and 0 < columns < _MAX_FEATURES and 0 <= stored <= rows * columns
    ):
        raise ValueError(
            f"packed linear {name!r} cannot have {rows} x {columns} weights and store {stored}"
        )
    if rare and not 0 <= rare[0] <= stored:
        raise ValueError(f"packed linear {name!r} cannot have {rare[0]} rare values among {stored}")
    return PackedShape(rows, columns, stored, *rare)
