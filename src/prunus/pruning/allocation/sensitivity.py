"""How sensitive each layer of the dense model is to pruning, measured before a run.

The error curve of a layer is measured with one block in memory at a time, like the run itself. A
layer is all linears of a block, or one linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from prunus.methods.patterns import Pattern, keep_mask
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score
from prunus.model.kinds import CAUSAL
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.pruning.block.hooks import input_hooks
from prunus.pruning.reconstruction.kl_loss import kl_divergence

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
        sparsity: Share of the layer's weights that are removed.
        error: Mean over tokens of ‖change‖² / ‖dense output‖², at the outputs of the last block.
    """

    sparsity: float
    error: float


@dataclass(frozen=True)
class Layer:
    """Linears that get one common sparsity.

    Attributes:
        block: Position of their block.
        linears: Their names relative to the block.
    """

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
    """The last block's outputs when all layers are pruned at once, for some allocations.

    Wanda prunes, with the norms of the dense model's inputs, as in `sensitivity_curves`.

    Returns:
        Per candidate the outputs (windows, tokens, hidden).
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

    Args:
        outputs: Hidden states (windows, tokens, hidden) in their place.

    Returns:
        Per entry of `outputs` the mean KL divergence of the next token's distribution from the
        dense model's, in nats; for models without logits per token, the relative change of the
        hidden states.
    """
    skeleton, dense = stream.skeleton, stream.states.get(0)
    if skeleton.kind is not CAUSAL:
        return [_relative_change([output], [dense]) for output in outputs]

    def logits(hidden: Tensor) -> Tensor:
        # The head needs no token ids, only their shape.
        ids = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        return skeleton.logits(ids, hidden.to(skeleton.dtype))

    loss = kl_divergence(logits)
    with skeleton.outside_blocks(
        stream.source.read_outside, stream.device, with_head=True, with_embedding=False
    ):
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
    """A dense block in memory; both mappings are by relative name.

    Attributes:
        linears: All its linears.
        norms: The norms of their inputs.
    """

    linears: Mapping[str, Linear]
    norms: Mapping[str, InputStatistics]

    def score(self, name: str, weight_OI: Tensor) -> Tensor:
        """Wanda's score (O, I) of `weight_OI` in the place of a linear's weight."""
        return wanda_score(weight_OI.float(), self.norms[name])


@contextlib.contextmanager
def _dense_pass(stream: Stream, index: int) -> Iterator[_DenseBlock]:
    """Block `index` with its weights, after one pass of all windows; it is released at the end.

    Inside the `with` the stream's hidden states are still the block's inputs.

    Raises:
        ValueError: The inputs of a linear are not finite; names it.
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
