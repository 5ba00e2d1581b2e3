"""The sparsity of every linear of a run, measured on a few windows before the run.

`prunus.methods.allocation` holds the formulas. This file feeds them with the layers of a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prunus.methods.allocation import allocate_by_error, round_to_whole_weights
from prunus.methods.patterns import Pattern, keep_mask
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score
from prunus.model.kinds import CAUSAL
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.pruning.block.hooks import input_hooks
from prunus.pruning.job import PruningJob
from prunus.pruning.reconstruction.output_loss import kl_divergence, logits_of

# A search never prunes one layer alone beyond this sparsity.
_MAX_PROBE = 0.95
# Interpolated curves have a point per this much sparsity.
_CURVE_STEP = 0.005


def allocate(job: PruningJob, ids: torch.Tensor | None) -> dict[str, float]:
    """The sparsity of every linear that is pruned: full name -> sparsity.

    Their mean over all weights is the recipe's sparsity. Every linear removes whole weights per
    row, so the mean may fall short by less than one column of one linear.

    Args:
        ids: Calibration windows (windows, tokens), of which a few are used. They may be None where
            nothing is measured.

    Returns:
        The sparsities; empty for "uniform".
    """
    recipe = job.recipe
    if not recipe.searches:
        return {}
    layers = layers_of(job.selected, recipe.allocation_by)
    shapes = [_shapes(job, layer) for layer in layers]
    weights = [sum(rows * columns for rows, columns in group) for group in shapes]
    by_layer = [0.0] * len(layers)
    if recipe.sparsity > 0:
        assert ids is not None, "a search needs calibration windows"
        by_layer = _measured(job, ids, layers, weights)
    names = [name for layer in layers for name in _full_names(job, layer)]
    by_linear = [value for value, group in zip(by_layer, shapes, strict=True) for _ in group]
    flat_shapes = [shape for group in shapes for shape in group]
    rounded = round_to_whole_weights(by_linear, flat_shapes, recipe.sparsity)
    return dict(zip(names, rounded, strict=True))


def _measured(
    job: PruningJob, ids: torch.Tensor, layers: list[Layer], weights: list[int]
) -> list[float]:
    """The sparsity of every layer, from a pass through the dense model."""
    sparsity = job.recipe.sparsity
    stream = Stream(job.skeleton, job.hashed_source, job.device)
    with torch.no_grad(), contextlib.closing(stream):
        windows = ids[:PROBE_WINDOWS, :PROBE_TOKENS]
        probes = len(layers) * len(PROBE_STEPS)
        _check_room(job, probes * len(windows), windows.shape[1])
        stream.embed([windows], None)
        steps = [round(sparsity + step, 6) for step in PROBE_STEPS]
        points = [point for point in steps if 0 < point < _MAX_PROBE]
        curves = sensitivity_curves(stream, layers, points)
        found = allocate_by_error([_interpolated(c) for c in curves], weights, sparsity)
        return _best_part(job, ids, layers, found)


def _best_part(
    job: PruningJob, ids: torch.Tensor, layers: list[Layer], found: list[float]
) -> list[float]:
    """The part of the way from a uniform sparsity to the search's that harms the model least.

    The search prunes one layer at a time and adds up the errors of the hidden states. In some
    models that sum says little about the outputs of a model in which all layers are pruned. So
    whole models are pruned here, on windows that the search has not seen, and compared with the
    dense one.
    """
    sparsity = job.recipe.sparsity
    candidates = [[(1 - part) * sparsity + part * x for x in found] for part in PROBE_PARTS]
    unseen = ids[PROBE_WINDOWS : 2 * PROBE_WINDOWS, :PROBE_TOKENS]
    windows = unseen if len(unseen) else ids[:PROBE_WINDOWS, :PROBE_TOKENS]
    stream = Stream(job.skeleton, job.source, job.device)
    with contextlib.closing(stream):
        stream.embed([windows], None)
        errors = output_errors(stream, pruned_models(stream, layers, candidates))
    best = min(range(len(PROBE_PARTS)), key=errors.__getitem__)
    job.options.tell(
        f"allocation: {PROBE_PARTS[best]:.0%} of the search's differences, by whole models on "
        f"{len(windows)} windows"
    )
    return candidates[best]


def _interpolated(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The curve with a point per `_CURVE_STEP`, on an exponential between two measured points.

    The greedy search moves from point to point. On measured points alone it could only choose among
    the few sparsities that were measured.

    >>> [point.sparsity for point in _interpolated([CurvePoint(0.0, 0.0), CurvePoint(0.01, 0.2)])]
    [0.0, 0.005, 0.01]
    """
    points = list(curve[:1])
    for (left, low), (right, high) in pairwise(curve):
        steps = max(1, round((right - left) / _CURVE_STEP))
        for step in range(1, steps):
            share = step / steps
            # No exponential starts at an error of 0: there the curve is a straight line.
            exponential = low > 0 and high > 0
            error = low * (high / low) ** share if exponential else low + share * (high - low)
            points.append(CurvePoint(left + share * (right - left), error))
        points.append(CurvePoint(right, high))
    return points


def _check_room(job: PruningJob, windows: int, seqlen: int) -> None:
    """Check that the hidden states of all probes fit in memory."""
    tokens, hidden = job.skeleton.window_shape(0, seqlen)
    needed = windows * tokens * hidden * job.dtype.itemsize
    if needed > job.budget:
        raise ValueError(
            f"the probes of allocation 'search' hold {needed / 1e9:.1f} GB of hidden states at the "
            f"end, and the memory budget is {job.budget / 1e9:.1f} GB: raise memory, "
            "choose allocation 'uniform', or leave allocation_by at 'block'"
        )


def _shapes(job: PruningJob, layer: Layer) -> list[tuple[int, int]]:
    shapes = {linear.name: linear.shape for linear in job.skeleton.linears(layer.block)}
    return [shapes[name] for name in layer.linears]


def _full_names(job: PruningJob, layer: Layer) -> list[str]:
    return [f"{job.skeleton.block_name(layer.block)}.{name}" for name in layer.linears]


#: A search runs every probe on this many windows, cut to this many tokens, as one batch. More
#: windows improve the measurement further than longer windows do.
PROBE_WINDOWS, PROBE_TOKENS = 4, 128
#: A search measures errors at these distances from the recipe's sparsity. Between two such points
#: errors grow exponentially, so few points are enough.
PROBE_STEPS = (-0.15, 0.0, 0.15)
#: Parts of the way from a uniform allocation to the search's. Whole models decide which is taken.
PROBE_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)


class CurvePoint(NamedTuple):
    """One point of an error curve.

    Attributes:
        error: Mean over tokens of ‖change‖² / ‖dense output‖², at the outputs of the last block.
    """

    sparsity: float
    error: float


@dataclass(frozen=True)
class Layer:
    """Linears that get one common sparsity."""

    block: int
    linears: tuple[str, ...]


def layers_of(selected: Sequence[Sequence[str]], by: str) -> list[Layer]:
    """The layers of a model, in the order of its blocks.

    >>> layers_of([["q", "k"], ["q"]], by="linear")[1:]
    [Layer(block=0, linears=('k',)), Layer(block=1, linears=('q',))]
    """
    if by == "block":
        return [Layer(index, tuple(names)) for index, names in enumerate(selected) if names]
    return [Layer(index, (name,)) for index, names in enumerate(selected) for name in names]


def sensitivity_curves(
    stream: Stream, layers: Sequence[Layer], sparsities: Sequence[float]
) -> list[list[CurvePoint]]:
    """One error curve per layer: what pruning this layer alone does to the last block's outputs.

    A probe is one layer pruned by Wanda to one sparsity, in an otherwise dense model. All probes go
    through the model together, so each block is read once for the probes of all layers before it.

    Args:
        stream: The dense model's windows, before the first block. They end after the last one.
        sparsities: Rising and above 0. Every curve also begins with the point (0, 0).
    """
    probes: list[_Probe] = []
    states = stream.states
    for index in range(len(stream.skeleton)):
        inputs = [states.get(batch) for batch in range(len(stream))]
        with _dense_pass(stream, index) as dense:
            run = stream.call(index)
            # Probes of earlier blocks pass this block while it is dense.
            for probe in probes:
                probe.states = [run(hidden) for hidden in probe.states]
            # The layers of this block start probes of their own, from the dense inputs.
            for position, layer in enumerate(layers):
                if layer.block != index:
                    continue
                trained = {name: dense.linears[name].weight_OI.clone() for name in layer.linears}
                for sparsity in sparsities:
                    for name, weight_OI in trained.items():
                        keep_OI = keep_mask(dense.score(name, weight_OI), Pattern(), sparsity)
                        dense.linears[name].assign(weight_OI * keep_OI)
                    outputs = [run(hidden) for hidden in inputs]
                    probes.append(_Probe(position, sparsity, outputs))
                for name, weight_OI in trained.items():
                    dense.linears[name].assign(weight_OI)
    curves = [[CurvePoint(0.0, 0.0)] for _ in layers]
    dense_outputs = [states.get(batch).float() for batch in range(len(stream))]
    for probe in probes:
        error = _relative_change(probe.states, dense_outputs)
        curves[probe.layer].append(CurvePoint(probe.sparsity, error))
    return curves


def pruned_models(
    stream: Stream, layers: Sequence[Layer], candidates: Sequence[Sequence[float]]
) -> list[Tensor]:
    """The last block's outputs when all layers are pruned at once, for each of some allocations.

    Wanda prunes, with the norms of the dense model's inputs, as in `sensitivity_curves`.
    """
    outputs = [stream.states.get(0) for _ in candidates]
    for index in range(len(stream.skeleton)):
        with _dense_pass(stream, index) as dense:
            run = stream.call(index)
            trained = {name: linear.weight_OI.clone() for name, linear in dense.linears.items()}
            for number, sparsities in enumerate(candidates):
                for layer, sparsity in zip(layers, sparsities, strict=True):
                    for name in layer.linears if layer.block == index else ():
                        score = dense.score(name, trained[name])
                        keep_OI = keep_mask(score, Pattern(), sparsity)
                        dense.linears[name].assign(trained[name] * keep_OI)
                outputs[number] = run(outputs[number])
            for name, weight_OI in trained.items():
                dense.linears[name].assign(weight_OI)
    return outputs


def output_errors(stream: Stream, outputs: Sequence[Tensor]) -> list[float]:
    """How far a model's outputs move when its last block returns other hidden states.

    Returns:
        Per entry of `outputs` the mean KL divergence of the next token's distribution from the
        dense model's, in nats; for models without logits per token, the relative change of the
        hidden states.
    """
    skeleton, dense = stream.skeleton, stream.states.get(0)
    if skeleton.kind is not CAUSAL:
        return [_relative_change([output], [dense]) for output in outputs]

    with logits_of(stream) as logits:
        loss = kl_divergence(logits)
        # One window at a time: the logits of a large vocabulary take much memory.
        pairs = [
            [loss(x, y) for x, y in zip(output.split(1), dense.split(1), strict=True)]
            for output in outputs
        ]
    return [float(sum(a for a, _ in sums) / sum(n for _, n in sums)) for sums in pairs]


@dataclass
class _Probe:
    """A layer pruned to a sparsity, and the hidden states of all batches after it."""

    layer: int
    sparsity: float
    states: list[Tensor] = field(default_factory=list)


def _relative_change(changed: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """Mean over tokens of ‖changed − dense‖² / ‖dense‖²."""
    shares = [
        (after.float() - before).square().sum(dim=-1) / before.square().sum(dim=-1)
        for after, before in zip(changed, dense, strict=True)
    ]
    return float(torch.cat([share.flatten() for share in shares]).mean())


@dataclass(frozen=True)
class _DenseBlock:
    """A dense block in memory; both mappings are by relative name."""

    linears: Mapping[str, Linear]
    norms: Mapping[str, InputStatistics]

    def score(self, name: str, weight_OI: Tensor) -> Tensor:
        """Wanda's score (O, I) of `weight_OI` in the place of a linear's weight."""
        return wanda_score(weight_OI.float(), self.norms[name])


@contextlib.contextmanager
def _dense_pass(stream: Stream, index: int) -> Iterator[_DenseBlock]:
    """Block `index` with its weights, after one pass of all windows; it is released at the end.

    Inside the `with` the stream's hidden states are still the block's inputs.
    """
    skeleton = stream.skeleton
    block = skeleton.fill(index, stream.source.block(index), stream.device)
    linears = {linear.name: linear for linear in skeleton.linears(index)}
    norms = {
        name: InputStatistics(linear.shape[1], "norms", stream.device)
        for name, linear in linears.items()
    }

    def accumulate(linear: Linear, x: Tensor) -> None:
        norms[linear.name].add(x.reshape(-1, x.shape[-1]))

    forward = stream.forward(index, block)
    with input_hooks(list(linears.values()), accumulate):
        outputs = [forward(batch) for batch in range(len(stream))]
    for name, statistics in norms.items():
        statistics.check_finite(f"{skeleton.block_name(index)}.{name}")
    yield _DenseBlock(linears, norms)
    for batch, output in enumerate(outputs):
        stream.states.put(batch, output)
    skeleton.release(index)
