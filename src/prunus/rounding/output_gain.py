"""The factor of each row of a rounded weight that makes its outputs unbiased.

Of all weights that become one value, the mean is about that value. So E[ŵw] = E[ŵ²], which is less
than E[w²]: rounding to few values shrinks a weight by the share of its variance that it loses,
which is a tenth at two bits. Least squares in a linear want it so. But the outputs of all linears
shrink together, and such errors add up along a model, where random ones cancel. So the scales of a
rounded row are multiplied by

    g = E[y²] / E[ŷy]      with the outputs y of the weight and ŷ of the rounded weight,

and then E[gŷy] = E[y²].

Shape suffixes: O outputs (rows), I inputs.
"""

from __future__ import annotations

from torch import Tensor

# A row of which the rounded weight keeps less than this share is nothing that a factor mends.
_LEAST_SHARE = 2 / 3


def output_gains(weight_OI: Tensor, rounded_OI: Tensor, weighted_OI: Tensor) -> Tensor:
    """The factor g of each row, float32 (O,); 1 where no factor from 2/3 to 3/2 is right.

    Args:
        weight_OI: float32, the weight W.
        rounded_OI: float32, the rounded weight.
        weighted_OI: float32, W·G with the Gram matrix G of the inputs, or with its diagonal where
            nothing else is known.

    >>> from torch import tensor
    >>> weight_OI = tensor([[2.0, 1.0], [0.0, 0.0]])
    >>> output_gains(weight_OI, tensor([[2.0, 0.0], [0.0, 0.0]]), weight_OI)
    tensor([1.2500, 1.0000])
    """
    energy_O = (weighted_OI * weight_OI).sum(dim=1)
    kept_O = (weighted_OI * rounded_OI).sum(dim=1)
    is_sound_O = (kept_O > _LEAST_SHARE * energy_O) & (energy_O > _LEAST_SHARE * kept_O)
    return (energy_O / kept_O).where(is_sound_O, 1.0)
