"""A look at the dense model before a run: what its linears are given, and what pruning one layer does to its outputs.

One block in memory at a time, as in the run itself. A layer is a block's linears together, or one linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.methods.patterns import Pattern, keep_mask
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.pruning.block.hooks import input_hooks

__all__ = [
    "PROBE_STEPS",
    "PROBE_TOKENS",
    "PROBE_WINDOWS",
    "Layer",
    "layer_scores",
    "layers_of",
    "sensitivity_curves",
]

#: A search tries every layer on so many tokens of as many windows, as one batch: other texts tell more than longer ones.
PROBE_WINDOWS, PROBE_TOKENS = 4, 128
#: Where it measures their curves, against the sparsity asked for; between them errors grow exponentially.
PROBE_STEPS = (-0.15, 0.0, 0.15)


@dataclass(frozen=True)
class Layer:
    """Linears of one block, by relative names, that get one sparsity."""

    block: int
    linears: tuple[str, ...]


def layers_of(selected: Sequence[Sequence[str]], by: str) -> list[Layer]:
    """What gets a sparsity of its own, by "block" or by "linear"; `selected` are the relative names per block."""
    if by == "block":
        return [Layer(index, tuple(names)) for index, names in enumerate(selected) if names]
    return [Layer(index, (name,)) for index, names in enumerate(selected) for name in names]


@dataclass
class _Probe:
    """A layer pruned to a sparsity, and the hidden states of all batches since."""

    layer: int
    sparsity: float
    states: list[Tensor] = field(default_factory=list)


def layer_scores(
    stream: Stream, layers: Sequence[Layer], measure: Callable[[list[Tensor]], float]
) -> list[float]:
    """Per layer what `measure` makes of the Wanda scores (O, I) of its linears, all on the dense model's inputs.

    `stream` stands before the first block and ends behind the last.
    """
    found = [0.0] * len(layers)
    for index in range(len(stream.skeleton)):
        with _dense_pass(stream, index) as (linears, norms):
            for at, layer in enumerate(layers):
                if layer.block == index:
                    weights = [linears[name].weight_OI.float() for name in layer.linears]
                    found[at] = measure(
                        [
                            wanda_score(w, norms[n])
                            for n, w in zip(layer.linears, weights, strict=True)
                        ]
                    )
    return found


def sensitivity_curves(
    stream: Stream, layers: Sequence[Layer], sparsities: Sequence[float]
) -> list[list[tuple[float, float]]]:
    """Per layer a curve (sparsity, error): what pruning this layer alone, by Wanda, does to the last block's outputs.

    The error is the mean over tokens of ‖change‖² / ‖dense output‖². All trials go through the model together: a block
    that is read once serves the trials of all layers before it.

    Args:
        stream: before the first block; it ends behind the last.
        layers: in the order of their blocks.
        sparsities: rising, over 0; every curve begins with (0, 0).
    """
    trials: list[_Probe] = []
    states = stream.states
    for index in range(len(stream.skeleton)):
        before = [states.get(batch) for batch in range(len(stream))]
        with _dense_pass(stream, index) as (linears, norms):
            run = stream.call(index)
            for trial in trials:
                trial.states = [run(hidden) for hidden in trial.states]
            for at, layer in enumerate(layers):
                if layer.block != index:
                    continue
                trained = {name: linears[name].weight_OI.clone() for name in layer.linears}
                for sparsity in sparsities:
                    for name, weight_OI in trained.items():
                        score_OI = wanda_score(weight_OI.float(), norms[name])
                        linears[name].assign(weight_OI * keep_mask(score_OI, Pattern(), sparsity))
                    trials.append(_Probe(at, sparsity, [run(hidden) for hidden in before]))
                for name, weight_OI in trained.items():
                    linears[name].assign(weight_OI)
    curves: list[list[tuple[float, float]]] = [[(0.0, 0.0)] for _ in layers]
    dense = [states.get(batch).float() for batch in range(len(stream))]
    for trial in trials:
        shares = [
            (changed.float() - kept).square().sum(dim=-1) / kept.square().sum(dim=-1)
            for changed, kept in zip(trial.states, dense, strict=True)
        ]
        curves[trial.layer].append(
            (trial.sparsity, float(torch.cat([s.flatten() for s in shares]).mean()))
        )
    return curves


@contextlib.contextmanager
def _dense_pass(
    stream: Stream, index: int
) -> Iterator[tuple[Mapping[str, Linear], Mapping[str, InputStatistics]]]:
    """Block `index` with its weights, after one pass: its linears and their inputs' norms by relative name."""
    skeleton = stream.skeleton
    block = skeleton.fill(index, stream.source.block(index), stream.device)
    linears = {linear.name: linear for linear in skeleton.linears(index)}
    norms = {
        name: InputStatistics(linear.shape[1], "norms", stream.device)
        for name, linear in linears.items()
    }

    def see(linear: Linear, x: Tensor) -> None:
        norms[linear.name].add(x.reshape(-1, x.shape[-1]))

    forward = stream.forward(index, block)
    with input_hooks(list(linears.values()), see):
        outputs = [forward(batch) for batch in range(len(stream))]
    for name, statistics in norms.items():
        statistics.check_finite(f"{skeleton.block_name(index)}.{name}")
    yield linears, norms
    for batch, output in enumerate(outputs):
        stream.states.put(batch, output)
    skeleton.release(index)
