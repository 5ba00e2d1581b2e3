"""Embeddings and heads rounded to a given number of bits."""

import pytest
import torch

from prunus.formats.packed.quantize_rows import quantize_rows
from prunus.runtime.forms import relative_error
from prunus.runtime.planes import check, expand


def head(rows: int = 2000, columns: int = 128, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes with a few large columns, and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(rows, 1, generator=generator) * 0.3)
    columns_by = torch.ones(columns)
    columns_by[:4] = 5
    weight = torch.randn(rows, columns, generator=generator) * sizes * columns_by * 0.1
    weight[7] = 0
    return weight.bfloat16()


@pytest.mark.parametrize(("bits", "error"), [(8, 1e-4), (6, 5e-4), (4, 7e-3), (2.5, 0.06)])
def test_the_size_is_what_was_asked_for(bits, error):
    weight = head()
    quantised = quantize_rows(weight, bits)
    check(quantised)
    taken = quantised.nbytes * 8 / weight.numel()
    # At 8 bits the number of levels is the limit.
    assert (6.5 if bits == 8 else bits - 0.03) < taken <= bits
    assert relative_error(weight, quantised) < error
    exact = weight.double()
    difference = (expand(quantised, torch.float32).double() - exact).square().sum()
    assert relative_error(weight, quantised) == pytest.approx(
        float(difference / exact.square().sum())
    )


def test_no_value_is_cut_off():
    """A row's scale grows where its values would need more than 247 levels."""
    weight = head()
    weight[11, 3] = 1000
    dense = expand(quantize_rows(weight, 8), torch.float32)
    assert float(dense[11, 3]) == pytest.approx(1000, rel=0.01)
    others = torch.arange(len(weight)) != 11
    assert (dense - weight)[others].square().sum() < 1e-3 * weight[others].float().square().sum()


def test_a_step_per_column_helps_where_columns_differ():
    weight = head().float()
    steps = quantize_rows(weight, 6).steps
    assert steps[:4].float().mean() > 1.2 * steps[4:].float().mean()


@pytest.mark.parametrize("bits", [8, 3])
def test_zeros(bits):
    quantised = quantize_rows(torch.zeros(300, 64), bits)
    assert not expand(quantised).any()
    assert relative_error(torch.zeros(300, 64), quantised) == 0


def test_a_weight_too_small_for_its_scales_is_refused():
    with pytest.raises(ValueError, match="cannot be stored in 4 bits"):
        quantize_rows(torch.eye(3), 4)
