"""The choice of the channels and heads of a block, and the fit of the columns that read them.

A block is measured twice. First the windows run to the linear that reads the heads (`o`), whose
heads are chosen and whose remaining columns are fitted. Then they run to the one that reads the
channels of the MLP (`down`), after the smaller attention. In a mixture of experts these are all
experts at once, each on the tokens that chose it. Both are measured on the hidden states of the
smaller model.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from prunus.distributed import Ranks
from prunus.methods.solvers.least_squares import ridge
from prunus.methods.statistics import InputStatistics, StatisticsSpec
from prunus.methods.structured import Kept, Reader
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.pruning.block.hooks import input_hooks, tokens_of
from prunus.structure.plan import StructureJob
from prunus.structure.record import PartChange, WidthChange
from prunus.structure.spans import KeptUnits
from prunus.structure.width_layout import PartLayout
from prunus.structure.width_plan import HeadPlan, WidthPlan


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
        stream: the windows of the smaller model, before its block `place`. They do not move.
        stored: its tensors at full width, by relative name, with only the experts that stay.

    Returns:
        The tensors of the narrow block, and what was removed.
    """
    full, layout = job.full_width, plan.blocks[index]
    block = full.fill(index, stored, stream.device)
    linears = {linear.name: linear for linear in full.linears(index)}
    tensors, change = dict(stored), WidthChange()
    cuts: list[tuple[PartLayout, KeptUnits]] = []
    if plan.heads is not None and layout.heads is not None:
        linear = linears[layout.heads.reader]
        (reader,) = _measured(stream, place, block, [linear], job.ranks)
        kept = _keep_heads(reader, plan.heads, layout.heads.read.width)
        change.heads = _fit(linear, tensors, reader, kept)
        per_group = plan.heads.heads // plan.heads.groups
        groups = sorted({head // per_group for head in kept.units})
        cuts.append((layout.heads, {"heads": kept.units, "groups": groups}))
    for parts in _at_once(layout.channels, job.budget):
        found = [linears[part.reader] for part in parts]
        readers = _measured(stream, place, block, found, job.ranks)
        for part, linear, reader in zip(parts, found, readers, strict=True):
            kept = reader.keep(part.read.units, 1, part.keep)
            change.mlps[part.reader] = _fit(linear, tensors, reader, kept)
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
    stream: Stream, place: int, block: nn.Module, linears: Sequence[Linear], ranks: Ranks
) -> list[Reader]:
    """Measure the inputs of some linears; those of an expert are the tokens that chose it."""
    spec = StatisticsSpec(needs="gram", means=True, distributed=ranks.size > 1)
    statistics = {
        linear.name: InputStatistics(linear.shape[1], spec, stream.device) for linear in linears
    }
    forward = stream.forward(place, block)
    with input_hooks(linears, lambda linear, x: statistics[linear.name].add(tokens_of(x))):
        for batch in range(len(stream)):
            forward(batch)
    for each in statistics.values():
        each.complete(ranks)
    return [_reader(linear, statistics.pop(linear.name)) for linear in linears]


def _reader(linear: Linear, statistics: InputStatistics) -> Reader:
    statistics.check_finite(linear.name)
    gram_II, sum_I, tokens = statistics.gram_II, statistics.sum_I, statistics.tokens
    assert gram_II is not None
    assert sum_I is not None
    weight_OI = linear.weight_OI.to("cpu", torch.float32, copy=True)
    reader = Reader(weight_OI, gram_II.cpu(), ridge(statistics.in_features, tokens))
    bias = linear.module.bias
    if not isinstance(bias, Tensor):
        return reader
    bias_O = bias.detach().to("cpu", torch.float32, copy=True)
    return reader.with_bias(bias_O, sum_I.cpu(), tokens)


def _keep_heads(reader: Reader, plan: HeadPlan, size: int) -> Kept:
    """The query heads that stay: first remove whole key-value groups, then heads inside groups.

    Args:
        size: the inputs per head.
    """
    per_group = plan.heads // plan.groups
    groups = reader.keep(plan.groups, per_group * size, plan.keep_groups)
    if plan.keep_heads == plan.keep_groups * per_group:
        heads = [group * per_group + i for group in groups.units for i in range(per_group)]
        return Kept(heads, groups.columns)
    # The rest is scored anew, after the least-squares fit to it.
    bias = range(plan.heads * size, len(reader.gram_II))
    rest = reader.only([*groups.columns, *bias])
    left = rest.keep(len(groups.units) * per_group, size, plan.keep_heads, plan.keep_groups)
    heads = [groups.units[u // per_group] * per_group + u % per_group for u in left.units]
    return Kept(heads, [groups.columns[column] for column in left.columns])


def _fit(linear: Linear, tensors: dict[str, Tensor], reader: Reader, kept: Kept) -> PartChange:
    """Fit the columns of a linear that stay, in the block and in its tensors."""
    weight_OI, inputs = reader.weight_OI, linear.shape[1]
    columns = [*kept.columns, *range(inputs, weight_OI.shape[1])]
    fitted_OI, plain_OI = reader.fit(columns), torch.zeros_like(weight_OI)
    plain_OI[:, columns] = weight_OI[:, columns]
    new_OI = fitted_OI[:, :inputs]
    new = {f"{linear.name}.weight": new_OI.T if linear.transposed else new_OI}
    linear.assign(new_OI.to(linear.parameter.device))
    if isinstance(bias := linear.module.bias, Tensor):
        new[f"{linear.name}.bias"] = fitted_OI[:, -1]
        bias.copy_(fitted_OI[:, -1])
    for name, tensor in new.items():
        tensors[name] = tensor.to(tensors[name].dtype).contiguous()
    errors = {"error": reader.error(fitted_OI), "error_before_fit": reader.error(plain_OI)}
    return PartChange(kept=kept.units, **errors)
