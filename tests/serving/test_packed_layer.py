"""A layer of an engine, made of several packed weights: the same numbers, or an error."""

import pytest
import torch

from packed_reference import random_sparse
from plane_reference import quantized_weight
from prunus.runtime.bitmap import pack_weight
from prunus.runtime.description import Description, PackedShape, QuantizedShape
from prunus.runtime.forms import expand
from prunus.runtime.operators import reference_path
from prunus.runtime.weight import named_tensors
from prunus.serving.vllm_plugin import PackedLayer

QUANTIZED = quantized_weight(20, 64)
BITMAP = pack_weight(random_sparse(12, 64, 0.5, torch.bfloat16), torch.bfloat16)
DENSE = torch.randn(8, 64).bfloat16()
RARE = None if BITMAP.coding is None else len(BITMAP.coding.rare)
STORED = int(torch.count_nonzero(expand(BITMAP)))
DESCRIBED = Description(
    "bfloat16", {"q": QuantizedShape.of(QUANTIZED), "v": PackedShape(12, 64, STORED, RARE)}
)


def tensors() -> list[tuple[str, torch.Tensor, int]]:
    """All tensors of the layer in an order in which no linear is complete before the last one."""
    parts = [named_tensors("", QUANTIZED), {"weight": DENSE}, named_tensors("", BITMAP)]
    found = [(n, t, i) for i, part in enumerate(parts) for n, t in part.items()]
    return sorted(found, key=lambda each: each[0])


def loaded(left_out: str = "", dtype: torch.dtype = torch.bfloat16) -> PackedLayer:
    layer = PackedLayer(DESCRIBED, ["q", "k", "v"])
    for name, tensor, part in tensors():
        if name != left_out:
            layer.take(name, tensor, part)
    layer.prepare(dtype)
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_outputs_stand_in_the_order_of_the_names(with_bias, dtype):
    x_TI = torch.randn(3, 64).to(dtype)
    whole_OI = torch.cat([expand(QUANTIZED, dtype), DENSE.to(dtype), expand(BITMAP, dtype)])
    bias = torch.randn(40).to(dtype) if with_bias else None
    layer = loaded(dtype=dtype)
    with reference_path():
        found = layer.multiply(x_TI, bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(x_TI, whole_OI, bias))


def test_the_tensors_that_a_layer_expects_are_those_of_all_its_linears():
    expected = PackedLayer(DESCRIBED, ["q", "k", "v"]).expected()
    assert set(expected) == {name for name, _, _ in tensors()}
    assert PackedLayer(DESCRIBED, ["k"]).expected() == {"weight": torch.bfloat16}


def test_rows_are_looked_up():
    layer = PackedLayer(DESCRIBED, ["q"])
    for name, tensor in named_tensors("", QUANTIZED).items():
        layer.take(name, tensor)
    layer.prepare(torch.bfloat16)
    ids = torch.tensor([[3, 19], [0, 3]])
    found = layer.look_up(ids, torch.float32)
    assert torch.equal(found, expand(QUANTIZED, torch.float32)[ids])


def test_a_missing_tensor_is_named():
    with pytest.raises(ValueError, match=r"holds no tensor 'q\.weight_steps'"):
        loaded(left_out="weight_steps")
    with pytest.raises(ValueError, match=r"no dense weight k\.weight"):
        PackedLayer(DESCRIBED, ["k"]).prepare(torch.bfloat16)


def test_a_damaged_weight_is_named():
    layer = PackedLayer(DESCRIBED, ["q"])
    for name, tensor in named_tensors("", QUANTIZED).items():
        changed = torch.full_like(tensor, 200) if name == "weight_classes" else tensor
        layer.take(name, changed)
    with pytest.raises(ValueError, match="q is damaged"):
        layer.prepare(torch.bfloat16)
