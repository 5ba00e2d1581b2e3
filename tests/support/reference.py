"""Slow and obvious versions of what prunus does fast, for comparison. prunus imports nothing of it.

Methods handle one weight at a time, in Python floats where that is fast enough. Whole models run
with plain forward hooks, one window at a time, and keep all inputs of all linears.

Shape suffixes: O outputs (rows), I inputs, T tokens, B columns of a block.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunus.methods.patterns import Pattern
from stopping import StopError

# From a linear's full name, its weight (out, in) and its inputs (tokens, in), one tensor per
# window, to the new weight.
PruneLinear = Callable[[str, Tensor, list[Tensor]], Tensor]


def competitors(shape: tuple[int, int], pattern: Pattern) -> list[list[tuple[int, int]]]:
    """The groups of competing places (row, column), in the order of their indices."""
    rows, columns = range(shape[0]), range(shape[1])
    if pattern.m is not None:
        starts = range(0, shape[1], pattern.m)
        return [[(i, j) for j in range(start, start + pattern.m)] for i in rows for start in starts]
    if pattern.group == "column":
        return [[(i, j) for i in rows] for j in columns]
    sizes = {"row": 1, "layer": shape[0], "block": shape[0], "block-row": 1}
    size = sizes.get(pattern.group) or int(pattern.group)
    width = pattern.block_size if "block" in str(pattern.group) else shape[1]
    return [
        [(i, j) for i in rows[at : at + size] for j in columns[start : start + width]]
        for at in range(0, shape[0], size)
        for start in range(0, shape[1], width)
    ]


def keep_mask(score_OI: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """Sort every group of competitors and drop the lowest scores."""
    keep, scores = [[True] * score_OI.shape[1] for _ in score_OI], score_OI.tolist()
    for places in competitors(tuple(score_OI.shape), pattern):
        drop = int(len(places) * sparsity) if pattern.n is None else pattern.m - pattern.n
        for i, j in sorted(places, key=lambda place: scores[place[0]][place[1]])[:drop]:
            keep[i][j] = False
    return torch.tensor(keep)


def keep_above_threshold(score_OI: Tensor, sparsity: float) -> Tensor:
    """Drop the k lowest scores, the next one, and all that equal it.

    If that drops more than 1 % of the matrix beyond k, drop exactly the k lowest.
    """
    drop = int(score_OI.numel() * sparsity)
    threshold = sorted(score_OI.flatten().tolist())[drop]
    keep_OI = torch.tensor([[score > threshold for score in row] for row in score_OI.tolist()])
    if (~keep_OI).sum() - drop > 0.01 * score_OI.numel():
        return keep_mask(score_OI, Pattern(group="layer"), sparsity)
    return keep_OI


def magnitude_keep(score_OI: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask by magnitude: one threshold for the whole matrix, as in the original code."""
    if pattern == Pattern(group="layer"):
        return keep_above_threshold(score_OI, sparsity)
    return keep_mask(score_OI, pattern, sparsity)


def block_keep(score_OB: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask of a block of columns, as SparseGPT chooses it."""
    if pattern.n is None and pattern.group == "block":
        return keep_above_threshold(score_OB, sparsity)
    return keep_mask(score_OB, pattern, sparsity)


def wanda_score(weight_OI: Tensor, X_TI: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂, float64."""
    norms = [sum(x**2 for x in inputs) ** 0.5 for inputs in X_TI.T.tolist()]
    scores = [
        [abs(w) * norm for w, norm in zip(row, norms, strict=True)] for row in weight_OI.tolist()
    ]
    return torch.tensor(scores, dtype=torch.float64)


def variant_keep(score_OI: Tensor, alpha: float) -> Tensor:
    """Drop the lowest scores of each row while their sum is at most `alpha` times the row's sum."""
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
    """Prune column by column in float64, with a new inverse Hessian of the remaining columns.

    `choose(weight (O, B), cost (B,), start)` says for every `span` columns which weights stay. The
    error of removing a weight w of column b is w² / cost_b.
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
    def choose(weight_OB: Tensor, cost_B: Tensor, start: int) -> Tensor:
        return block_keep(weight_OB**2 / cost_B, pattern, sparsity)

    return obs_sweep(weight_OI, gram_II, damping, pattern.m or block, choose)


def original_sparsegpt(
    weight_OI: Tensor, inputs: Sequence[Tensor], n: int = 0, m: int = 0, sparsity: float = 0.5
) -> Tensor:
    """SparseGPT in float32, with the operations of the original code in their order.

    The result on one machine is the mask of the original code on that machine. Another processor
    sums a product in another order, and then another mask follows from the weights.

    Args:
        weight_OI: The trained weights.
        inputs: The inputs of the linear, one matrix (tokens, I) for each window.
        n: How many of every `m` consecutive inputs of a row become 0; `m` is 0 for none.
        m: As for `n`.
        sparsity: The share of each block of columns that becomes 0, if `m` is 0.
    """
    weight_OI, columns = weight_OI.float().clone(), weight_OI.shape[1]
    hessian_II = torch.zeros(columns, columns)
    for seen, X_TI in enumerate(inputs):
        hessian_II *= seen / (seen + 1)
        scaled_IT = math.sqrt(2 / (seen + 1)) * X_TI.float().t()
        hessian_II += scaled_IT.matmul(scaled_IT.t())
    dead_I = torch.diag(hessian_II) == 0
    hessian_II[dead_I, dead_I] = 1
    weight_OI[:, dead_I] = 0
    all_I = torch.arange(columns)
    hessian_II[all_I, all_I] += 0.01 * torch.mean(torch.diag(hessian_II))
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    for start in range(0, columns, 128):
        block = slice(start, min(start + 128, columns))
        weight_OB, factor_BB = weight_OI[:, block].clone(), factor_II[block, block]
        cost_1B = torch.diag(factor_BB).reshape(1, -1) ** 2
        errors_OB, drop_OB = torch.zeros_like(weight_OB), torch.zeros_like(weight_OB).bool()
        if m == 0:
            score_OB = weight_OB**2 / cost_1B
            sorted_scores = torch.sort(score_OB.flatten()).values
            drop_OB = score_OB <= sorted_scores[int(score_OB.numel() * sparsity)]
        for j in range(weight_OB.shape[1]):
            if m and j % m == 0:
                group = slice(j, j + m)
                score_OM = (
                    weight_OB[:, group] ** 2 / torch.diag(factor_BB)[group].reshape(1, -1) ** 2
                )
                drop_OB.scatter_(1, j + torch.topk(score_OM, n, dim=1, largest=False).indices, True)
            kept_O = weight_OB[:, j].masked_fill(drop_OB[:, j], 0)
            error_O = (weight_OB[:, j] - kept_O) / factor_BB[j, j]
            weight_OB[:, j:] -= error_O.unsqueeze(1).matmul(factor_BB[j, j:].unsqueeze(0))
            errors_OB[:, j] = error_O
            weight_OI[:, start + j] = kept_O
        weight_OI[:, block.stop :] -= errors_OB.matmul(factor_II[block, block.stop :])
    return weight_OI


def linears(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """All linears below a module by full name, including GPT-2's Conv1D."""
    return {
        f"{prefix}.{n}": m for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)
    }


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as (out, in), a view; Conv1D stores it transposed."""
    return linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data


def end_the_run(*_: object) -> None:
    """A hook of the last module of a model whose output matters."""
    raise StopError


def collect_inputs(
    inputs: dict[str, list[Tensor]], name: str, module: nn.Module, args: tuple[Tensor, ...]
) -> None:
    inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())


@torch.no_grad()
def prune_two_pass(
    model: nn.Module, blocks: str, windows: Tensor, change_linear: PruneLinear
) -> None:
    """Prune a model in place as the original code does: two passes per block.

    First the dense block runs on all windows, and the inputs of all its linears are collected. Then
    all linears are pruned. The inputs of the next block come from the pruned block.

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
        handles.append(block.register_forward_hook(end_the_run))
        for window in windows:
            with contextlib.suppress(StopError):
                model(input_ids=window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, linear in linears(block, f"{blocks}.{number}").items():
            if name in inputs:
                weight_of(linear).copy_(
                    change_linear(name, weight_of(linear).clone(), inputs[name])
                )


@torch.no_grad()
def prune_as_called(
    todo: list[nn.Module],
    parts: Sequence[Tensor],
    run: Callable[[Tensor], object],
    prune: Callable[[Tensor, Tensor], None],
    block_of: dict[nn.Module, int] | None = None,
) -> None:
    """Prune linears in place in the order in which the model calls them.

    Each run of the model ends at the first linear that is left, because nothing after it counts.

    Args:
        todo: the linears; the list is empty at the end.
        parts: the inputs of the model, one after another.
        run: runs the model on one of them.
        prune: changes a weight (out, in) in place, given its inputs (tokens, in).
        block_of: the number of each linear's block. A linear whose weight the model reads without
            calling it is pruned at the end of its block, as if all its inputs were equal.
    """
    while todo:
        firsts: list[tuple[nn.Module, Tensor]] = []

        def end_at_the_first(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            firsts.append((module, args[0].clone()))  # noqa: B023
            raise StopError

        handles = [linear.register_forward_pre_hook(end_at_the_first) for linear in todo]
        for part in parts:
            with contextlib.suppress(StopError):
                run(part)
        for handle in handles:
            handle.remove()
        linear = firsts[0][0] if firsts else todo[0]
        assert all(first[0] is linear for first in firsts)
        if block_of and block_of[todo[0]] < block_of[linear]:
            linear, firsts = todo[0], []
        X_TI = torch.ones(1, weight_of(linear).shape[1])
        if firsts:
            X_TI = torch.cat([x.reshape(-1, x.shape[-1]) for _, x in firsts])
        prune(weight_of(linear), X_TI)
        todo.remove(linear)


def prune_rows(weight_OI: Tensor, X_TI: Tensor, sparsity: float = 0.5) -> None:
    """Wanda in place: every row loses the weights with its lowest scores."""
    score_OI = weight_OI.abs() * X_TI.double().square().sum(0).sqrt().float()
    for weight_I, score_I in zip(weight_OI, score_OI, strict=True):
        weight_I[score_I.sort(stable=True).indices[: int(len(score_I) * sparsity)]] = 0


def wanda_by_whole_runs(model: nn.Module, ids: Tensor) -> None:
    """Prune the blocks of a text model in place, 50 %, with a run of all for every linear."""
    head = model.get_output_embeddings()
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    block_of = {m: number for number, block in enumerate(blocks) for m in block.modules()}
    todo = [m for m in blocks.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    model.config.use_cache = False
    prune_as_called(todo, ids.split(2), lambda ids: model(input_ids=ids), prune_rows, block_of)


def assert_three_ways_agree(
    streamed: nn.Module, in_place: nn.Module, naive: nn.Module, differ: float = 0.0
) -> None:
    """Check that two models have the same weights, and a third up to a share that differs."""
    same, near = in_place.state_dict(), naive.state_dict()
    assert streamed.state_dict().keys() == same.keys()
    for name, tensor in streamed.state_dict().items():
        assert torch.equal(tensor, same[name]), name
        assert float((tensor != near[name]).float().mean()) <= differ, name


def ria_score(weight_OI: Tensor, X_TI: Tensor, power: float) -> Tensor:
    """(|W_ij| / sum of its column + |W_ij| / sum of its row) · ‖X_j‖^power, float64."""
    magnitude_OI = weight_OI.double().abs()
    score_OI = torch.zeros_like(magnitude_OI)
    for i in range(weight_OI.shape[0]):
        for j in range(weight_OI.shape[1]):
            share = (
                magnitude_OI[i, j] / magnitude_OI[:, j].sum()
                + magnitude_OI[i, j] / magnitude_OI[i].sum()
            )
            score_OI[i, j] = share * X_TI[:, j].double().norm() ** power
    return score_OI


def scaled(weight_OI: Tensor, gram_II: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, Gram matrix and norms for inputs scaled to norm 1, with a ridge, in float64."""
    norms_I = gram_II.double().diagonal().sqrt()
    norms_I = torch.where(norms_I == 0, torch.ones_like(norms_I), norms_I)
    hessian_II = gram_II.double() / norms_I / norms_I[:, None]
    hessian_II.fill_diagonal_(1 + ridge)
    return weight_OI.double() * norms_I, hessian_II, norms_I


def squared_error(change_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Per row c·H·cᵀ, float64 (O,)."""
    change_OI, hessian_II = change_OI.double(), hessian_II.double()
    return torch.stack([row @ hessian_II @ row for row in change_OI])


def least_squares(weight_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, ridge: float) -> Tensor:
    """The best weights for a mask: the normal equations of every row on its mask, in float64."""
    target_OI, hessian_II, norms_I = scaled(weight_OI, gram_II, ridge)
    result_OI = torch.zeros_like(target_OI)
    for i, keep_I in enumerate(keep_OI):
        if keep_I.any():
            right = (hessian_II @ target_OI[i])[keep_I]
            result_OI[i, keep_I] = torch.linalg.solve(hessian_II[keep_I][:, keep_I], right)
    return result_OI / norms_I


def alps(
    weight_OI: Tensor,
    gram_II: Tensor,
    pattern: Pattern,
    sparsity: float,
    ridge: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """ADMM with its three matrices, as in the formulas, then exact least squares.

    Every third of four iterations keeps the mask of the one before. Over-relaxation is 1.2. Returns
    weight and mask; everything is float64.
    """
    target_OI, hessian_II, _ = scaled(weight_OI, gram_II, ridge)
    target_OI[:, gram_II.diagonal() == 0] = 0
    dense_OI, dual_OI, penalty = target_OI.clone(), torch.zeros_like(target_OI), 0.25
    eye_II = torch.eye(len(hessian_II), dtype=torch.float64)
    first_II, last_II = (end * torch.linalg.inv(hessian_II + end * eye_II) for end in (0.25, 1.6))
    for iteration in range(iterations):
        quarter = int(4 * iteration / iterations)
        if iteration % 4 != 2:
            keep_OI = keep_mask((dense_OI + dual_OI).abs(), pattern, sparsity)
        sparse_OI = (dense_OI + dual_OI) * keep_OI
        dual_OI = dual_OI + dense_OI - sparse_OI
        before, penalty = penalty, (0.25, 0.4, 0.8, 1.6)[quarter]
        dual_OI = dual_OI * before / penalty
        # Mix both ends so that an eigenvalue that equals the penalty is mapped to a half.
        at_first, at_last = 0.25 / (penalty + 0.25), 1.6 / (penalty + 1.6)
        share = (0.5 - at_last) / (at_first - at_last)
        resolvent_II = share * first_II + (1 - share) * last_II
        solved_OI = target_OI + (sparse_OI - dual_OI - target_OI) @ resolvent_II
        dense_OI = 1.2 * solved_OI - 0.2 * sparse_OI
    keep_OI = keep_mask((dense_OI + dual_OI).abs(), pattern, sparsity)
    weight_OI = weight_OI.masked_fill(gram_II.diagonal() == 0, 0)
    return least_squares(weight_OI, keep_OI, gram_II, ridge), keep_OI


def dense_target(
    weight_OI: Tensor, X_TI: Tensor, dense_TI: Tensor, dense_weight: float, ridge: float
) -> Tensor:
    """Least squares on stacked rows: the mixed outputs, and below them the ridge; float64."""
    weight, X, dense = weight_OI.double(), X_TI.double(), dense_TI.double()
    scale = X.square().sum(dim=0).sqrt()
    below = torch.diag(scale) * ridge**0.5
    inputs = torch.cat([X, below])
    outputs = torch.cat(
        [(dense_weight * dense + (1 - dense_weight) * X) @ weight.T, below @ weight.T]
    )
    return torch.linalg.lstsq(inputs, outputs).solution.T
