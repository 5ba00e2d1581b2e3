"""2:4 on a GPU: what can be checked without one, and the product where there is one."""

import pytest
import torch
from torch import nn

from prunus.methods.patterns import Pattern, keep_mask
from prunus.packed import to_semi_structured
from prunus.packed.semi_structured import unsuitable
from tiny import tiny_model


def two_of_four(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    return weight.masked_fill(~keep_mask(weight.abs(), Pattern(2, 4), 0.5), 0).bfloat16()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="says what to do where there is no CUDA device"
)
def test_without_a_cuda_device_it_says_so_and_changes_nothing():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"no CUDA device\. On a CPU, `prunus pack`"):
        to_semi_structured(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="at least 1"):
        to_semi_structured(model, tokens=0)


def test_only_verified_weights_are_taken():
    good = two_of_four(32, 64)
    assert unsuitable(good) is None
    assert "multiple" in (unsuitable(two_of_four(33, 64)) or "")
    assert "float32" in (unsuitable(good.float()) or "")
    good[7, 8:12] = 1  # one group of four with too many
    assert "not 2:4" in (unsuitable(good) or "")


@pytest.mark.gpu
def test_converted_linears_compute_the_same():
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 64)).bfloat16().cuda()
    with torch.no_grad():
        model[0].weight.copy_(two_of_four(4096, 4096))
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda")
    expected = model(x)
    choices = to_semi_structured(model, tokens=64)
    assert [choice.name for choice in choices] == ["0", "1"]
    assert "not 2:4" in choices[1].reason
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
