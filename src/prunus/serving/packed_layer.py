"""One layer of a serving engine whose weight is packed.

An engine joins linears that read the same inputs: query, key and value, or gate and up. A packed
weight cannot be joined with another one, because each has classes and steps of its own. So a layer
keeps the weights apart and joins their outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prunus.packed.description import Description
from prunus.packed.linear import DenseLinear, PackedLinear, plain_linear
from prunus.packed.operators import look_up, run_dense, run_packed


class PackedLayer(nn.Module):
    """The weights of one layer, whose rows follow each other; at least one of them is packed.

    Tensors are handed over with `take`, in any order. `prepare` then builds the weights.

    Args:
        names: names of the layer's linears in the checkpoint, in the order of their rows. One that
            is not described is dense.
    """

    parts: nn.ModuleList

    def __init__(self, described: Description, names: Sequence[str]) -> None:
        super().__init__()
        self._described, self.names = described, tuple(names)
        self._taken: list[dict[str, torch.Tensor]] = [{} for _ in names]
        self.parts = nn.ModuleList()
        self._rows: list[int] = []
        self.is_ready = False

    def expected(self) -> dict[str, torch.dtype]:
        """Return the tensors that the checkpoint may hold for this layer, and their dtypes.

        Names are relative to a linear, such as `weight_mask`.
        """
        found = {"weight": torch.bfloat16}
        for name in self.names:
            if name in self._described.linears:
                for full, tensor in self._described.tensors(name).items():
                    found[full.removeprefix(f"{name}.")] = tensor.dtype
        return found

    def take(self, tensor_name: str, tensor: torch.Tensor, part: int = 0) -> None:
        """Keep a tensor of linear number `part` until `prepare` is called."""
        self._taken[part][tensor_name] = tensor

    def prepare(self, dtype: torch.dtype) -> None:
        """Check the tensors and build the weights. A second call does nothing.

        Raises:
            ValueError: a tensor is missing, or a weight is damaged; names it.
        """
        if self.is_ready:
            return
        for name, taken in zip(self.names, self._taken, strict=True):
            packed = name in self._described.linears
            self.parts.append(self._packed(name, taken) if packed else _dense(name, taken, dtype))
        self._rows = [int(part.out_features) for part in self.parts]  # type: ignore[arg-type]
        self._taken = []
        self.is_ready = True

    def _packed(self, name: str, taken: dict[str, torch.Tensor]) -> PackedLinear:
        tensors = {f"{name}.{each}": tensor for each, tensor in taken.items()}
        shape = self._described.linears[name]
        only = Description(self._described.values, {name: shape})
        only.check_tensors(tensors)
        try:
            return PackedLinear(only.weight(name, tensors), stored=shape.stored)
        except ValueError as fault:
            raise ValueError(f"{name} is damaged: {fault}") from fault

    @property
    def out_features(self) -> int:
        """The number of rows of all weights together; known after `prepare`."""
        return sum(self._rows)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map (..., in) to (..., out): the outputs of all weights, joined in their order."""
        biases = [None] * len(self._rows) if bias is None else bias.split(self._rows)
        outputs = [_multiply(x, part, each) for part, each in zip(self.parts, biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def look_up(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Map token ids (...) to rows (..., in) of the only weight, an embedding."""
        (part,) = self.parts
        assert isinstance(part, PackedLinear)
        return look_up(ids, part.packed, part.offsets, dtype)


def _dense(name: str, taken: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Linear:
    weight = taken.get("weight")
    if weight is None or weight.dim() != 2 or len(taken) > 1:
        raise ValueError(
            f"the checkpoint holds no dense weight {name}.weight, and config.json does not say "
            "that it is packed; is the checkpoint whole?"
        )
    return plain_linear(weight.to(dtype), None, DenseLinear)


def _multiply(x: torch.Tensor, part: nn.Module, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(part, PackedLinear):
        return run_packed(x, part.packed, part.offsets, bias)
    assert isinstance(part, DenseLinear)
    return run_dense(x, part.weight, bias)
