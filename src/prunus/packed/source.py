"""The weights of a packed checkpoint, block by block, for commands that only read them."""

from __future__ import annotations

from pathlib import Path

import torch

from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.config import load_config
from prunus.model.skeleton import Skeleton, names_in_model
from prunus.packed.description import METHOD, Description, QuantizedShape
from prunus.packed.forms import checked_weight, expand


def is_packed(folder: Path) -> bool:
    """Whether the config.json of a checkpoint says that prunus has packed it."""
    if not (folder / "config.json").exists():
        return False
    config = read_json(folder / "config.json")
    described = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(described, dict) and described.get("quant_method") == METHOD


class PackedSource:
    """A packed checkpoint whose linears are expanded when they are read.

    `config` is that of the dense model. After `bind`, `packed` has of each linear "integers" or the
    dtype of its values, and the bits per weight in the file.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self._folder = folder
        self._checkpoint = Checkpoint(folder)
        self.config = load_config(
            folder, trust_remote_code, quantized=True, checkpoint=self._checkpoint
        )
        content = read_json(folder / "config.json")
        self._described = Description.from_dict(content["quantization_config"])
        self._described.check_tensors(self._checkpoint.tensors)
        self.stored_dtype: torch.dtype = getattr(self.config, "dtype", None) or torch.bfloat16
        self.packed: dict[str, tuple[str, float]] = {}

    def bind(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._names = names_in_model(skeleton, self._checkpoint.tensors)[0]
        for name, key in self._names.items():
            linear = key.removesuffix(".weight")
            if key.endswith(".weight") and linear in self._described.linears:
                shape = self._described.linears[linear]
                nbytes = self._checkpoint.nbytes(list(self._described.tensors(linear)))
                values = "integers" if isinstance(shape, QuantizedShape) else self._described.values
                weights = shape.out_features * shape.in_features
                self.packed[name.removesuffix(".weight")] = (str(values), 8 * nbytes / weights)

    def nbytes(self, linear: str) -> int | None:
        """Bytes of all tensors of a linear's weight; None where it has none, as a fused expert."""
        key = self._names.get(f"{linear}.weight")
        if key is None:
            return None
        stored = key.removesuffix(".weight")
        packed = linear in self.packed
        return self._checkpoint.nbytes(list(self._described.tensors(stored)) if packed else [key])

    def block(self, index: int) -> dict[str, torch.Tensor]:
        """The dense tensors of one block, by names relative to it."""
        prefix = self._skeleton.block_name(index) + "."
        found: dict[str, torch.Tensor] = {}
        fused = {each.name: each for each in self._skeleton.fused(index)}
        for name, key in self._names.items():
            if not name.startswith(prefix):
                continue
            relative = name.removeprefix(prefix)
            linear = key.removesuffix(".weight")
            if key.endswith(".weight") and linear in self._described.linears:
                found[relative] = self._expanded(linear)
            else:
                tensor = self._checkpoint.whole(key)
                found |= fused[relative].cut(tensor) if relative in fused else {relative: tensor}
        for each in self._skeleton.linears(index):
            if f"{each.name}.weight" not in found:
                raise ValueError(
                    f"{self._folder} holds no weight for {prefix}{each.name}; is the checkpoint "
                    "whole?"
                )
        return found

    def _expanded(self, linear: str) -> torch.Tensor:
        parts = dict(self._checkpoint.read(list(self._described.tensors(linear))))
        packed, prepared = checked_weight(self._described, linear, parts)
        return expand(packed, self.stored_dtype, prepared)
