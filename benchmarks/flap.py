"""FLAP (An et al., arXiv 2312.11983) as a baseline for benchmarks/structure.py.

Channels of MLPs and key-value groups of attention heads go where their inputs fluctuate little.
With the inputs X of `down_proj` or `o_proj` and its weight W, column j scores

    var(X_j) ‖W_j‖²                                          (the paper's metric WIFV)

The scores of a linear are standardised over its columns. So those of all blocks compare, and the
units of the lowest score go, wherever they are (the paper's structure AL-AM): every block keeps
another width. As in the published code, scores of heads are squared before, and a head scores the
mean of its columns. How much a unit counts is the number of its parameters. What went leaves its
mean output behind, as a bias of the linear: W_j mean(X_j), summed over the columns that went.

Where query heads share key-value heads, which the paper does not have, a unit is a key-value head
with all its query heads.

The result is the model with zeros in these columns. A narrower model computes the same, and its
parameters are those that are counted here.

Shape suffixes: O outputs, I inputs, U units, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.model.linears import find_block_list

#: Modules in a block, and their linears that read heads and channels.
_HEADS, _CHANNELS = ("self_attn", "o_proj"), ("mlp", "down_proj")


@dataclass(frozen=True)
class Reader:
    """A linear whose input columns are the units of one block.

    Attributes:
        linear: the linear.
        units: how many channels or key-value heads there are.
        cost: parameters of one unit, in all linears that it is part of.
        squares: whether scores are squared before they are standardised.
    """

    linear: nn.Linear
    units: int
    cost: int
    squares: bool


class Moments:
    """Mean and sample variance of the inputs of a linear, over all tokens."""

    def __init__(self, inputs: int) -> None:
        self._tokens = 0
        self._sum_I = torch.zeros(inputs, dtype=torch.float64)
        self._squares_I = torch.zeros(inputs, dtype=torch.float64)

    def add(self, x_TI: Tensor) -> None:
        x_TI = x_TI.reshape(-1, x_TI.shape[-1]).double().cpu()
        self._tokens += len(x_TI)
        self._sum_I += x_TI.sum(0)
        self._squares_I += x_TI.square().sum(0)

    @property
    def mean_I(self) -> Tensor:
        return self._sum_I / self._tokens

    @property
    def variance_I(self) -> Tensor:
        left_I = self._squares_I - self._tokens * self.mean_I.square()
        return left_I.clamp(min=0) / (self._tokens - 1)


def find_readers(model: Any) -> list[Reader]:
    """The linears of all blocks that read heads and channels.

    Raises:
        NotImplementedError: a block of the family has no such linears.
    """
    groups = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    found = []
    for block in find_block_list(model)[1]:
        for (parent, name), squares in ((_HEADS, True), (_CHANNELS, False)):
            try:
                linear = block.get_submodule(f"{parent}.{name}")
            except AttributeError as fault:
                raise NotImplementedError(f"FLAP needs {parent}.{name}: {fault}") from fault
            parameters = sum(
                each.weight.numel()
                + (each.bias.numel() if each.bias is not None and each is not linear else 0)
                for each in block.get_submodule(parent).modules()
                if isinstance(each, nn.Linear)
            )
            units = groups if squares else linear.in_features
            found.append(Reader(linear, units, parameters // units, squares))
    return found


@contextlib.contextmanager
def watched(readers: Sequence[Reader]) -> Iterator[list[Moments]]:
    """While active, the inputs of all readers are counted."""
    moments = [Moments(reader.linear.in_features) for reader in readers]
    handles = [
        reader.linear.register_forward_pre_hook(lambda _linear, args, to=to: to.add(args[0]))
        for reader, to in zip(readers, moments, strict=True)
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def unit_scores(reader: Reader, variance_I: Tensor) -> Tensor:
    """Standardised scores of the units of a reader, (U,) float64."""
    score_I = variance_I * reader.linear.weight.detach().double().cpu().square().sum(0)
    if reader.squares:
        score_I = score_I.square()
    score_I = (score_I - score_I.mean()) / score_I.std()
    return score_I.reshape(reader.units, -1).mean(1)


def choose(
    readers: Sequence[Reader], scores: Sequence[Tensor], parameters: int, size: float
) -> tuple[list[Tensor], float]:
    """The units that go, so that the parameters that stay come nearest to a share of all.

    Args:
        readers: all readers.
        scores: of the units of each, (U,).
        parameters: those in all blocks.
        size: the share of them that should stay.

    Returns:
        For each reader a mask of the units that go, (U,), and the share that stays. The biases that
        come are counted.
    """
    owner = [number for number, each in enumerate(scores) for _ in range(len(each))]
    unit = [place for each in scores for place in range(len(each))]
    left, reached = parameters, [1.0]
    order = torch.cat(list(scores)).sort(stable=True).indices.tolist()
    with_bias = {number for number, each in enumerate(readers) if each.linear.bias is not None}
    for place in order:
        reader = readers[owner[place]]
        left -= reader.cost
        if owner[place] not in with_bias:
            with_bias.add(owner[place])
            left += reader.linear.out_features
        reached.append(left / parameters)
    count = min(range(len(reached)), key=lambda gone: abs(reached[gone] - size))
    masks = [torch.zeros(len(each), dtype=torch.bool) for each in scores]
    for place in order[:count]:
        masks[owner[place]][unit[place]] = True
    return masks, reached[count]


def remove(reader: Reader, gone_U: Tensor, mean_I: Tensor) -> None:
    """Zero the columns of some units, and add their mean output to the bias."""
    linear = reader.linear
    gone_I = gone_U.repeat_interleave(linear.in_features // reader.units)
    bias_O = linear.weight.double().cpu() @ (mean_I * gone_I)
    if linear.bias is not None:
        bias_O += linear.bias.double().cpu()
    linear.weight[:, gone_I.to(linear.weight.device)] = 0
    linear.bias = nn.Parameter(bias_O.to(linear.weight), requires_grad=False)


@torch.no_grad()
def flap(model: Any, ids: Tensor, size: float) -> float:
    """Prune a model in place.

    Args:
        model: a loaded causal language model of a family such as Llama, Mistral or Qwen 2.
        ids: calibration windows (windows, tokens).
        size: the share of the parameters in blocks that should stay.

    Returns:
        The share that stays, with the biases that came.
    """
    readers = find_readers(model)
    with watched(readers) as moments:
        for window in ids.split(1):
            model(window.to(model.device), use_cache=False, logits_to_keep=1)
    parameters = sum(p.numel() for block in find_block_list(model)[1] for p in block.parameters())
    scores = [unit_scores(r, m.variance_I) for r, m in zip(readers, moments, strict=True)]
    masks, reached = choose(readers, scores, parameters, size)
    for reader, gone_U, found in zip(readers, masks, moments, strict=True):
        if gone_U.any():
            remove(reader, gone_U, found.mean_I)
    return reached
