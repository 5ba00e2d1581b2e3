"""Linears that reorder their inputs before the permutation is folded."""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunus.model.linears import Linear
from prunus.pruning.block.permute import inputs_permuted


def test_inputs_and_columns_are_permuted_together():
    torch.manual_seed(0)
    for module in (nn.Linear(24, 7), Conv1D(7, 24)):
        linear, other = Linear("o", module), Linear("q", nn.Linear(24, 3))
        x, order_I = torch.randn(5, 24), torch.randperm(24)
        folded, before = copy.deepcopy(module), other.module(x)
        Linear("o", folded).assign(linear.weight_OI[:, order_I])
        with torch.no_grad(), inputs_permuted([linear]) as permute:
            plain = module(x)
            permute(linear, order_I)
            permute(other, order_I)
            assert torch.equal(module(x), folded(x[:, order_I]))
            torch.testing.assert_close(module(x), plain)
            assert torch.equal(other.module(x), before)
        # The weight stays permuted, its inputs do not.
        assert torch.equal(linear.weight_OI, Linear("o", folded).weight_OI)
        assert torch.equal(module(x), folded(x))
        assert "forward" not in module.__dict__
