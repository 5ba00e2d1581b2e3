"""How to choose the channels and heads to remove, and how the others compensate for them.

A block is measured twice. First the windows run to the linear that reads the heads (`o`), whose
heads are chosen and whose remaining columns are fitted. Then they run to the one that reads the
channels of the MLP (`down`), after the smaller attention. In a mixture of experts these are all
experts at once, each on the tokens that chose it. Both are chosen on the hidden states of the
smaller model.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.distributed import Ranks
from prunus.methods.solvers.least_squares import ridge
from prunus.methods.statistics import InputStatistics, StatisticsSpec
from prunus.methods.structured.channels import (
    Kept,
    fit_columns,
    keep_units,
    output_power,
    with_bias,
)
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.pruning.block.hooks import input_hooks, tokens_of
from prunus.structure.plan import StructureJob
from prunus.structure.record import PartChange, WidthChange
from prunus.structure.spans import KeptUnits
from prunus.structure.width_layout import PartLayout
from prunus.structure.width_plan import HeadPlan, WidthPlan

__all__ = ["narrow"]


@dataclass(frozen=True)
class _Measured:
    """What is known of a linear that reads channels or heads.

    Attributes:
        weight_OI: float32; with a bias as its last column.
        gram_II: float32, XᵀX of its inputs; with the input 1 of a bias.
        damping: λ of the least squares.
    """

    weight_OI: Tensor
    gram_II: Tensor
    damping: float


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
        stored: its tensors at full width, by relative name; experts that go are gone.

    Returns:
        The tensors of the narrow block, and what went.
    """
    full, layout = job.full_width, plan.blocks[index]
    block = full.fill(index, stored, stream.device)
    linears = {linear.name: linear for linear in full.linears(index)}
    tensors, change = dict(stored), WidthChange()
    cuts: list[tuple[PartLayout, KeptUnits]] = []
    if plan.heads is not None and layout.heads is not None:
        reader = linears[layout.heads.reader]
        (measured,) = _measured(stream, place, block, [reader], job.ranks)
        kept = _keep_heads(measured, plan.heads, layout.heads.read.width)
        change.heads = _fit(reader, tensors, measured, kept)
        per_group = plan.heads.heads // plan.heads.groups
        groups = sorted({head // per_group for head in kept.units})
        cuts.append((layout.heads, {"heads": kept.units, "groups": groups}))
    for parts in _at_once(layout.channels, job.budget):
        readers = [linears[part.reader] for part in parts]
        found = _measured(stream, place, block, readers, job.ranks)
        for part, reader, measured in zip(parts, readers, found, strict=True):
            kept = keep_units(
                measured.weight_OI,
                measured.gram_II,
                part.read.units,
                1,
                part.keep,
                measured.damping,
            )
            change.mlps[part.reader] = _fit(reader, tensors, measured, kept)
            cuts.append((part, {"channels": kept.units}))
    full.release(index)
    for part, units in cuts:
        for name, cut in part.cuts.items():
            tensors[name] = cut.take(tensors[name], units)
    if len(change.mlps) == 1:
        change.channels = change.mlps.popitem()[1]
    return tensors, change


def _at_once(parts: Sequence[PartLayout], budget: int) -> Iterator[list[PartLayout]]:
    """Parts whose Gram matrices fit in a quarter of the memory budget together, or single ones."""
    taken: list[PartLayout] = []
    used = 0
    for part in parts:
        needed = 4 * part.read.units**2
        if taken and used + needed > budget // 4:
            yield taken
            taken, used = [], 0
        taken.append(part)
        used += needed
    if taken:
        yield taken


def _measured(
    stream: Stream, place: int, block: nn.Module, readers: Sequence[Linear], ranks: Ranks
) -> list[_Measured]:
    """Measure the inputs of some linears.

    The inputs of a routed expert are those of the tokens that chose it.
    """
    spec = StatisticsSpec(needs="gram", means=True, distributed=ranks.size > 1)
    statistics = {
        reader.name: InputStatistics(reader.shape[1], spec, stream.device) for reader in readers
    }
    forward = stream.forward(place, block)
    with input_hooks(readers, lambda linear, x: statistics[linear.name].add(tokens_of(x))):
        for batch in range(len(stream)):
            forward(batch)
    for each in statistics.values():
        each.complete(ranks)
    return [_with_bias(reader, statistics.pop(reader.name)) for reader in readers]


def _with_bias(reader: Linear, statistics: InputStatistics) -> _Measured:
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
    return _Measured(weight_OI, gram_II, ridge(statistics.in_features, statistics.tokens))


def _keep_heads(measured: _Measured, plan: HeadPlan, size: int) -> Kept:
    """The query heads that stay: whole key-value groups go first, then heads inside groups.

    Args:
        size: the inputs per head.
    """
    weight_OI, gram_II, damping = measured.weight_OI, measured.gram_II, measured.damping
    per_group = plan.heads // plan.groups
    groups = keep_units(
        weight_OI, gram_II, plan.groups, per_group * size, plan.keep_groups, damping
    )
    if plan.keep_heads == plan.keep_groups * per_group:
        heads = [group * per_group + i for group in groups.units for i in range(per_group)]
        return Kept(heads, groups.columns)
    # What is left is scored anew, after the least-squares fit to it.
    extra = list(range(plan.heads * size, len(gram_II)))
    inside = torch.tensor(groups.columns + extra)
    fitted_OI = fit_columns(weight_OI, gram_II, inside.tolist(), damping)
    left = keep_units(
        fitted_OI[:, inside],
        gram_II[inside][:, inside],
        len(groups.units) * per_group,
        size,
        plan.keep_heads,
        damping,
        groups=plan.keep_groups,
    )
    heads = [groups.units[u // per_group] * per_group + u % per_group for u in left.units]
    return Kept(heads, [groups.columns[column] for column in left.columns])


def _fit(reader: Linear, tensors: dict[str, Tensor], measured: _Measured, kept: Kept) -> PartChange:
    """Fit the columns of a reader that stay, in the block and in its tensors."""
    weight_OI, gram_II = measured.weight_OI, measured.gram_II
    inputs = reader.shape[1]
    every = [*kept.columns, *range(inputs, weight_OI.shape[1])]
    plain_OI = torch.zeros_like(weight_OI)
    plain_OI[:, every] = weight_OI[:, every]
    fitted_OI = fit_columns(weight_OI, gram_II, every, measured.damping)
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
    whole = output_power(weight_OI, gram_II)

    def error(changed_OI: Tensor) -> float:
        return output_power(weight_OI - changed_OI, gram_II) / whole if whole > 0 else 0.0

    return PartChange(kept=kept.units, error=error(fitted_OI), error_before_fit=error(plain_OI))
