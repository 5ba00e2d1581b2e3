"""Weights whose columns are quantised several at a time: their magnitudes are a row of a grid.

A `CodebookQuantizer` is a `GroupQuantizer` that allows only some combinations of values. Its
columns are cut into codewords of 4 or 8, and the magnitudes of a codeword are a row of the grid.
The signs of eight columns are free, or an even number of them is negative.

The fit has the goal of `group_fits`: a small Σ w·(x − d·code·value)² in every span. For a step s,
the best codeword has the least Σ w·v²/2 − Σ w·|x|/s·v over its magnitudes v, and s² times this
least sum is half of the error, less a constant. So every group tries a few steps and takes the
best. Then d follows from the largest step, every group tries the codes near its step, and least
squares gives the d that suits the codewords.

Shape suffixes: O outputs (rows), B columns of a span, G groups of a span, W codewords of a span, N
codewords of several spans, K rows of the grid, C columns of a codeword, S signs of eight columns.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.kernels import library as kernels
from prunus.methods.group_quantizer import GroupQuantizer, Scales, for_rows, over

# Candidates for the step of a group: the largest weight gets the largest magnitude times one of
# these. Rows of a grid with large magnitudes are few, so more than 1 may suit the other weights.
_REACHES = (0.8, 1.0, 1.25, 1.6)
# How far the codes to try are from the one that is nearest to a step. Codes are odd.
_CHANGES = (0, -2, 2)


@dataclass(frozen=True)
class CodebookQuantizer(GroupQuantizer):
    """A quantiser whose columns have magnitudes from a grid; see the top of this file.

    Its values are symmetric about 0 and never 0. Its codes are the odd numbers from 1 on.

    Attributes:
        has_even_signs: Whether an even number of eight columns must be negative.
    """

    has_even_signs: bool

    @property
    def unit(self) -> int:
        """The columns that are rounded together: a codeword, or eight that share their signs."""
        return 8 if self.has_even_signs else self.grid_KC.shape[1]

    @property
    @abstractmethod
    def grid_KC(self) -> Tensor:
        """The magnitudes of all codewords, float32."""


class CodewordFit:
    """The weights of one span, one group or one unit by codewords; see `group_fits.SpanFit`.

    Args:
        weight_BO: float32, the weights, transposed: every column is a row here.
        importance_B: float32, not negative, weighs the squared error of each column; see
            `for_rows`.
        quantizer: Its grid, signs and codes.

    Attributes:
        quantizer: The codewords and codes to choose from.
        grid_KC: The grid, on the device of the weights.
        weight_BO: The weights.
        sign_BO: float32, 1 or −1: the sign that the value of a weight will have, mostly its own.
        weighted_WCO: w·|x|, or −w·|x| where the value will have another sign than the weight.
        importance_B1: The importances w of the columns, (B, O) where runs of rows differ.
        importance_WCS: The same, for S runs of rows.
    """

    def __init__(
        self, weight_BO: Tensor, importance_B: Tensor, quantizer: CodebookQuantizer
    ) -> None:
        self.quantizer, self.grid_KC = quantizer, quantizer.grid_KC.to(weight_BO.device)
        self.weight_BO = weight_BO
        self.importance_B1 = for_rows(importance_B, weight_BO)
        weighted_BO = weight_BO * self.importance_B1
        negative_BO = weighted_BO < 0
        if quantizer.has_even_signs:
            # The cheapest sign of eight makes an odd number of negative ones even.
            negative_WSO = negative_BO.unflatten(0, (-1, 8))
            is_odd_W1O = negative_WSO.sum(1, keepdim=True) % 2 == 1
            cheapest_W1O = weighted_BO.abs().unflatten(0, (-1, 8)).argmin(1, keepdim=True)
            flips_WSO = torch.zeros_like(negative_WSO).scatter_(1, cheapest_W1O, is_odd_W1O)
            negative_BO = (negative_WSO ^ flips_WSO).flatten(0, 1)
        self.sign_BO = 1.0 - 2.0 * negative_BO
        columns = self.grid_KC.shape[1]
        self.weighted_WCO = (weighted_BO * self.sign_BO).unflatten(0, (-1, columns))
        self.importance_WCS = importance_B.view(len(weight_BO) // columns, columns, -1)

    def scales(self) -> Scales:
        """The scales that fit the weights best, with codes of all groups."""
        quantizer = self.quantizer
        extreme_GO = self.weight_BO.abs().unflatten(0, (-1, quantizer.group)).amax(1)
        step_GO = self._best([extreme_GO / quantizer.values[-1] / reach for reach in _REACHES])
        d_O = quantizer.stored(step_GO.amax(0) / quantizer.codes[1])
        code_GO = ((over(step_GO, d_O) - 1) / 2).round_().mul_(2).add_(1).clamp_min_(1)
        scales = self.best_codes(Scales(d_O, torch.zeros_like(d_O), code_GO, 0 * code_GO))
        return scales._replace(d_O=quantizer.stored(self._least_squares(scales)))

    def best_codes(self, scales: Scales) -> Scales:
        """The codes with the smallest errors, at most 2 from those of `scales`; d stays."""
        codes = [(scales.codes_GO + change).clamp_(*self.quantizer.codes) for change in _CHANGES]
        step_GO = self._best([scales.d_O * code_GO for code_GO in codes])
        return scales._replace(codes_GO=over(step_GO, scales.d_O).round_().clamp_min_(1))

    def nearest(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """The values nearest to the weights, in steps, and their levels, uint8; both (B, O)."""
        magnitude_WOC = self.grid_KC[self._search(scales.steps()[0])[1]]
        value_BO = magnitude_WOC.transpose(1, 2).contiguous().flatten(0, 1) * self.sign_BO
        limits = value_BO.new_tensor(self.quantizer.values)
        return value_BO, torch.bucketize(value_BO, limits).byte()

    def _best(self, steps: list[Tensor]) -> Tensor:
        """For every group the one of some steps (G, O) that has the least error."""
        errors = [
            self._search(step_GO)[0].unflatten(0, (len(step_GO), -1)).sum(1) * step_GO.square()
            for step_GO in steps
        ]
        best_1GO = torch.stack(errors).argmin(0, keepdim=True)
        return torch.stack(steps).gather(0, best_1GO)[0]

    def _search(self, step_GO: Tensor) -> tuple[Tensor, Tensor]:
        """The least Σ w·v²/2 − Σ w·|x|/s·v of each codeword, and its row of the grid; (W, O)."""
        words = len(self.weighted_WCO) // len(step_GO)
        inverse_W1O = over(1.0, step_GO).repeat_interleave(words, dim=0)[:, None]
        target_WCO, runs = self.weighted_WCO * inverse_W1O, self.importance_WCS.shape[2]
        if runs == 1:
            return find_codewords(target_WCO, self.importance_WCS[:, :, 0], self.grid_KC)
        # The codewords of each run of rows, R, have importances of their own.
        target_NCR = target_WCO.unflatten(2, (runs, -1)).permute(2, 0, 1, 3).flatten(0, 1)
        importance_NC = self.importance_WCS.permute(2, 0, 1).flatten(0, 1)
        found = find_codewords(target_NCR, importance_NC, self.grid_KC)
        least_WO, index_WO = (x.unflatten(0, (runs, -1)).transpose(0, 1).flatten(1) for x in found)
        return least_WO, index_WO

    def _least_squares(self, scales: Scales) -> Tensor:
        """The d (O,) that suits the codes of the groups and their codewords best."""
        value_BO = self.nearest(scales)[0] * self.sign_BO
        value_GCO = value_BO.unflatten(0, (len(scales.codes_GO), -1)) * scales.codes_GO[:, None]
        value_BO = value_GCO.flatten(0, 1)
        product_O = (self.weighted_WCO.flatten(0, 1) * value_BO).sum(0)
        return over(product_O, (self.importance_B1 * value_BO.square_()).sum(0))


def find_codewords(
    target_WCO: Tensor, importance_WC: Tensor, grid_KC: Tensor
) -> tuple[Tensor, Tensor]:
    """For all codewords the least Σ importance·v²/2 − Σ target·v over the rows v of a grid.

    On the CPU the compiled kernel does this, where there is one.

    Args:
        target_WCO: float32.
        importance_WC: float32.
        grid_KC: float32, with 4 or 8 columns. At most 128 left halves of its rows may differ, and
            as many right ones.

    Returns:
        The least number, float32, and its row of the grid; both (W, O).

    Raises:
        RuntimeError: More halves differ, or the grid has another number of columns.
    """
    compiled = kernels.load() if target_WCO.is_cpu else None
    if compiled is None:
        halves_WK = importance_WC @ grid_KC.square().T / 2
        return (halves_WK[:, None] - target_WCO.transpose(1, 2) @ grid_KC.T).min(2)
    words, columns, outputs = target_WCO.shape
    least_WO = target_WCO.new_empty(words, outputs)
    index_WO = torch.empty_like(least_WO, dtype=torch.int32)
    sizes = (words, columns, outputs, len(grid_KC))
    arrays = (target_WCO.contiguous(), importance_WC.contiguous(), grid_KC.contiguous())
    compiled.call("prunus_find_codewords", *sizes, *arrays, least_WO, index_WO)
    return least_WO, index_WO
