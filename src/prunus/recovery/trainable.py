"""What a mode trains: the model, the trained parameters, and which of their weights stay zero.

A weight counts as pruned if it is exactly zero and belongs to a pruned linear. `prunus.json`, or
the record of an earlier recovery, names the pruned linears. In a checkpoint from elsewhere these
are the linears with at least 5 % zeros, unless rounding to few bits can have made them. Zeros in
all other places are ordinary weights: biases, for example, often begin as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.model.kinds import CAUSAL
from prunus.model.linears import Linear, find_block_list, find_linears
from prunus.model.vocabulary_weights import VocabularyWeights
from prunus.pruning.manifest import Manifest
from prunus.recovery.recovery_record import LinearMask, RecoveryRecord

#: Fraction of zeros from which a linear counts as pruned if no record names the pruned linears.
MIN_ZERO_FRACTION = 0.05
# Consecutive weights that have one scale in formats of few bits, or fewer than have one.
_BLOCK = 16


@dataclass(frozen=True)
class Trainable:
    """A model that is ready to be trained."""

    #: The model in memory, a causal LM of transformers or the peft model around it.
    model: Any
    #: What is trained, float32, by names that are also those in a checkpoint.
    parameters: dict[str, nn.Parameter]
    #: Full name -> pruned linear, in mode masked. Its zeros stay zero.
    pruned: Mapping[str, Linear] = field(default_factory=dict)
    #: Name of a parameter -> bool of its shape, False where it must stay zero.
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    #: Root mean square of the weights that are not pruned, if these are trained; else 1. The
    #: default learning rate is relative to it.
    weight_rms: float = 1.0

    @property
    def trained(self) -> int:
        """How many numbers are trained. Pruned weights are not."""
        zeros = sum(m.numel() - int(torch.count_nonzero(m)) for m in self.masks.values())
        return sum(p.numel() for p in self.parameters.values()) - zeros


def whole_model(
    model: Any, linears: Mapping[str, Linear], pruned: Mapping[str, Linear]
) -> Trainable:
    """Modes masked and full: train all parameters of a float32 model except its pruned weights.

    Gradients of pruned weights are set to zero before the optimizer sees them. Their moments then
    stay zero. So a step of Adam (0 / (√0 + ε)) and weight decay (0 · λ) leave an exact zero in
    place. Gradient clipping sees only the gradients of what is trained.

    Args:
        model: A causal LM in float32, with fused experts split.
        linears: Full name -> linear, whose kept weights set the default learning rate.
        pruned: Full name -> pruned linear; empty in mode full.
    """
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    masks = {f"{name}.weight": linear.parameter != 0 for name, linear in pruned.items()}
    return Trainable(model, parameters, pruned, masks, weight_rms=kept_rms(linears))


def kept_rms(linears: Mapping[str, Linear]) -> float:
    """The root mean square of all weights of these linears that are not zero; 1 if all are zero.

    >>> linear = nn.Linear(2, 1)
    >>> _ = linear.weight.data.copy_(torch.tensor([[3.0, 0.0]]))
    >>> kept_rms({"down_proj": Linear("down_proj", linear)})
    3.0
    """
    squares, count = 0.0, 0
    for linear in linears.values():
        # Sum in float64: float32 sums of this many squares lose digits.
        weight = linear.parameter.detach()
        squares += float(weight.float().square().sum(dtype=torch.float64))
        count += int(torch.count_nonzero(linear.parameter))
    return math.sqrt(squares / count) if squares else 1.0


def block_linears(model: nn.Module) -> dict[str, Linear]:
    """All linears in the blocks of a model by full name.

    Raises:
        NotImplementedError: The model is not a stack of blocks.
    """
    path, blocks = find_block_list(model)
    return {
        f"{path}.{i}.{x.name}": x for i, block in enumerate(blocks) for x in find_linears(block)
    }


def pruned_linears(model: nn.Module, folder: Path) -> dict[str, Linear]:
    """The pruned linears of a model in memory, by full name. Its fused experts must be split.

    Args:
        model: The model that was loaded.
        folder: The checkpoint, whose records name the pruned linears.

    Raises:
        ValueError: A record is damaged.
        NotImplementedError: The model is not a stack of blocks.
    """
    linears = block_linears(model)
    head = VocabularyWeights(model, CAUSAL).own_head
    heads = {head.name: head} if head is not None else {}
    linears |= heads
    if (recorded := _recorded_linears(folder, {*heads})) is not None:
        return {name: x for name, x in linears.items() if name in recorded}
    return {name: x for name, x in linears.items() if is_pruned(x.weight_OI)}


def is_pruned(weight_OI: torch.Tensor) -> bool:
    """Whether the zeros of a weight without a record are those of a mask.

    They are at least 5 %, and more than what rounding to few bits leaves. Rounded weights have the
    value 0 in one step of their scale, and those next to 0 in two: Q4_0, MXFP4, GPTQ, AWQ and NVFP4
    of SmolLM2-135M have 8 to 14 % zeros, and twice as many of the smallest size in a block that is
    not 0. Of ordinary weights that is one in each block (6.3 %). So a mask of a tenth is seen in
    ordinary weights, and one of a fifth in weights that were then rounded to Q4_0. Formats of two
    bits can leave more zeros than all else (GPTQ: 60 %), and count as pruned.

    >>> weight = torch.arange(1.0, 33)
    >>> is_pruned(weight), is_pruned(weight.where(weight > 16, 0.0))
    (False, True)
    >>> is_pruned((weight / 10).round() - 1)  # -1, 0, 1 and 2
    False
    """
    size_BK = weight_OI.detach().abs().flatten().unfold(0, _BLOCK, _BLOCK)
    least_B1 = size_BK.where(size_BK > 0, torch.inf).amin(1, keepdim=True)
    zeros, smallest = int((size_BK == 0).sum()), int((size_BK == least_B1).sum())
    return zeros >= max(1, MIN_ZERO_FRACTION * size_BK.numel()) and zeros > smallest


def _recorded_linears(folder: Path, heads: set[str]) -> set[str] | None:
    """Full names of the pruned linears by the records in a folder; None if there is no record.

    `prunus.json` says that the output head was pruned, but not its name, so `heads` gives it.
    """
    if (folder / RecoveryRecord.FILE).exists():
        return set(RecoveryRecord.load(folder).linears)
    if not (folder / Manifest.FILE).exists():
        return None
    manifest = Manifest.load(folder)
    linears = {f"{block.name}.{linear}" for block in manifest.blocks for linear in block.linears}
    return linears | (heads if manifest.head is not None else set())


def check_zeros(
    name: str, shape: tuple[int, int], before: torch.Tensor, after: torch.Tensor
) -> LinearMask:
    """Check, weight by weight, that every zero of a linear is still zero.

    Args:
        name: Full name of the linear, for the message.
        shape: Its shape, (outputs, inputs).
        before: The weight as it was stored.
        after: The weight as it will be stored, in the same orientation.

    Raises:
        RuntimeError: A pruned weight is not zero any more. Training never does that, so the result
            is worthless.

    >>> before = torch.tensor([[0.0, 1.0, 2.0]])
    >>> check_zeros("up_proj", (1, 3), before, 2 * before)
    LinearMask(shape=(1, 3), zeros_before=1, zeros_after=1)
    """
    pruned = before == 0
    grown = int(torch.count_nonzero(after[pruned]))
    if grown:
        raise RuntimeError(
            f"{name}: {grown} pruned weights are not zero after training; nothing was written"
        )
    zeros_after = after.numel() - int(torch.count_nonzero(after))
    return LinearMask(shape=shape, zeros_before=int(pruned.sum()), zeros_after=zeros_after)
