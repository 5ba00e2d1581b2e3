"""Which weights of a checkpoint were pruned, and whether they still are.

A weight counts as pruned where it is exactly zero and belongs to a pruned linear: one that `prunus.json` (or the
record of an earlier recovery) names, or, in a checkpoint of other origin, one with a share of at least `LEAST`
zeros. Zeros anywhere else are ordinary weights: biases often begin as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from prunus.model.block_lists import find_block_list
from prunus.model.experts import fused_experts
from prunus.model.linears import Linear, find_linears
from prunus.pruning.manifest import MANIFEST_NAME, Manifest
from prunus.recovery.record import RECORD_NAME, LinearMask, RecoveryRecord

__all__ = [
    "LEAST",
    "block_linears",
    "head_name",
    "is_pruned",
    "kept_size",
    "mask_of",
    "pruned_linears",
    "recorded_linears",
    "verify",
]

#: Share of zeros from which a linear counts as pruned where nothing is recorded.
LEAST = 0.05


def head_name(model: nn.Module) -> str | None:
    """Full name of the output head, where it is a linear of its own and not the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.weight is embedding.weight:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def recorded_linears(folder: Path, head: str | None = None) -> set[str] | None:
    """Full names of the pruned linears of a checkpoint folder as prunus recorded them; None where it did not.

    `head` is the name of the model's output head, which `prunus.json` does not name where it was pruned.

    Raises:
        ValueError: the record is damaged.
    """
    if (folder / RECORD_NAME).exists():
        return set(RecoveryRecord.load(folder).linears)
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.load(folder)
    names = {f"{block.name}.{linear}" for block in manifest.blocks for linear in block.linears}
    return names | ({head} if manifest.head is not None and head is not None else set())


def is_pruned(name: str, weight: torch.Tensor, recorded: Collection[str] | None) -> bool:
    """Whether the linear `name` with this weight counts as pruned."""
    if recorded is not None:
        return name in recorded
    return float((weight == 0).float().mean()) >= LEAST


def block_linears(model: nn.Module) -> dict[str, Linear]:
    """All linears in the blocks of a model, by full name.

    Raises:
        NotImplementedError: the model is not a stack of blocks.
    """
    path, blocks = find_block_list(model)
    return {
        f"{path}.{i}.{x.name}": x for i, block in enumerate(blocks) for x in find_linears(block)
    }


def kept_size(linears: Mapping[str, Linear]) -> float:
    """The root mean square of all weights of these linears that are not zero; 1 where there are none."""
    squares, kept = 0.0, 0
    for linear in linears.values():
        weight = linear.parameter.detach()
        squares += float(weight.float().square().sum(dtype=torch.float64))
        kept += int(torch.count_nonzero(mask_of(linear.parameter)))
    return math.sqrt(squares / kept) if squares else 1.0


def pruned_linears(model: nn.Module, folder: Path) -> dict[str, Linear]:
    """The pruned linears of a model that was loaded from `folder`, by full name.

    Raises:
        ValueError: there are none.
        NotImplementedError: the model is not a stack of blocks, or holds fused experts.
    """
    linears = block_linears(model)
    name = head_name(model)
    if name is not None:
        linears[name] = Linear(name, model.get_submodule(name))
    recorded = recorded_linears(folder, name)
    if fused := fused_experts(model):
        raise NotImplementedError(
            f"{folder} is a mixture of experts whose matrices are fused in memory ({fused[0]}), where training would "
            "fill their zeros; prunus recover --mode block trains them one by one and keeps the zeros"
        )
    found = {name: x for name, x in linears.items() if is_pruned(name, x.weight_OI, recorded)}
    if not found:
        raise ValueError(
            f"{folder} has no pruned linears: no {MANIFEST_NAME} names any, and none has {LEAST:.0%} zeros; "
            "prune it first (prunus prune)"
        )
    return found


def mask_of(weight: torch.Tensor) -> torch.Tensor:
    """True where a weight was kept, bool of its shape."""
    return weight != 0


def verify(
    name: str, shape: tuple[int, int], before: torch.Tensor, after: torch.Tensor
) -> LinearMask:
    """Compare a linear weight by weight.

    Args:
        name: for the message.
        shape: (out, in).
        before, after: the weight as it was stored and as it will be, in one orientation.

    Raises:
        RuntimeError: a weight that was zero is not any more, which no training may do; the result is worth nothing.
    """
    zero = before == 0
    grown = int(torch.count_nonzero(after[zero]))
    if grown:
        raise RuntimeError(
            f"{name}: {grown} pruned weights are not zero after training; nothing was written"
        )
    count = after.numel() - int(torch.count_nonzero(after))
    return LinearMask(shape=shape, zeros_before=int(zero.sum()), zeros_after=count)
