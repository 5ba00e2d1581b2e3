"""The format of one weight: lossless, checked, and as the documentation says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.sparse import kernels
from prunus.sparse.bitmap import PackedWeight, check, expand, pack_weight, packed_nbytes, relative_error
from sparse_reference import bitmap, random_sparse

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "bitmap-format.md"


@pytest.fixture(params=["best", "off"])
def _engine(request, monkeypatch):
    """Once with the kernels, once in torch alone."""
    if request.param == "off":
        monkeypatch.setenv("PRUNUS_ISA", "off")
    elif kernels.load() is None:
        pytest.skip(f"no kernels: {kernels.why_not()}")


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 9), (2, 31), (7, 64), (4, 100)])
def test_layout_is_that_of_the_slow_version(dtype, shape):
    weight = random_sparse(*shape, 0.5, dtype)
    packed = pack_weight(weight, dtype)
    mask, values = bitmap(weight)
    assert packed.mask.tolist() == mask
    assert packed.values.tolist() == values
    lengths = [sum(bin(byte).count("1") for byte in row) for row in mask]
    assert check(packed).diff().tolist() == lengths
    assert torch.equal(expand(packed), weight)
    assert packed.nbytes == packed_nbytes(*shape, len(values), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_pattern_survives(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(256, 256)
    weight = patterns.view(dtype)
    packed = pack_weight(weight, dtype)
    assert packed.values.shape[0] == 2**16 - 1, "+0.0 alone counts as pruned; -0.0 and NaN are values"
    check(packed)
    assert torch.equal(expand(packed).view(torch.int16), patterns)


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0, 1), st.floats(1e-30, 1e30), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_int8_is_within_half_a_level(rows, columns, density, size, seed):
    weight = random_sparse(rows, columns, density, torch.float32, seed) * size
    packed = pack_weight(weight, torch.int8)
    check(packed)
    dense = expand(packed, torch.float32)
    assert ((dense - weight).abs() <= packed.scales[:, None] * 0.5001).all()
    assert torch.equal(packed.mask, pack_weight(weight.bfloat16(), torch.bfloat16).mask)
    error = ((dense - weight).double().square().sum() / weight.double().square().sum()).nan_to_num(0)
    assert relative_error(weight, packed) == pytest.approx(float(error))


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_is_rounded_once(dtype):
    packed = pack_weight(random_sparse(6, 77, 0.5, torch.bfloat16), torch.int8)
    exact = torch.zeros(6, 77)
    bits = (packed.mask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    exact[bits.reshape(6, -1)[:, :77].bool()] = packed.values.float()
    assert torch.equal(expand(packed, dtype), (exact * packed.scales[:, None]).to(dtype))


def test_rows_too_small_for_a_scale():
    weight = torch.tensor([[0.0, 1e-45], [0.0, 0.0]])
    packed = pack_weight(weight, torch.int8)
    assert packed.scales.tolist() == [1.0, 1.0]
    assert packed.values.tolist() == [0]


@pytest.mark.parametrize(
    ("weight", "values", "message"),
    [
        (torch.ones(2, 2), torch.bfloat16, "without loss"),
        (torch.ones(2, 2), torch.float32, "without loss"),
        (torch.ones(2, 2).half(), torch.bfloat16, "without loss"),
        (torch.ones(2, 2).double(), torch.int8, "must be bfloat16, float16 or float32"),
        (torch.tensor([[1.0, torch.inf]]), torch.int8, "infinite or not a number"),
        (torch.tensor([[1.0, torch.nan]]), torch.int8, "infinite or not a number"),
    ],
)
def test_what_cannot_be_packed(weight, values, message):
    with pytest.raises(ValueError, match=message):
        pack_weight(weight, values)


def _damaged():
    good = pack_weight(random_sparse(4, 20, 0.5, torch.bfloat16), torch.int8)
    mask, values, scales = good.mask, good.values, good.scales
    flipped, beyond = mask.clone(), mask.clone()
    flipped[1, 0] ^= 1
    beyond[2, 2] |= 16
    yield "counts", PackedWeight(flipped, values, scales, 20), "weights but there are"
    yield "padding", PackedWeight(beyond, values, scales, 20), "beyond its 20 columns"
    yield "short", PackedWeight(mask, values[:-1], scales, 20), "weights but there are"
    yield "width", PackedWeight(mask, values, scales, 30), "must be uint8"
    yield "mask dtype", PackedWeight(mask.to(torch.int8), values, scales, 20), "must be uint8"
    yield "flat mask", PackedWeight(mask.flatten(), values, scales, 20), "must be uint8"
    yield "no rows", PackedWeight(mask[:0], values[:0], scales[:0], 20), "at least one row"
    yield "matrix of values", PackedWeight(mask, values[None], scales, 20), "must be one row"
    yield "values dtype", PackedWeight(mask, values.int(), scales, 20), "must be one row"
    yield "no scales", PackedWeight(mask, values, None, 20), "int8 values need scales"
    yield "idle scales", PackedWeight(mask, values.bfloat16(), scales, 20), "no others have them"
    yield "few scales", PackedWeight(mask, values, scales[:2], 20), "scales must be float32"
    yield "scales dtype", PackedWeight(mask, values, scales.double(), 20), "scales must be float32"
    yield "infinite scale", PackedWeight(mask, values, scales / 0, 20), "infinite or not a number"


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize(("packed", "message"), [pytest.param(p, m, id=name) for name, p, m in _damaged()])
def test_damage_is_found(packed, message):
    with pytest.raises(ValueError, match=message):
        check(packed)


def test_the_documented_example_is_true():
    text = DOCUMENT.read_text()
    example = text[text.index("## Example") :]
    block = re.findall(r"```text\n(.*?)```", example, flags=re.DOTALL)
    weight = torch.tensor([[float(n) for n in line.split()] for line in block[0].strip().splitlines()])
    packed = pack_weight(weight.bfloat16(), torch.bfloat16)
    told = dict(line.split(":", 1) for line in block[1].strip().splitlines())
    assert [int(byte, 16) for byte in told["weight_mask"].split()] == packed.mask.flatten().tolist()
    assert [float(value) for value in told["weight"].split()] == packed.values.tolist()
    assert [int(offset) for offset in told["row offsets"].split()] == check(packed).tolist()
    levels = pack_weight(weight.bfloat16(), torch.int8)
    assert [int(value) for value in told["weight (int8)"].split()] == levels.values.tolist()
    assert [float(scale) for scale in told["weight_scales"].split()] == pytest.approx(levels.scales.tolist())
