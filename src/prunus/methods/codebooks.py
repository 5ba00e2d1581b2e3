"""Weights whose columns are quantised several at a time: their magnitudes are a row of a grid.

A `CodebookQuantizer` is a `GroupQuantizer` that allows only some combinations of values. Its
columns are cut into codewords of 4 or 8, and the magnitudes of a codeword are a row of the grid.
The signs of eight columns are free, or an even number of them is negative.

The fit has the goal of `group_fits`: a small Σ w·(x − d·code·value)² in every span. For a step s,
the best codeword has the least Σ w·v²/2 − Σ w·|x|/s·v over its magnitudes v. This is one product of
a vector with a matrix that is made of the grid, for all codewords at once, and s² times its minimum
is half of the error, less a constant. So every group tries a few steps and takes the best. Then d
follows from the largest step, every group tries the codes near its step, least squares gives the d
that suits the codewords, and the last search finds the codewords for this d.

Each codeword is chosen by itself, without feedback. In a trial, correcting the errors of a codeword
in later columns halved the errors of the layers, and raised the loss of the model.

Shape suffixes: O outputs (rows), B columns of a span, G groups of a span, W codewords of a span, K
rows of the grid, C columns of a codeword, S signs of eight columns, T candidates of a step.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.methods.group_quantizer import GroupQuantizer, Scales, check_range, over

# Candidates for the step of a group: the largest weight gets the largest magnitude times one of
# these. Rows of a grid with large magnitudes are few, so more than 1 may suit the other weights.
_REACHES = (0.8, 1.0, 1.25, 1.6)
# How far the codes to try are from the one that is nearest to a step. Codes are odd.
_CHANGES = (0, -2, 2)
# What is taken of products with the grid (…, K): the least, or its row of the grid.
_LEAST, _INDEX = functools.partial(torch.amin, dim=1), functools.partial(torch.argmin, dim=1)
# Numbers of a product with the grid that exist at once: few enough for the cache of a processor.
_ELEMENTS = 2**18


@dataclass(frozen=True)
class CodebookQuantizer(GroupQuantizer):
    """A quantiser whose columns have magnitudes from a grid; see the top of this file.

    Its values are symmetric about 0 and never 0. Its codes are the odd numbers from 1 on.

    Attributes:
        has_even_signs: Whether an even number of eight columns must be negative.
    """

    has_even_signs: bool

    @property
    @abstractmethod
    def grid_KC(self) -> Tensor:
        """The magnitudes of all codewords, float32."""


def fit_codewords(
    weight_BO: Tensor, importance_B: Tensor, quantizer: CodebookQuantizer
) -> tuple[Scales, Tensor]:
    """The scales of one span and the levels of its weights, uint8 (B, O), of a small error.

    Args:
        weight_BO: float32, the weights of one span, transposed: every column is a row here.
        importance_B: float32, not negative. It weighs the squared error of each column.
        quantizer: The codewords, codes and dtype of scales to choose from.

    Raises:
        ValueError: Weights are beyond the values of the quantiser.
    """
    check_range(weight_BO, quantizer)
    fit = _CodewordFit(weight_BO, importance_B, quantizer)
    extreme_GO = weight_BO.abs().unflatten(0, (-1, quantizer.group)).amax(1) / quantizer.values[-1]
    step_GO = fit.best_step([extreme_GO / reach for reach in _REACHES])
    d_O = quantizer.stored(step_GO.amax(0) / quantizer.codes[1])
    nearest_GO = ((over(step_GO, d_O) - 1) / 2).round_() * 2 + 1
    step_GO = fit.best_step(
        [d_O * (nearest_GO + change).clamp_(*quantizer.codes) for change in _CHANGES]
    )
    code_GO = over(step_GO, d_O).round_().clamp_min_(1)
    d_O = quantizer.stored(fit.least_squares(code_GO, fit.search(step_GO, _INDEX)))
    value_OB = fit.grid_KC[fit.search(d_O * code_GO, _INDEX)].flatten(1) * fit.sign_OB
    levels_OB = torch.bucketize(value_OB, value_OB.new_tensor(quantizer.values)).byte()
    return Scales(d_O, torch.zeros_like(d_O), code_GO, torch.zeros_like(code_GO)), levels_OB.T


class _CodewordFit:
    """The weights of one span by codewords.

    Args:
        weight_BO: float32, the weights, transposed as in `fit_codewords`.
        importance_B: float32, weighs the squared error of each column.
        quantizer: Its grid and signs.

    Attributes:
        grid_KC: The grid, on the device of the weights.
        sign_OB: float32, 1 or −1: the sign that the value of a weight will have, mostly its own.
        weighted_OWC: w·|x|, or −w·|x| where the value will have another sign than the weight.
        importance_WC: The importances w of the columns.
        factor: What the vector [w·|x|/s, w] of a codeword is multiplied by, (2 C, K).
    """

    def __init__(
        self, weight_BO: Tensor, importance_B: Tensor, quantizer: CodebookQuantizer
    ) -> None:
        self.grid_KC = quantizer.grid_KC.to(weight_BO.device)
        self.factor = torch.cat([-self.grid_KC, self.grid_KC.square() / 2], dim=1).T
        weighted_OB = weight_BO.T.contiguous() * importance_B
        negative_OB = weighted_OB < 0
        if quantizer.has_even_signs:
            # The cheapest sign of eight makes an odd number of negative ones even.
            negative_OWS = negative_OB.unflatten(1, (-1, 8))
            is_odd_OW1 = negative_OWS.sum(2, keepdim=True) % 2 == 1
            cheapest_OW1 = weighted_OB.abs().unflatten(1, (-1, 8)).argmin(2, keepdim=True)
            flips_OWS = torch.zeros_like(negative_OWS).scatter_(2, cheapest_OW1, is_odd_OW1)
            negative_OB = (negative_OWS ^ flips_OWS).flatten(1)
        self.sign_OB = 1.0 - 2.0 * negative_OB
        self.weighted_OWC = (weighted_OB * self.sign_OB).unflatten(1, (-1, self.grid_KC.shape[1]))
        self.importance_WC = importance_B.view(self.weighted_OWC.shape[1:])

    def best_step(self, steps: list[Tensor]) -> Tensor:
        """For every group the one of some steps (G, O) that has the least error."""
        errors = [
            self.search(step_GO, _LEAST).unflatten(1, (len(step_GO), -1)).sum(2).T
            * step_GO.square()
            for step_GO in steps
        ]
        best_1GO = torch.stack(errors).argmin(0, keepdim=True)
        return torch.stack(steps).gather(0, best_1GO)[0]

    def search(self, step_GO: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """From Σ w·v²/2 − Σ w·|x|/s·v for all rows of the grid to one number (O, W).

        Args:
            step_GO: The steps s of the groups.
            choose: From such sums (codewords of any rows, K) to a number for each codeword.
                `_LEAST` gives the least sum, and `_INDEX` its row of the grid.
        """
        codewords = self.weighted_OWC.shape[1] // len(step_GO)
        inverse_OW1 = over(1.0, step_GO).T.repeat_interleave(codewords, dim=1)[..., None]
        in_steps_OWC = self.weighted_OWC * inverse_OW1
        vectors = torch.cat([in_steps_OWC, self.importance_WC.expand_as(in_steps_OWC)], dim=2)
        parts = vectors.flatten(0, 1).split(max(1, _ELEMENTS // len(self.grid_KC)))
        return torch.cat([choose(part @ self.factor) for part in parts]).view(vectors.shape[:2])

    def least_squares(self, code_GO: Tensor, row_OW: Tensor) -> Tensor:
        """The d (O,) that suits the codes of the groups and rows of the grid best."""
        code_OW = code_GO.T.repeat_interleave(row_OW.shape[1] // len(code_GO), dim=1)
        value_OWC = self.grid_KC[row_OW] * code_OW[..., None]
        product_O = (self.weighted_OWC * value_OWC).sum((1, 2))
        square_O = (self.importance_WC * value_OWC.square()).sum((1, 2))
        return over(product_O, square_O)
