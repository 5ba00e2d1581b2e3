"""What a packed checkpoint declares in `config.json`, and whether its tensors agree.

Everything here is read from files that may be damaged or hostile. Names, numbers and shapes are
checked against each other and against the shards' headers before any weight is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

import torch

from prunus.hardware.errors import naming
from prunus.runtime.coding import padded
from prunus.runtime.plane_codes import MAX_CLASSES, MAX_FEATURES, check_code
from prunus.runtime.weight import Packed, PlaneCode, QuantizedWeight, from_tensors

#: `quant_method` in config.json.
METHOD = "prunus"
#: This number grows whenever a reader of an earlier version would misread the files.
FORMAT_VERSION = 3
#: This text stands where transformers expects the name of a weights file. Without prunus,
#: transformers refuses the checkpoint with an error that quotes it. With prunus, the quantizer
#: removes it first.
REFUSAL = (
    "this checkpoint is packed by prunus: install prunus, then import prunus before loading it"
)

#: The dtype in which a bitmap stores its entries, by name.
BitmapDtype = Literal["bfloat16", "float16", "int8"]
_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
# Far above any real file, and small enough for 64 bits.
_MAX_BYTES = 2**62


class StoredTensor(NamedTuple):
    """A tensor that a shard must hold."""

    #: Its shape.
    shape: tuple[int, ...]
    #: Its dtype.
    dtype: torch.dtype


class PackedShape(NamedTuple):
    """Shape of one linear that is packed as a bitmap."""

    #: Rows of the dense weight.
    out_features: int
    #: Columns of the dense weight.
    in_features: int
    #: Number of stored entries.
    stored: int
    #: Number of rare values among coded ones; None where values are not coded.
    rare: int | None = None

    @classmethod
    def from_json(cls, name: str, entry: Any, may_be_coded: bool) -> PackedShape:
        """Read an entry of config.json.

        Args:
            name: The linear, for messages.
            entry: What `to_json` returned, or anything else.
            may_be_coded: Whether values of this checkpoint can be coded: they are bfloat16.

        Raises:
            ValueError: A number is missing or out of range.
        """
        if not _are_integers(entry) or len(entry) not in ((3, 4) if may_be_coded else (3,)):
            or_four = ", or four with rare" if may_be_coded else ""
            raise ValueError(
                f"the shape of packed linear {name!r} must be three integers (out, in, stored)"
                f"{or_four}, got {entry!r}"
            )
        rows, columns, stored, *rare = entry
        if not (_is_size(rows) and _is_size(columns) and 0 <= stored <= rows * columns):
            raise ValueError(
                f"packed linear {name!r} cannot have {rows} x {columns} weights and store {stored}"
            )
        if rare and not 0 <= rare[0] <= stored:
            raise ValueError(
                f"packed linear {name!r} cannot have {rare[0]} rare values among {stored}"
            )
        return cls(rows, columns, stored, *rare)

    def to_json(self) -> list[int]:
        """The entry in config.json: (out, in, stored), and the rare values of coded ones.

        >>> PackedShape(4, 8, stored=5).to_json()
        [4, 8, 5]
        """
        return [number for number in self if number is not None]

    def tensors(self, values: BitmapDtype | None) -> dict[str, StoredTensor]:
        """Return the tensors of the weight, by names relative to the linear.

        `values` is that of the `Description`.
        """
        rows, columns, stored, rare = self
        assert values is not None, "a checkpoint with bitmaps names the dtype of their values"
        length = stored if rare is None else padded(stored)
        dtype = _DTYPES[values] if rare is None else torch.uint8
        expected = {"weight": StoredTensor((length,), dtype)}
        if stored < rows * columns:
            expected["weight_mask"] = StoredTensor((rows, -(-columns // 8)), torch.uint8)
        if values == "int8":
            expected["weight_scales"] = StoredTensor((rows,), torch.float32)
        if rare is not None:
            expected["weight_codes"] = StoredTensor((length // 2,), torch.uint8)
            expected["weight_high_bytes"] = StoredTensor((16,), torch.uint8)
            expected["weight_rare_at"] = StoredTensor((rare,), torch.int64)
            expected["weight_rare"] = StoredTensor((rare,), torch.uint8)
        return expected


class QuantizedShape(NamedTuple):
    """Shape of one linear whose weight is quantised."""

    #: Rows of the dense weight.
    out_features: int
    #: Columns of the dense weight.
    in_features: int
    #: Bytes of its planes and escape bytes.
    nbytes: int
    #: The code of each class of columns.
    codes: tuple[PlaneCode, ...]
    #: Rows of each chunk; the last one may have fewer.
    rows_per_chunk: int

    @classmethod
    def of(cls, weight: QuantizedWeight) -> QuantizedShape:
        """The shape of a weight."""
        return cls(*weight.shape, weight.data.shape[0], weight.codes, weight.rows_per_chunk)

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any]) -> QuantizedShape:
        """Read an entry of config.json; see `PackedShape.from_json`.

        Raises:
            ValueError: A number or code is missing or out of range.
        """
        size, codes = entry.get("shape"), entry.get("codes")
        numbers: Any = [entry.get("bytes"), entry.get("rows_per_chunk")]
        if not _are_integers(size) or len(size) != 2 or not _are_integers(numbers):
            raise ValueError(
                f"quantised linear {name!r} needs a shape [out, in] and the integers bytes and "
                f"rows_per_chunk, got {size!r} and {numbers}"
            )
        if not all(map(_is_size, (*size, numbers[1]))) or not 0 < numbers[0] < _MAX_BYTES:
            raise ValueError(
                f"quantised linear {name!r} cannot have {size[0]} x {size[1]} weights in "
                f"{numbers[0]} bytes and chunks of {numbers[1]} rows"
            )
        if not isinstance(codes, list | tuple) or not 1 <= len(codes) <= MAX_CLASSES:
            raise ValueError(
                f"quantised linear {name!r} needs 1 to {MAX_CLASSES} codes, got {codes!r}"
            )
        with naming(f"a code of quantised linear {name!r} is wrong"):
            checked = tuple(map(_code, codes))
        return cls(size[0], size[1], numbers[0], checked, numbers[1])

    @property
    def stored(self) -> None:
        """Nothing: the number of integers follows from the size."""

    def to_json(self) -> dict[str, Any]:
        """The entry in config.json."""
        return {
            "shape": [self.out_features, self.in_features],
            "bytes": self.nbytes,
            "rows_per_chunk": self.rows_per_chunk,
            "codes": [[raw, list(layers)] for raw, layers in self.codes],
        }

    def tensors(self, values: BitmapDtype | None) -> dict[str, StoredTensor]:
        """Return the tensors of the weight, by names relative to the linear.

        `values`, for bitmaps, does not matter.
        """
        return {
            "weight": StoredTensor((self.nbytes,), torch.uint8),
            "weight_classes": StoredTensor((self.in_features,), torch.uint8),
            "weight_steps": StoredTensor((self.in_features,), torch.bfloat16),
            "weight_scales": StoredTensor((self.out_features,), torch.bfloat16),
        }


@dataclass(frozen=True)
class Description:
    """The packed linears of a checkpoint: the `quantization_config` of its config.json."""

    #: The dtype in which bitmaps store their entries; None where there are no bitmaps.
    values: BitmapDtype | None
    #: Name of a module (`model.layers.0.mlp.up_proj`) -> shape. A linear is a bitmap or quantised;
    #: a checkpoint may hold both.
    linears: Mapping[str, PackedShape | QuantizedShape]

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype of the entries of bitmaps; None where there are none."""
        return None if self.values is None else _DTYPES[self.values]

    def tensors(self, linear: str) -> dict[str, StoredTensor]:
        """Return the tensors that store one linear's weight: name -> shape and dtype."""
        expected = self.linears[linear].tensors(self.values)
        return {f"{linear}.{name}": tensor for name, tensor in expected.items()}

    def weight(self, linear: str, tensors: Mapping[str, torch.Tensor]) -> Packed:
        """Return a linear's weight, built from the tensors that `Description.tensors` names.

        Nothing is checked; see `forms.checked_weight`.
        """
        shape = self.linears[linear]
        parts = {name: tensors[f"{linear}.{name}"] for name in shape.tensors(self.values)}
        layout = (shape.codes, shape.rows_per_chunk) if isinstance(shape, QuantizedShape) else None
        return from_tensors(shape[:2], parts, layout)

    def check_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Compare the declared tensors with those of the shards.

        Args:
            tensors: Name -> anything with a shape and a dtype, for all tensors of the shards.

        Raises:
            ValueError: A tensor is missing, or has another shape or dtype.
        """
        for linear in self.linears:
            for name, expected in self.tensors(linear).items():
                if name not in tensors:
                    raise ValueError(
                        f"the packed checkpoint holds no tensor {name!r}; is it whole, and was it "
                        "packed by prunus?"
                    )
                shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
                if (shape, dtype) != expected:
                    raise ValueError(
                        f"{name!r} is {dtype} {shape} in the file, but config.json asks for "
                        f"{expected.dtype} {expected.shape}; config and weights do not belong "
                        "together"
                    )

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        values = {} if self.values is None else {"values": self.values}
        return {
            "quant_method": METHOD,
            "version": FORMAT_VERSION,
            **values,
            "linears": {name: shape.to_json() for name, shape in self.linears.items()},
        }

    def add_to(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config.json of a packed checkpoint, made from the one of its source."""
        return {**config, "quantization_config": self.to_dict(), "transformers_weights": REFUSAL}

    @classmethod
    def from_dict(cls, content: Any) -> Description:
        """Read a `quantization_config`, or anything else.

        Raises:
            ValueError: It does not describe a packed checkpoint of a version that can be read.
        """
        if not isinstance(content, Mapping) or content.get("quant_method") != METHOD:
            raise ValueError(f"config.json has no quantization_config with quant_method {METHOD!r}")
        version = content.get("version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint is packed in version {version!r} of the format, and this prunus "
                f"reads version {FORMAT_VERSION}: use the prunus that packed it, or pack it again"
            )
        return cls.of_linears(content.get("linears"), content.get("values"))

    @classmethod
    def of_linears(cls, linears: Any, values: Any = None) -> Description:
        """Read the entries of linears, or anything else.

        Args:
            linears: Name in the checkpoint -> what `to_json` of its shape returned.
            values: The dtype of the entries of bitmaps; None where there are no bitmaps.

        Raises:
            ValueError: There are no linears, or an entry is damaged.
        """
        if not isinstance(linears, Mapping) or not linears:
            raise ValueError("quantization_config names no packed linears")
        are_quantised = all(isinstance(entry, Mapping) for entry in linears.values())
        if not (are_quantised and values is None) and (
            not isinstance(values, str) or values not in _DTYPES
        ):
            raise ValueError(f"packed values must be one of {', '.join(_DTYPES)}, got {values!r}")
        shapes: dict[str, PackedShape | QuantizedShape] = {}
        for name, entry in linears.items():
            if not isinstance(name, str) or not all(name.split(".")):
                raise ValueError(f"{name!r} is not the name of a linear")
            shapes[name] = (
                QuantizedShape.from_json(name, entry)
                if isinstance(entry, Mapping)
                else PackedShape.from_json(name, entry, values == "bfloat16")
            )
        return cls(values, shapes)  # type: ignore[arg-type]


def _code(code: Any) -> PlaneCode:
    """The code of one class of columns, from [raw, [bits of each layer]] or anything else."""
    if not isinstance(code, list | tuple) or len(code) != 2 or not _are_integers([code[0]]):
        raise ValueError(f"expected [raw, [bits of each layer]], got {code!r}")
    if not _are_integers(code[1]):
        raise ValueError(f"the bits of layers must be a list of integers, got {code[1]!r}")
    plane_code = PlaneCode(code[0], tuple(code[1]))
    check_code(plane_code)
    return plane_code


def _is_size(number: int) -> bool:
    return 0 < number < MAX_FEATURES


def _are_integers(numbers: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(numbers, list | tuple) and all(type(number) is int for number in numbers)
