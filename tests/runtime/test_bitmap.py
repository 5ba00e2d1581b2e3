"""The format of one weight: lossless, checked, and as the documentation says."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_reference import bitmap, coded, levels_of, random_sparse, with_all_exponents
from places import REPOSITORY
from prunus.runtime.bitmap import check, expand, pack_weight
from prunus.runtime.coding import decode, encode
from prunus.runtime.forms import relative_error
from prunus.runtime.weight import PackedWeight

DOCUMENT = REPOSITORY / "docs" / "reference" / "packed-format.md"


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 9), (2, 31), (7, 64), (4, 100)])
def test_layout_is_that_of_the_slow_version(dtype, shape):
    weight = random_sparse(*shape, 0.5, dtype)
    packed = pack_weight(weight, dtype)
    mask, values = bitmap(weight)
    if packed.mask is not None:
        assert packed.mask.tolist() == mask
        lengths = [sum(bin(byte).count("1") for byte in row) for row in mask]
        assert check(packed).diff().tolist() == lengths
    if packed.coding is not None:
        values = torch.tensor(values).to(dtype) if packed.mask is not None else weight.flatten()
        low, *coding = coded(values)
        assert packed.values.tolist() == low
        assert [part.tolist() for part in packed.coding] == coding
    else:
        assert packed.values.tolist() == (
            weight.flatten().tolist() if packed.mask is None else values
        )
    assert torch.equal(expand(packed), weight)


def test_the_smallest_form_is_taken():
    half, most, all_ = (
        random_sparse(64, 256, density, torch.bfloat16)[1:-1] for density in (0.5, 0.95, 1.0)
    )
    assert pack_weight(half, torch.bfloat16).nbytes < 0.45 * half.nbytes
    for weight in (most, all_):
        packed = pack_weight(weight, torch.bfloat16)
        assert packed.mask is None, "a bit per weight costs more than the few zeros"
        assert packed.nbytes < 0.76 * weight.nbytes
        assert torch.equal(expand(packed), weight)
    assert pack_weight(most, torch.int8).mask is None
    assert pack_weight(half, torch.int8).mask is not None
    any_bits = torch.randint(-(2**15), 2**15, (64, 256), dtype=torch.int16).view(torch.bfloat16)
    assert pack_weight(any_bits, torch.bfloat16).coding is None, "all exponents need bytes"


@given(st.integers(1, 700), st.sampled_from([1, 16, 200]), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_coding_is_lossless(count, kinds, seed):
    """Whatever the bits: with few kinds of high bytes, with as many as there are codes, and with
    too many.
    """
    generator = torch.Generator().manual_seed(seed)
    high = torch.randint(0, kinds, (count,), generator=generator)
    high[torch.rand(count, generator=generator) < 0.001] = 255
    low = torch.randint(0, 256, (count,), generator=generator)
    values = torch.stack([low, high], dim=1).to(torch.uint8).flatten().view(torch.bfloat16)
    result = encode(values)
    if result is None:
        parts = coded(values)
        assert len(parts[4]) > count / 256 or sum(map(len, parts)) + 7 * len(parts[3]) >= 2 * count
        return
    low_bytes, coding = result
    assert low_bytes.tolist() == coded(values)[0]
    assert [part.tolist() for part in coding] == list(coded(values)[1:])
    assert torch.equal(
        decode(low_bytes, coding)[:count].view(torch.int16), values.view(torch.int16)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_pattern_survives(dtype):
    """+0.0 alone counts as pruned; -0.0 and NaN are values."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(256, 256)
    patterns = torch.stack([patterns, torch.zeros_like(patterns)], dim=2).view(256, 512)
    weight = patterns.view(dtype)
    packed = pack_weight(weight, dtype)
    check(packed)
    assert packed.values.shape[0] == 2**16 - 1
    assert torch.equal(expand(packed).view(torch.int16), patterns)


@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.floats(0, 1),
    st.floats(1e-30, 1e30),
    st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_int8_is_within_half_a_level(rows, columns, density, size, seed):
    weight = random_sparse(rows, columns, density, torch.float32, seed) * size
    packed = pack_weight(weight, torch.int8)
    check(packed)
    dense = expand(packed, torch.float32)
    assert ((dense - weight).abs() <= packed.scales[:, None] * 0.5001).all()
    assert not dense[weight == 0].any()
    error = ((dense - weight).double().square().sum() / weight.double().square().sum()).nan_to_num(
        0
    )
    assert relative_error(weight, packed) == pytest.approx(float(error))
    # Rows that are too small for a scale have the scale 1.
    packed = pack_weight(torch.tensor([[0.0, 1e-45], [0.0, 0.0]]), torch.int8)
    assert packed.scales.tolist() == [1.0, 1.0] and not packed.values.any()


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_is_rounded_once(dtype):
    packed = pack_weight(random_sparse(6, 77, 0.5, torch.bfloat16), torch.int8)
    assert torch.equal(
        expand(packed, dtype), (levels_of(packed) * packed.scales[:, None]).to(dtype)
    )


@pytest.mark.parametrize(
    ("weight", "values", "message"),
    [
        (torch.ones(2, 2), torch.bfloat16, "without loss"),
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
    large = pack_weight(
        with_all_exponents(random_sparse(40, 100, 0.5, torch.bfloat16)), torch.bfloat16
    )
    coding = large.coding
    assert coding is not None

    def with_coding(**parts):
        return large._replace(coding=coding._replace(**parts))

    return [
        ("counts", good._replace(mask=flipped), "are stored, but there are"),
        ("padding", good._replace(mask=beyond), "beyond its 20 columns"),
        ("short", good._replace(values=values[:-1]), "are stored, but there are"),
        ("width", good._replace(shape=(4, 30)), "must be uint8"),
        ("no mask", good._replace(mask=None), "80 weights are stored"),
        ("mask dtype", good._replace(mask=mask.to(torch.int8)), "must be uint8"),
        ("flat mask", good._replace(mask=mask.flatten()), "must be uint8"),
        ("no rows", PackedWeight((0, 20), values[:0], mask[:0], scales[:0]), "at least one row"),
        ("matrix of values", good._replace(values=values[None]), "must be one row"),
        ("values dtype", good._replace(values=values.int()), "must be one row"),
        ("no scales", good._replace(scales=None), "int8 values need scales"),
        ("idle scales", good._replace(values=values.bfloat16()), "no others have them"),
        ("few scales", good._replace(scales=scales[:2]), "scales must be float32"),
        ("scales dtype", good._replace(scales=scales.double()), "scales must be float32"),
        ("infinite scale", good._replace(scales=scales / 0), "infinite or not a number"),
        ("low bytes", large._replace(values=large.values[:-64]), "the low bytes of"),
        (
            "coded floats",
            large._replace(values=large.values.bfloat16()),
            "uint8 where they are coded",
        ),
        ("few codes", with_coding(codes=coding.codes[:-1]), "the codes of"),
        ("high bytes", with_coding(high_bytes=coding.high_bytes[:15]), "the high bytes of"),
        ("rare dtype", with_coding(rare_at=coding.rare_at.int()), "the places of rare values of"),
        ("few rare", with_coding(rare=coding.rare[:-1]), "the rare values of"),
        ("rare order", with_coding(rare_at=coding.rare_at.flip(0)), "must ascend"),
        ("rare below", with_coding(rare_at=coding.rare_at - coding.rare_at[0] - 1), "must ascend"),
        ("rare beyond", with_coding(rare_at=coding.rare_at + large.values.shape[0]), "must ascend"),
    ]


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize(
    ("packed", "message"), [pytest.param(p, m, id=name) for name, p, m in _damaged()]
)
def test_damage_is_found(packed, message):
    with pytest.raises(ValueError, match=message):
        check(packed)


def test_the_documented_example_is_true():
    text = DOCUMENT.read_text()
    example = text[text.index("## Examples") :]
    block = re.findall(r"```text\n(.*?)```", example, flags=re.DOTALL)

    def weight(index):
        return torch.tensor(
            [[float(n) for n in line.split()] for line in block[index].strip().splitlines()]
        )

    def told(index):
        return dict(line.split(":", 1) for line in block[index].strip().splitlines())

    def numbers(row, base=10):
        return [int(number, base) for number in row.split()]

    packed, levels = (
        pack_weight(weight(0).half(), torch.float16),
        pack_weight(weight(0).bfloat16(), torch.int8),
    )
    assert numbers(told(1)["weight_mask"], 16) == packed.mask.flatten().tolist()
    assert [float(value) for value in told(1)["weight"].split()] == packed.values.tolist()
    assert numbers(told(1)["row offsets"]) == check(packed).tolist()
    assert numbers(told(1)["weight (int8)"]) == levels.values.tolist()
    assert [float(scale) for scale in told(1)["weight_scales"].split()] == pytest.approx(
        levels.scales.tolist()
    )
    values = [1.5 * 4.0**-power for power in range(16) for _ in range(40)] + [-(2.0**-100)]
    low, coding = encode(torch.tensor(values, dtype=torch.bfloat16))
    assert numbers(told(2)["weight, first 64"], 16) == low[:64].tolist()
    assert numbers(told(2)["weight, last 64"], 16) == low[640:].tolist()
    assert numbers(told(2)["weight_codes, first 32"], 16) == coding.codes[:32].tolist()
    assert numbers(told(2)["weight_high_bytes"], 16) == coding.high_bytes.tolist()
    assert numbers(told(2)["weight_rare_at"]) == coding.rare_at.tolist()
    assert numbers(told(2)["weight_rare"], 16) == coding.rare.tolist()
