"""Low-precision products: nearly right where they are fast, and exact where they are not."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

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


class Products(TorchDispatchMode):
    """Collects the dtypes in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("addmm", "linear", "matmul", "mm"):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("layer", [torch.nn.Linear(40, 30), Conv1D(30, 40)], ids=str)
def test_linears_of_16_bits_are_as_exact_in_float32(layer, native, monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: native)
    layer, x = layer.bfloat16(), torch.randn(3, 9, 40).bfloat16()
    torch.nn.init.normal_(layer.bias)
    with torch.inference_mode(), fast_linears(), Products() as products:
        found = layer(x)
    assert products.dtypes == {torch.bfloat16 if native else torch.float32}
    with torch.no_grad():
        exact = layer.float()(x.float())
    torch.testing.assert_close(found, exact.bfloat16(), rtol=0.01 if native else 0, atol=0)


def test_other_uses_of_addmm_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: False)
    added, left, right = (torch.randn(9, 9).bfloat16() for _ in range(3))
    with fast_linears():
        scaled = torch.addmm(added[0], left, right, beta=2)
        assert torch.equal(torch.addmm(added, left, right), torch.addmm(added, left, right))
    assert torch.equal(scaled, torch.addmm(added[0], left, right, beta=2))
