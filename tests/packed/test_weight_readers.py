"""Linears whose weight the model's own code reads are dense in memory."""

import torch
from torch import nn

from packed_reference import random_sparse
from prunus.packed.bitmap import pack_weight
from prunus.packed.linear import PackedLinear
from prunus.packed.quantizer import expand_read_linears


class Block(nn.Module):
    """Reads one weight while it computes, and another one while it is prepared."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, PackedLinear(pack_weight(weight, weight.dtype)))

    def init_weights(self) -> None:
        self.prepared.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.called_too.weight = self.called_too.weight
        return x @ self.read.weight.T + self.called(x) + self.called_too(x)

    def change(self, weight: nn.Parameter) -> None:
        self.called.weight = weight  # sets it and never reads it


def test_only_what_is_read_while_computing_becomes_dense():
    names = ("read", "prepared", "called", "called_too")
    weights = {
        name: random_sparse(8, 16, 0.5, torch.bfloat16, seed) for seed, name in enumerate(names)
    }
    model = nn.Sequential(Block(weights), Block(weights))
    assert expand_read_linears(model, torch.bfloat16) == [
        "0.read", "0.called_too", "1.read", "1.called_too",
    ]  # fmt: skip
    assert torch.equal(model[0].read.weight, weights["read"])
    assert isinstance(model[0].called, PackedLinear) and isinstance(model[0].prepared, PackedLinear)
    assert expand_read_linears(model, torch.bfloat16) == []
