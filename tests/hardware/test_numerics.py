"""Low-precision products: nearly right where they are fast, and exact where they are not."""

import pytest
import torch

from prunus.hardware.numerics import fast_linears, low_precision_factor, low_precision_product


@pytest.mark.parametrize(("native", "size"), [(True, 300), (False, 300), (True, 7)])
def test_large_products_are_right_to_a_few_bits_and_small_ones_exact(native, size, monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: native)
    left, right = torch.randn(size, size), torch.randn(size, size)
    exact, found = left @ right, low_precision_product(left, right)
    assert found.dtype == torch.float32
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.005
    assert (error == 0) == (not native or size == 7)


@pytest.mark.parametrize(("rows", "native"), [(2, True), (300, True), (300, False)])
def test_a_factor_rounded_once_gives_the_same_products(rows, native, monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: native)
    left, right = torch.randn(rows, 300), torch.randn(300, 300)
    found = low_precision_product(left, low_precision_factor(right, rows))
    assert torch.equal(found, low_precision_product(left, right))


def test_linears_of_16_bits_are_as_exact_in_float32(monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: False)
    layer, x = torch.nn.Linear(40, 30).bfloat16(), torch.randn(3, 9, 40).bfloat16()
    with fast_linears():
        found = layer(x)
    exact = torch.nn.functional.linear(*(each.float() for each in (x, layer.weight, layer.bias)))
    assert torch.equal(found, exact.bfloat16())
