"""Low-precision products: nearly right where they are fast, and exact where they are not."""

import pytest
import torch

from prunus.hardware.numerics import low_precision_factor, low_precision_product


def test_small_products_are_exact():
    left, right = torch.randn(7, 9), torch.randn(9, 5)
    assert torch.equal(low_precision_product(left, right), left @ right)


@pytest.mark.parametrize("native", [True, False])
def test_large_products_are_right_to_a_few_bits(native, monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: native)
    left, right = torch.randn(300, 300), torch.randn(300, 300)
    exact, found = left @ right, low_precision_product(left, right)
    assert found.dtype == torch.float32
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.005
    assert (error == 0) == (not native)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [2, 300])
def test_a_factor_rounded_once_gives_the_same_products(rows, native, monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: native)
    left, right = torch.randn(rows, 300), torch.randn(300, 300)
    assert torch.equal(
        low_precision_product(left, low_precision_factor(right, rows)),
        low_precision_product(left, right),
    )
