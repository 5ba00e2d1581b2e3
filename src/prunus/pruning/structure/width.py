"""Which channels and heads of a block go, and what makes up for them.

A block is measured twice. First the windows run to the linear that reads the heads (`o`), whose
heads are chosen and whose remaining columns are fitted. Then they run to the one that reads the
channels of the MLP (`down`), behind the smaller attention. Both are chosen on the hidden states of
the smaller model.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunus.methods.statistics import InputStatistics, StatisticsSpec
from prunus.methods.structured.channels import (
    Kept,
    fit_columns,
    keep_units,
    relative_error,
    with_bias,
)
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.pruning.block.hooks import input_hooks, tokens_of
from prunus.pruning.structure.plan import StructureJob
from prunus.pruning.structure.record import PartChange, WidthChange
from prunus.pruning.structure.width_plan import BlockWidth, HeadPlan, WidthPlan

__all__ = ["narrow"]


def narrow(
    job: StructureJob,
    plan: WidthPlan,
    stream: Stream,
    place: int,
    index: int,
    stored: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], WidthChange]:
    """Make one block narrower.

    Args:
        job: the checked run.
        plan: how many channels and heads stay.
        stream: the windows of the smaller model, before its block `place`. They stay there.
        place: position of the block in the smaller model.
        index: its position in the old model.
        stored: its tensors, by relative name.

    Returns:
        The tensors of the narrow block, and what went.
    """
    old, layout = job.skeleton, plan.blocks[index]
    block = old.fill(index, stored, stream.device)
    linears = {linear.name: linear for linear in old.linears(index)}
    tensors, change = dict(stored), WidthChange()
    if plan.heads is not None and layout.heads is not None:
        reader = linears[layout.heads.reader]
        gram_II, weight_OI = _measured(stream, place, block, reader)
        kept = _keep_heads(weight_OI, gram_II, plan.heads, job, layout, stored)
        change.heads = _fit(job, reader, tensors, weight_OI, gram_II, kept)
    if plan.channels is not None and layout.channels is not None:
        reader = linears[layout.channels.reader]
        gram_II, weight_OI = _measured(stream, place, block, reader)
        before, after = plan.channels
        kept = keep_units(
            weight_OI,
            gram_II,
            before,
            1,
            after,
            job.recipe.width_rule,
            written_U=_written(layout.channels.axes, layout.channels.reader, stored, before, 1),
        )
        change.channels = _fit(job, reader, tensors, weight_OI, gram_II, kept)
    old.release(index)
    return _cut(plan, layout, tensors, change), change


def _measured(
    stream: Stream, place: int, block: nn.Module, reader: Linear
) -> tuple[Tensor, Tensor]:
    """The Gram matrix of a linear's inputs and its weight, each with the bias as a last column."""
    statistics = InputStatistics(
        reader.shape[1], StatisticsSpec(needs="gram", means=True), stream.device
    )
    forward = stream.forward(place, block)
    with input_hooks([reader], lambda _linear, x: statistics.add(tokens_of(x))):
        for batch in range(len(stream)):
            forward(batch)
    statistics.check_finite(reader.name)
    gram_II, sum_I = statistics.gram_II, statistics.sum_I
    assert gram_II is not None
    assert sum_I is not None
    bias = reader.module.bias
    bias_O = bias.detach().to("cpu", torch.float32, copy=True) if isinstance(bias, Tensor) else None
    weight_OI, gram_II = with_bias(
        reader.weight_OI.to("cpu", torch.float32, copy=True),
        bias_O,
        gram_II.cpu(),
        sum_I.cpu(),
        statistics.tokens,
    )
    return gram_II, weight_OI


def _keep_heads(
    weight_OI: Tensor,
    gram_II: Tensor,
    plan: HeadPlan,
    job: StructureJob,
    layout: BlockWidth,
    stored: Mapping[str, Tensor],
) -> Kept:
    """The query heads that stay: whole key-value groups go first, then heads inside groups."""
    assert layout.heads is not None
    rule, size = job.recipe.width_rule, plan.size
    per_group = plan.heads // plan.groups
    written_U = _written(layout.heads.axes, layout.heads.reader, stored, plan.heads, size)
    groups = keep_units(
        weight_OI,
        gram_II,
        plan.groups,
        per_group * size,
        plan.keep_groups,
        rule,
        written_U=None if written_U is None else written_U.reshape(plan.groups, -1).sum(1),
    )
    if plan.keep_heads == plan.keep_groups * per_group:
        heads = [group * per_group + i for group in groups.units for i in range(per_group)]
        return Kept(heads, groups.columns)
    # What is left is scored anew, behind the least-squares fit to it.
    extra = list(range(plan.heads * size, len(gram_II)))
    inside = torch.tensor(groups.columns + extra)
    fitted_OI = fit_columns(weight_OI, gram_II, inside.tolist())
    left = keep_units(
        fitted_OI[:, inside],
        gram_II[inside][:, inside],
        len(groups.units) * per_group,
        size,
        plan.keep_heads,
        rule,
        groups=plan.keep_groups,
        written_U=None
        if written_U is None
        else written_U.reshape(plan.groups, -1)[groups.units].flatten(),
    )
    heads = [groups.units[u // per_group] * per_group + u % per_group for u in left.units]
    return Kept(heads, [groups.columns[column] for column in left.columns])


def _written(
    axes: Mapping[str, int], reader: str, stored: Mapping[str, Tensor], units: int, width: int
) -> Tensor | None:
    """Σ w² over the weights that write each unit, (U,); None if none has a row per column."""
    found = None
    for name, axis in axes.items():
        tensor = stored[name].float().square()
        if name.startswith(f"{reader}.") or tensor.shape[axis] != units * width:
            continue
        rows = tensor.movedim(axis, 0).reshape(units, -1).sum(1)
        found = rows if found is None else found + rows
    return found


def _fit(
    job: StructureJob,
    reader: Linear,
    tensors: dict[str, Tensor],
    weight_OI: Tensor,
    gram_II: Tensor,
    kept: Kept,
) -> PartChange:
    """Fit the columns of a reader that stay, in the block and in its tensors."""
    inputs = reader.shape[1]
    every = [*kept.columns, *range(inputs, weight_OI.shape[1])]
    plain_OI = torch.zeros_like(weight_OI)
    plain_OI[:, every] = weight_OI[:, every]
    fits = job.recipe.width_update == "least-squares"
    fitted_OI = fit_columns(weight_OI, gram_II, every) if fits else plain_OI
    new = {f"{reader.name}.weight": fitted_OI[:, :inputs]}
    if reader.transposed:
        new = {name: weight.T for name, weight in new.items()}
    if weight_OI.shape[1] > inputs:
        new[f"{reader.name}.bias"] = fitted_OI[:, -1]
    for name, tensor in new.items():
        tensors[name] = tensor.to(tensors[name].dtype).contiguous()
    reader.assign(fitted_OI[:, :inputs].to(reader.parameter.device))
    if weight_OI.shape[1] > inputs:
        bias = reader.module.bias
        assert isinstance(bias, Tensor)
        bias.copy_(fitted_OI[:, -1])
    return PartChange(
        kept=kept.units,
        error=relative_error(weight_OI, fitted_OI, gram_II),
        error_before_fit=relative_error(weight_OI, plain_OI, gram_II),
    )


def _cut(
    plan: WidthPlan, layout: BlockWidth, tensors: Mapping[str, Tensor], change: WidthChange
) -> dict[str, Tensor]:
    """The tensors with what went cut off."""
    found = dict(tensors)
    if change.channels is not None and layout.channels is not None:
        for name, axis in layout.channels.axes.items():
            found[name] = _take(found[name], axis, change.channels.kept, 1)
    if change.heads is not None and layout.heads is not None and plan.heads is not None:
        heads = plan.heads
        per_group = heads.heads // heads.groups
        groups = sorted({head // per_group for head in change.heads.kept})
        for name, axis in layout.heads.axes.items():
            units, kept = heads.heads, change.heads.kept
            if name in layout.of_groups:
                units, kept = heads.groups, groups
            found[name] = _take(found[name], axis, kept, found[name].shape[axis] // units)
    return found


def _take(tensor: Tensor, axis: int, units: Sequence[int], width: int) -> Tensor:
    """The units of an axis, each of `width` entries."""
    index = torch.tensor([unit * width + i for unit in units for i in range(width)])
    return tensor.index_select(axis, index)
