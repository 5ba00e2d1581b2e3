"""The weights of a packed checkpoint, block by block, for commands that only read them."""

from __future__ import annotations

from pathlib import Path

import torch

from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.config import load_config
from prunus.model.skeleton import Skeleton, names_in_model
from prunus.runtime.description import METHOD, Description, QuantizedShape
from prunus.runtime.forms import checked_weight, expand


def is_packed(folder: Path) -> bool:
    """Whether the config.json of a checkpoint says that prunus has packed it.

    False for a folder without one.
    """
    if not (folder / "config.json").exists():
        return False
    config = read_json(folder / "config.json")
    described = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(described, dict) and described.get("quant_method") == METHOD


class PackedSource:
    """A packed checkpoint whose linears are expanded when they are read.

    Args:
        folder: The checkpoint.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Attributes:
        config: The configuration of the dense model.
        stored_dtype: The dtype to which linears are expanded.
        packed: Full name of each packed linear in the model -> "integers" or the dtype of its
            values, and the bits per weight in the file. It is empty before `bind`.

    Raises:
        FileNotFoundError, ValueError: The checkpoint is damaged, or of an unknown kind.
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
        """Find the tensors of a model. Call it before the methods below."""
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
        """Bytes of all tensors of a linear's weight, by its full name in the model.

        None where it has none of its own, such as a fused expert.
        """
        key = self._names.get(f"{linear}.weight")
        if key is None:
            return None
        stored = key.removesuffix(".weight")
        packed = linear in self.packed
        return self._checkpoint.nbytes(list(self._described.tensors(stored)) if packed else [key])

    def block(self, index: int) -> dict[str, torch.Tensor]:
        """The dense tensors of one block, by names relative to it.

        Raises:
            ValueError: A packed weight is damaged, or a weight is missing; the message names it.
        """
        prefix = self._skeleton.block_name(index) + "."
        tensors: dict[str, torch.Tensor] = {}
        fused = {whole.name: whole for whole in self._skeleton.fused(index)}
        for name, key in self._names.items():
            if not name.startswith(prefix):
                continue
            relative = name.removeprefix(prefix)
            linear = key.removesuffix(".weight")
            if key.endswith(".weight") and linear in self._described.linears:
                tensors[relative] = self._expanded(linear)
            else:
                tensor = self._checkpoint.whole(key)
                tensors |= fused[relative].cut(tensor) if relative in fused else {relative: tensor}
        for module in self._skeleton.linears(index):
            if f"{module.name}.weight" not in tensors:
                raise ValueError(
                    f"{self._folder} holds no weight for {prefix}{module.name}; is the checkpoint "
                    "whole?"
                )
        return tensors

    def _expanded(self, linear: str) -> torch.Tensor:
        """The dense weight of a packed linear, by its name in the checkpoint, after all checks."""
        parts = dict(self._checkpoint.read(list(self._described.tensors(linear))))
        packed, prepared = checked_weight(self._described, linear, parts)
        return expand(packed, self.stored_dtype, prepared)
