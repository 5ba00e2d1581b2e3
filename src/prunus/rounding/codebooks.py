"""Weights whose columns are rounded several at a time: their magnitudes are a row of a grid.

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

import functools
import operator
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.kernels import library as kernels
from prunus.rounding.group_quantizer import GroupQuantizer, Scales, for_rows, over

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

    @functools.cached_property
    def digits_KC(self) -> Tensor:
        """The grid as the numbers of its magnitudes, from 0 on, int64."""
        # All values that are negative are below those of the grid.
        values = self.grid_KC.new_tensor(self.values)
        return torch.bucketize(self.grid_KC, values) - len(self.values) // 2


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
        negative_BO: bool, whether the value of a weight will be negative, mostly as the weight is.
        sign_BO: float32, 1 or −1: the sign of that value.
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
            cost_WSO = weighted_BO.abs().unflatten(0, (-1, 8))
            is_odd_WO = functools.reduce(operator.xor, negative_WSO.unbind(1))
            least_WO = cost_WSO.amin(1)
            # torch.argmin along the signs, and scattering, take thirteen times as long. Of several
            # that are the cheapest, the first one flips.
            for negative_WO, cost_WO in zip(
                negative_WSO.unbind(1), cost_WSO.unbind(1), strict=True
            ):
                flips_WO = (cost_WO == least_WO).logical_and_(is_odd_WO)
                negative_WO ^= flips_WO
                is_odd_WO ^= flips_WO
        self.negative_BO = negative_BO
        self.sign_BO = 1.0 - 2.0 * negative_BO
        columns = self.grid_KC.shape[1]
        self.weighted_WCO = (weighted_BO * self.sign_BO).unflatten(0, (-1, columns))
        self.importance_WCS = importance_B.view(len(weight_BO) // columns, columns, -1)

    def scales(self) -> Scales:
        """The scales that fit the weights best, with codes of all groups."""
        quantizer = self.quantizer
        extreme_GO = self.weight_BO.abs().unflatten(0, (-1, quantizer.group)).amax(1)
        step_GO = self._best([extreme_GO / quantizer.values[-1] / reach for reach in _REACHES])
        d_O = quantizer.as_scale(step_GO.amax(0) / quantizer.codes[1])
        code_GO = ((over(step_GO, d_O) - 1) / 2).round_().mul_(2).add_(1).clamp_min_(1)
        scales = self.best_codes(Scales(d_O, torch.zeros_like(d_O), code_GO, 0 * code_GO))
        return scales._replace(d_O=quantizer.as_scale(self._least_squares(scales)))

    def best_codes(self, scales: Scales) -> Scales:
        """The codes with the smallest errors, at most 2 from those of `scales`; d stays."""
        codes = [(scales.codes_GO + change).clamp_(*self.quantizer.codes) for change in _CHANGES]
        step_GO = self._best([scales.d_O * code_GO for code_GO in codes])
        return scales._replace(codes_GO=over(step_GO, scales.d_O).round_().clamp_min_(1))

    def nearest(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """The values nearest to the weights, in steps, and their levels, uint8; both (B, O)."""
        index_WO = self._search(scales.steps()[0])[1]
        level_BO = _rows(self.quantizer.digits_KC.to(index_WO.device, torch.uint8), index_WO)
        # The levels of negative values are half + ~digit, those of the others half + digit.
        level_BO ^= self.negative_BO.view(torch.uint8) * 255
        level_BO += len(self.quantizer.values) // 2
        return _rows(self.grid_KC, index_WO) * self.sign_BO, level_BO

    def _best(self, steps: list[Tensor]) -> Tensor:
        """For every group the one of some steps (G, O) that has the least error."""
        best_GO, least_GO = steps[0], self._error(steps[0])
        for step_GO in steps[1:]:
            error_GO = self._error(step_GO)
            best_GO = torch.where(error_GO < least_GO, step_GO, best_GO)
            least_GO = torch.minimum(error_GO, least_GO)
        return best_GO

    def _error(self, step_GO: Tensor) -> Tensor:
        """Half of the error of every group with a step (G, O), less a constant."""
        least_WO, _ = self._search(step_GO)
        return least_WO.unflatten(0, (len(step_GO), -1)).sum(1) * step_GO.square()

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
        value_BO = _rows(self.grid_KC, self._search(scales.steps()[0])[1])
        value_GCO = value_BO.unflatten(0, (len(scales.codes_GO), -1)) * scales.codes_GO[:, None]
        value_BO = value_GCO.flatten(0, 1)
        product_O = (self.weighted_WCO.flatten(0, 1) * value_BO).sum(0)
        return over(product_O, (self.importance_B1 * value_BO.square_()).sum(0))


def _rows(grid_KC: Tensor, index_WO: Tensor) -> Tensor:
    """The rows of a grid with these numbers, transposed as weights are, (B, O)."""
    # Column by column the reads of a grid stay in the cache, and no result must be transposed.
    columns_CN = grid_KC.T.contiguous().index_select(1, index_WO.flatten())
    return columns_CN.unflatten(1, index_WO.shape).transpose(0, 1).flatten(0, 1)


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
    compiled = kernels.load_kernels() if target_WCO.is_cpu else None
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
