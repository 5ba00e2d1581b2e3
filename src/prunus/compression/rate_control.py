"""Spends the bits of a compressed checkpoint on its linears, so that they add up to what was asked.

One step Δ for the whole model lowers the loss most for the bits: in units of its sensitivity (see
`loss_sensitivity.py`), every linear then gains equally from one more bit. Which Δ meets the bits is
not known before the run. So each linear takes the Δ that would spend the bits that are left on the
linears that are left. The bits of a linear at a given Δ are predicted from its sensitivity. What
predictions have missed so far, by kind of linear, corrects the next ones. The last linears absorb
the rest.

Everything follows from what the finished linears took, so a resumed run continues as it was.

Shape suffixes: L linears, Q quantiles of a linear's inputs, S some rows, I inputs, K codes, V the
values of an integer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.engine.loss_sensitivity import LinearSensitivity
from prunus.formats.packed.format import side_bits, zero_bits
from prunus.methods.rate_distortion import expected_bits
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import CodeLengths, LinearQuantization
from prunus.runtime.plane_codes import choose_codes, code_lengths, column_histograms

# A code costs about this many bits above the entropy, until a linear of its kind is known.
_FIRST_SURPLUS = 0.08
# Bisection steps for log2 Δ, which halve an interval of this size.
_STEPS, _LOWEST, _HIGHEST = 50, -60.0, 60.0


def _code_of(levels_SI: Tensor) -> CodeLengths:
    """The code that suits some rows of a weight."""
    classes_I, codes = choose_codes(column_histograms(levels_SI.cpu()))
    lengths_KV = torch.stack([code_lengths(code) for code in codes]).float()
    return CodeLengths(lengths_KV, classes_I.long())


@dataclass(frozen=True)
class LinearRate:
    """One linear of the run, before it is quantised.

    Attributes:
        name: Its full name.
        kind: Its name within its block; linears of a kind resemble each other.
        shape: (out, in).
        sensitivity: How the loss depends on it in the dense model.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    sensitivity: LinearSensitivity

    @property
    def weights(self) -> int:
        """The number of its weights."""
        return self.shape[0] * self.shape[1]


class RateControl:
    """Chooses the step of each linear, and counts the bits that linears take.

    For each linear in the order of the model, call `begin`, quantise, then `finish`.

    Args:
        bits: Bits per weight, over all linears, with all that belongs to them in the file.
        linears: The linears of the run, in the order of the model.
        sparsities: Full name of a linear -> the share of zeros that a mask forces; 0 where it is
            missing.

    >>> flat = LinearSensitivity(torch.ones(64), 1.0, torch.ones(8))
    >>> control = RateControl(3.0, [LinearRate("a.q", "q", (64, 64), flat)], {})
    >>> round(control.predicted_bits("a.q", control.log2_step()), 3)
    3.0
    """

    def __init__(
        self, bits: float, linears: Sequence[LinearRate], sparsities: Mapping[str, float]
    ) -> None:
        self._linears = {linear.name: linear for linear in linears}
        self._sparsities = dict(sparsities)
        # The bits that are left for linears that are not finished.
        self._left = bits * sum(linear.weights for linear in linears)
        # The names of these linears, in order.
        self._waiting = dict.fromkeys(self._linears)
        # Kind -> what its finished linears took above the prediction, in bits per weight.
        self._surplus: dict[str, list[float]] = {}

    def log2_step(self) -> float:
        """log2 Δ that would spend the bits that are left on the linears that are left.

        Predicted bits fall with Δ, so bisection finds it.
        """
        names = list(self._waiting)
        weights_L = torch.tensor([self._linears[name].weights for name in names], dtype=torch.float)
        fixed_L = torch.tensor([self._fixed_bits(name) for name in names])
        freedom_L = torch.tensor([1 - self._sparsities.get(name, 0.0) for name in names])
        deviations_LQ = torch.stack([self._deviations(name) for name in names])
        low, high = _LOWEST, _HIGHEST
        for _ in range(_STEPS):
            middle = (low + high) / 2
            bits_L = expected_bits(deviations_LQ * 2.0**-middle).mean(dim=1) * freedom_L + fixed_L
            if float((bits_L * weights_L).sum(dtype=torch.float64)) > self._left:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def predicted_bits(self, name: str, log2_step: float) -> float:
        """The predicted bits per weight of a linear at a step.

        Args:
            name: Full name of the linear.
            log2_step: log2 Δ.
        """
        bits = float(expected_bits(self._deviations(name) * 2.0**-log2_step).mean())
        return bits * (1 - self._sparsities.get(name, 0.0)) + self._fixed_bits(name)

    def begin(
        self, name: str, statistics: InputStatistics, coarser: float = 0.0
    ) -> tuple[LinearQuantization, float]:
        """How the next linear is quantised, and log2 Δ for `finish`.

        Args:
            name: Full name of the linear.
            statistics: The statistics of its inputs in the run.
            coarser: Is added to the log2 Δ that would spend the bits.
        """
        step, sensitivity = self.log2_step() + coarser, self._linears[name].sensitivity
        power = float(statistics.sum_squares_I.mean()) / max(1, statistics.tokens)
        # The sensitivity was measured on a few windows of the dense model. The run has seen all
        # windows, so its statistics say better how large the inputs are.
        unit = sensitivity.unit * ((sensitivity.power / power) ** 0.5 if power > 0 else 1.0)
        return LinearQuantization(2.0**step * unit, sensitivity.scales_O, _code_of), step

    def excess(self, name: str, bits: float) -> float:
        """The bits per weight of a linear that the linears after it would lack, at least.

        Those need one bit per weight and what does not depend on the step.

        Args:
            name: Full name of the linear.
            bits: Bits per weight that the linear would take.

        Returns:
            A number above 0 where the linear takes too much; otherwise what it could take more, as
            a negative number.
        """
        others = [self._linears[other] for other in self._waiting if other != name]
        least = sum((1 + side_bits(linear.shape)) * linear.weights for linear in others)
        return bits - (self._left - least) / self._linears[name].weights

    def finish(self, name: str, bits: float, log2_step: float) -> None:
        """Take note of a finished linear.

        Args:
            name: Full name of the linear.
            bits: Bits per weight that it takes in the file.
            log2_step: log2 Δ that `begin` returned.
        """
        linear = self._linears[name]
        missed = bits - self.predicted_bits(name, log2_step) + self._mean_surplus(linear.kind)
        self._surplus.setdefault(linear.kind, []).append(missed)
        self._left -= bits * linear.weights
        del self._waiting[name]

    def _deviations(self, name: str) -> Tensor:
        """The deviations of a linear's weights in units of its own Δ, (Q,)."""
        sensitivity = self._linears[name].sensitivity
        return sensitivity.deviations_Q / sensitivity.unit

    def _fixed_bits(self, name: str) -> float:
        """The part of a prediction that does not depend on the step."""
        linear, sparsity = self._linears[name], self._sparsities.get(name, 0.0)
        return side_bits(linear.shape) + zero_bits(sparsity) + self._mean_surplus(linear.kind)

    def _mean_surplus(self, kind: str) -> float:
        """What predictions have missed for a kind, or for all where none of it is finished."""
        surplus = self._surplus.get(kind) or [x for bits in self._surplus.values() for x in bits]
        return sum(surplus) / len(surplus) if surplus else _FIRST_SURPLUS
