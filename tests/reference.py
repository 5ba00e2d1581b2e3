"""Slow, obvious versions of what prunus does fast, to compare with. Nothing in here is imported by prunus.

One weight at a time and in Python floats where that is bearable; whole models with plain forward hooks, every window
on its own, every linear's inputs kept in full.

Shape suffixes: O outputs (rows), I inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunus.patterns import Pattern

# From a linear's full name, its weight (out, in) and its inputs (tokens, in), one tensor a window, to the new weight.
PruneLinear = Callable[[str, Tensor, list[Tensor]], Tensor]


def competitors(shape: tuple[int, int], pattern: Pattern) -> list[list[tuple[int, int]]]:
    """The groups of places (row, column) that compete with each other, in the order of their indices."""
    rows, columns = range(shape[0]), range(shape[1])
    if pattern.m is not None:
        starts = range(0, shape[1], pattern.m)
        return [[(i, j) for j in range(start, start + pattern.m)] for i in rows for start in starts]
    if pattern.group == "column":
        return [[(i, j) for i in rows] for j in columns]
    size = {"row": 1, "layer": shape[0]}.get(pattern.group) or int(pattern.group)
    return [[(i, j) for i in rows[at : at + size] for j in columns] for at in range(0, shape[0], size)]


def keep_mask(score_OI: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """Sort every group of competitors, drop from the lowest score on."""
    keep_OI = torch.ones(score_OI.shape, dtype=torch.bool)
    for places in competitors(tuple(score_OI.shape), pattern):
        drop = int(len(places) * sparsity) if pattern.n is None else pattern.m - pattern.n
        for i, j in sorted(places, key=lambda place: score_OI[place].item())[:drop]:
            keep_OI[i, j] = False
    return keep_OI


def keep_above_threshold(score_OI: Tensor, sparsity: float) -> Tensor:
    """Drop the k lowest scores, the next one, and all equal to it; but only the k lowest if that costs over 1 %."""
    drop = int(score_OI.numel() * sparsity)
    threshold = sorted(score_OI.flatten().tolist())[drop]
    keep_OI = torch.tensor([[score > threshold for score in row] for row in score_OI.tolist()])
    if (~keep_OI).sum() - drop > 0.01 * score_OI.numel():
        return keep_mask(score_OI, Pattern(group="layer"), sparsity)
    return keep_OI


def block_keep(score_OB: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask of a block of columns, as SparseGPT draws it."""
    if pattern == Pattern(group="layer"):
        return keep_above_threshold(score_OB, sparsity)
    return keep_mask(score_OB, pattern, sparsity)


def wanda_score(weight_OI: Tensor, X_TI: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂, float64."""
    score_OI = torch.zeros(weight_OI.shape, dtype=torch.float64)
    for i in range(weight_OI.shape[0]):
        for j in range(weight_OI.shape[1]):
            norm = sum(x.item() ** 2 for x in X_TI[:, j]) ** 0.5
            score_OI[i, j] = abs(weight_OI[i, j].item()) * norm
    return score_OI


def variant_keep(score_OI: Tensor, alpha: float) -> Tensor:
    """Row by row, drop the lowest scores while what is dropped sums to at most `alpha` of the row."""
    keep_OI = torch.ones(score_OI.shape, dtype=torch.bool)
    for i, row in enumerate(score_OI.tolist()):
        dropped = 0.0
        for j in sorted(range(len(row)), key=row.__getitem__):
            dropped += row[j]
            if dropped > alpha * sum(row):
                break
            keep_OI[i, j] = False
    return keep_OI


def obs_sweep(
    weight_OI: Tensor,
    gram_II: Tensor,
    damping: float,
    span: int,
    choose: Callable[[Tensor, Tensor, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Prune column by column in float64, each time with the inverse Hessian of the columns that are left.

    `choose(weight (O, B), cost (B,), start)` says every `span` columns which weights stay; to remove a weight w of
    column b costs w² / cost_b.
    """
    weight_OI, hessian_II = weight_OI.double().clone(), gram_II.double().clone()
    dead_I = hessian_II.diagonal() == 0
    weight_OI[:, dead_I] = 0
    mean = hessian_II.diagonal().mean()
    hessian_II += (damping * mean) * torch.eye(len(hessian_II))
    hessian_II[dead_I, dead_I] += mean
    keep_OI = torch.ones(weight_OI.shape, dtype=torch.bool)
    columns = weight_OI.shape[1]
    for j in range(columns):
        if j % span == 0:
            block = range(j, min(j + span, columns))
            cost_B = torch.stack([torch.linalg.inv(hessian_II[k:, k:])[0, 0] for k in block])
            keep_OI[:, j : block.stop] = choose(weight_OI[:, j : block.stop], cost_B, j)
        inverse = torch.linalg.inv(hessian_II[j:, j:])
        for i in range(weight_OI.shape[0]):
            if not keep_OI[i, j]:
                weight_OI[i, j:] -= weight_OI[i, j] / inverse[0, 0] * inverse[0]
                weight_OI[i, j] = 0
    return weight_OI, keep_OI


def sparsegpt(
    weight_OI: Tensor,
    gram_II: Tensor,
    pattern: Pattern,
    sparsity: float,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """SparseGPT in float64: weight and mask."""

    def choose(weight_OB: Tensor, cost_B: Tensor, start: int) -> Tensor:
        return block_keep(weight_OB**2 / cost_B, pattern, sparsity)

    return obs_sweep(weight_OI, gram_II, damping, pattern.m or block, choose)


def linears(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """All linears below a module by full name, with GPT-2's Conv1D among them."""
    return {f"{prefix}.{n}": m for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as (out, in), a view; Conv1D stores it the other way round."""
    return linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data


def collect_inputs(
    inputs: dict[str, list[Tensor]], name: str, module: nn.Module, args: tuple[Tensor, ...]
) -> None:
    """Keep a copy of what reaches a linear, as (tokens, in)."""
    inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())


@torch.no_grad()
def prune_two_pass(model: nn.Module, blocks: str, windows: Tensor, prune_linear: PruneLinear) -> None:
    """Prune a model in place as the original code does: two passes per block.

    First the dense block runs on all windows and the inputs of all its linears are collected; then all of them are
    pruned; what the next block sees comes from the pruned one.

    Args:
        model: a loaded transformers model, evaluated in its own dtype.
        blocks: name of the list of blocks, "model.layers".
        windows: (windows, tokens) token ids.
    """
    for number, block in enumerate(model.get_submodule(blocks)):
        inputs: dict[str, list[Tensor]] = {}
        handles = [
            linear.register_forward_pre_hook(partial(collect_inputs, inputs, name))
            for name, linear in linears(block, f"{blocks}.{number}").items()
        ]
        for window in windows:
            model(input_ids=window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, linear in linears(block, f"{blocks}.{number}").items():
            if name in inputs:
                weight_of(linear).copy_(prune_linear(name, weight_of(linear).clone(), inputs[name]))
