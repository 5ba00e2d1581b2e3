"""Weights that have the values of a type already are found, and keep them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prunus.formats.compressed_tensors import integer_type
from prunus.formats.gguf.types import TYPES
from prunus.formats.mlx import affine_type
from prunus.rounding.group_fits import round_to_nearest
from prunus.rounding.group_quantizer import GroupedWeight
from prunus.rounding.lattice import lossless_type, on_lattice

gguf = pytest.importorskip("gguf")

ROWS, COLUMNS = 96, 512
SINGLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")


def weights(scale: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(ROWS, COLUMNS, generator=generator) * scale
    weight_OI[3, 32:96] = 0  # spans of zeros
    return weight_OI


def quantised(kind: str, weight_OI: torch.Tensor) -> GroupedWeight:
    """A weight as llama.cpp rounds it."""
    data = gguf.quants.quantize(weight_OI.numpy(), gguf.GGMLQuantizationType[kind])
    return GroupedWeight(TYPES[kind], torch.from_numpy(np.ascontiguousarray(data)))


def levels(weight: GroupedWeight) -> torch.Tensor:
    return weight.quantizer.unpack(weight.data_OB.view(-1, weight.quantizer.nbytes)).levels_NB


@pytest.mark.parametrize("scale", [0.003, 0.02, 1.7])
@pytest.mark.parametrize("kind", SINGLE)
def test_weights_of_llama_cpp_are_found_through_the_rounding_of_bfloat16(kind, scale):
    before = quantised(kind, weights(scale))
    dense_OI = before.dense().bfloat16()
    # A sweep gets them in float32.
    kept = on_lattice(dense_OI.float(), TYPES[kind])
    assert float((levels(kept) == levels(before)).float().mean()) > 0.9999
    after_OI = kept.dense().bfloat16()
    assert float((after_OI == dense_OI).float().mean()) > 0.999
    assert torch.allclose(after_OI.float(), dense_OI.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", SINGLE)
def test_without_that_rounding_all_bytes_are_those_of_llama_cpp(kind, dtype):
    before = quantised(kind, weights())
    kept = on_lattice(before.dense().to(dtype), TYPES[kind])
    assert torch.equal(kept.dense(), before.dense())
    if kind != "MXFP4":  # its powers of two have no sign of 0
        assert torch.equal(levels(kept), levels(before))


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (5, 128), (8, 32)])
def test_scales_and_biases_of_mlx_are_found(bits, group):
    groups = weights().view(-1, group)
    bias_N1, highest_N1 = groups.amin(1, True).bfloat16(), groups.amax(1, True)
    scale_N1 = ((highest_N1 - bias_N1) / (2**bits - 1)).bfloat16()
    codes = ((groups - bias_N1) / scale_N1).nan_to_num(0).round().clamp(0, 2**bits - 1)
    dense_OI = (codes * scale_N1 + bias_N1.float()).view(ROWS, COLUMNS).bfloat16()
    kept = on_lattice(dense_OI, affine_type(bits, group, torch.bfloat16))
    assert torch.equal(kept.dense().bfloat16(), dense_OI)


@pytest.mark.parametrize(
    "kind",
    [integer_type(4, 128, torch.bfloat16), integer_type(8, 32, torch.float16), TYPES["IQ4_NL"]],
    ids=lambda x: x.name,
)
def test_types_without_minima_of_all_formats_are_found(kind):
    dense_OI = round_to_nearest(weights(), kind).dense().to(kind.dtype)
    assert torch.equal(on_lattice(dense_OI, kind).dense().to(kind.dtype), dense_OI)


def test_columns_in_the_order_in_which_they_are_stored_are_found():
    order = tuple(torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1)).tolist())
    kind = replace(TYPES["Q4_0"], columns=order)
    dense_OI = round_to_nearest(weights(), kind).dense().bfloat16()
    assert torch.equal(on_lattice(dense_OI, kind).dense().bfloat16(), dense_OI)
    assert on_lattice(dense_OI, TYPES["Q4_0"]) is None


def test_scales_that_the_type_rounds_move_a_value_by_one_number_at_most():
    groups = weights().view(-1, 32)
    step_N1 = groups.abs().amax(1, keepdim=True) / 7.3  # float32, which Q4_0 does not have
    codes = (groups / step_N1).nan_to_num().round()
    dense_OI = (codes * step_N1).view(ROWS, COLUMNS).bfloat16()
    kept = on_lattice(dense_OI, TYPES["Q4_0"])
    assert torch.allclose(kept.dense(), dense_OI.float(), rtol=2**-7, atol=0)


def test_a_lattice_in_a_part_of_a_weight_is_none():
    ordinary_OI = weights().bfloat16()
    for rows in (slice(0, ROWS // 2), slice(5, 6), slice(ROWS - 1, ROWS)):
        dense_OI = quantised("Q4_0", weights()).dense().bfloat16()
        dense_OI[rows] = ordinary_OI[rows]
        assert on_lattice(dense_OI, TYPES["Q4_0"]) is None


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "uniform", "two sides", "pruned"])
def test_ordinary_weights_lie_on_none(kind):
    normal, other = weights(1.0), weights(1.0).roll(1, 0)
    weight_OI = {
        "normal": normal,
        "heavy tails": normal / other.abs().clamp_min(0.1),
        "uniform": torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) - 0.5,
        "two sides": normal.sign() * (1 + 0.1 * other),
        "pruned": normal * (normal.abs() > 0.7),
    }[kind]
    types = [affine_type(bits, 32, torch.bfloat16) for bits in (2, 4, 8)] + [*TYPES.values()]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert lossless_type(weight_OI.to(dtype), types) is None


def test_the_smallest_type_with_the_values_is_chosen():
    dense_OI = quantised("Q4_0", weights()).dense().bfloat16()
    assert lossless_type(dense_OI, TYPES.values()).name == "Q4_0"
    larger = on_lattice(dense_OI, TYPES["Q8_0"])
    assert torch.equal(larger.dense().bfloat16(), dense_OI)
    # Of FP4 all values are multiples of half its scale.
    fp4_OI = quantised("MXFP4", weights()).dense().bfloat16()
    assert lossless_type(fp4_OI, TYPES.values()).name == "MXFP4"
    affine = on_lattice(fp4_OI, affine_type(5, 32, torch.bfloat16))
    assert torch.equal(affine.dense().bfloat16(), fp4_OI)
