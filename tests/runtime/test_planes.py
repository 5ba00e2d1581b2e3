"""Quantised weights in bit planes: the layout, the choice of codes, and what a reader refuses."""

import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from places import REPOSITORY
from plane_reference import random_levels, read_planes, write_planes
from prunus.runtime import plane_codes
from prunus.runtime.description import QuantizedShape
from prunus.runtime.plane_codes import (
    choose_codes,
    code_lengths,
    column_histograms,
    default_rows_per_chunk,
    max_level,
)
from prunus.runtime.planes import check, decode_levels, encode, expand, expand_rows
from prunus.runtime.weight import PlaneCode, QuantizedWeight

CODES = [
    PlaneCode(0, ()),
    PlaneCode(0, (1,)),
    PlaneCode(0, (2, 1, 1, 2, 2)),
    PlaneCode(1, (1, 1, 1, 2, 3)),
    PlaneCode(2, (2, 2, 2, 3)),
    PlaneCode(3, (4,)),
    PlaneCode(0, (4, 4, 4, 4, 4, 4, 4, 4)),
    PlaneCode(0, (1, 1, 1, 1, 1, 1, 1, 1)),
]


def quantized(levels, codes=None, classes=None, rows_per_chunk=None) -> QuantizedWeight:
    """A weight with scales and steps that are not 1."""
    rows, columns = levels.shape
    if codes is not None and classes is None:
        classes = torch.arange(columns, dtype=torch.uint8) % len(codes)
    steps, scales = torch.linspace(0.5, 2, columns), torch.linspace(-1, 3, rows)
    return encode(levels, steps, scales, classes, codes or (), rows_per_chunk)


@pytest.mark.parametrize("codes", [[c] for c in CODES] + [CODES[:4], CODES[4:], CODES[2:4]])
@pytest.mark.parametrize(("rows", "columns", "chunk"), [(1, 1, None), (5, 70, 2), (7, 200, 3)])
def test_layout_is_that_of_the_slow_version(codes, rows, columns, chunk):
    levels = random_levels(rows, columns, 3)
    levels[0, 0] = -127
    weight = quantized(levels, codes, rows_per_chunk=chunk)
    slow = write_planes(
        levels.tolist(), weight.classes.tolist(), codes, chunk or default_rows_per_chunk(columns)
    )
    assert bytes(weight.data.tolist()) == slow
    assert read_planes(weight) == levels.tolist()
    assert torch.equal(decode_levels(weight), levels)


@given(
    st.integers(1, 9),
    st.integers(1, 150),
    st.floats(0.01, 60),
    st.integers(1, 5),
    st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_any_levels_come_back(rows, columns, spread, chunk, seed):
    levels = random_levels(rows, columns, spread, seed)
    weight = quantized(levels, rows_per_chunk=chunk)
    check(weight)
    assert torch.equal(decode_levels(weight), levels)
    assert read_planes(weight) == levels.tolist()


@pytest.mark.parametrize("code", CODES)
def test_every_value_has_a_code(code):
    """A column of every value takes as many bits as the code says, up to padding."""
    levels = torch.arange(-127, max_level(code.raw) + 1).to(torch.int8)[:, None].repeat(1, 64)
    weight = quantized(levels, [code], rows_per_chunk=255)
    assert torch.equal(decode_levels(weight), levels)
    assert weight.data.shape[0] * 8 == 64 * float(code_lengths(code)[: len(levels)].sum())


def test_levels_that_raw_bits_leave_no_room_for():
    levels = torch.full((3, 64), 126, dtype=torch.int8)
    with pytest.raises(ValueError, match="2 raw bits holds levels up to 125, got 126"):
        quantized(levels, [PlaneCode(2, (1,))])
    spread = random_levels(500, 64, 40)
    spread[0] = 127
    assert [code.raw for code in choose_codes(column_histograms(spread))[1]] == [0]


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_expand_rounds_once(dtype):
    levels = random_levels(9, 77, 20)
    weight = quantized(levels, rows_per_chunk=4)
    exact = levels.double() * weight.steps.double() * weight.scales.double()[:, None]
    assert torch.equal(exact, exact.float().double()), "24 bits hold every product"
    dense = expand(weight, dtype)
    assert torch.equal(dense, exact.float().to(dtype))
    rows = torch.tensor([[8, 0, 3], [3, 4, 8]])
    assert torch.equal(expand_rows(weight, rows, check(weight), dtype), dense[rows])
    with pytest.raises(IndexError, match="0 to 8"):
        expand_rows(weight, torch.tensor([9]), None, dtype)


def test_chosen_codes_are_the_best(monkeypatch):
    """Against all chains of up to three layers, on a weight so tall that padding is nothing."""
    levels = random_levels(4000, 64, 1.5)
    histograms = column_histograms(levels)
    assert histograms.sum(1).tolist() == [4000] * 64
    assert histograms[3, 127].item() == int((levels[:, 3] == 0).sum())
    monkeypatch.setattr(plane_codes, "MAX_CLASSES", 1)
    monkeypatch.setattr(plane_codes, "CHUNK_WEIGHTS", 4000 * 64)
    monkeypatch.setattr(plane_codes, "CYCLE_PRICE", 0)
    classes, codes = choose_codes(histograms)
    assert classes.unique().tolist() == [0]
    totals = histograms.sum(0).float()
    chosen = float(code_lengths(codes[0]) @ totals)
    for raw in range(4):
        for layers in itertools.chain.from_iterable(
            itertools.product((1, 2, 3, 4), repeat=length) for length in (1, 2, 3)
        ):
            assert chosen <= float(code_lengths(PlaneCode(raw, layers)) @ totals) * 1.001
    layers = len(codes[0].layers)
    monkeypatch.setattr(plane_codes, "CYCLE_PRICE", 0.5)
    assert len(choose_codes(histograms)[1][0].layers) < layers


def test_classes_separate_columns_of_different_rates(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.3] * 64 + [20.0] * 64)[torch.randperm(128, generator=generator)]
    levels = (torch.randn(1000, 128, generator=generator) * spread).round().to(torch.int8)
    classes, codes = choose_codes(column_histograms(levels))
    assert len(codes) == 2
    assert torch.equal(classes.bool(), spread > 1)
    several = quantized(levels, codes, classes)
    monkeypatch.setattr(plane_codes, "MAX_CLASSES", 1)
    assert several.nbytes < 0.9 * quantized(levels).nbytes


def test_the_choice_predicts_the_size():
    levels = random_levels(600, 320, 1.2)
    weight = quantized(levels)
    lengths = torch.stack([code_lengths(code) for code in weight.codes])[weight.classes.int()]
    predicted = float((lengths * column_histograms(levels)).sum()) / 8
    assert predicted <= weight.data.shape[0] <= predicted * 1.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels_OI": torch.zeros(2, 3)}, "int8 matrix"),
        ({"levels_OI": torch.full((2, 3), -128, dtype=torch.int8)}, "got -128"),
        ({"classes_I": torch.zeros(2, dtype=torch.uint8)}, "classes .* must be"),
        ({"classes_I": torch.ones(3, dtype=torch.uint8)}, "in class 1, but there are 1 codes"),
        ({"steps_I": torch.ones(4)}, "steps .* must be"),
        ({"scales_O": torch.tensor([1, torch.inf])}, "not a finite number"),
        ({"codes": ()}, "1 to 4 codes"),
        ({"codes": (PlaneCode(4, (1,)),)}, "0 to 3 raw bits"),
        ({"codes": (PlaneCode(1, ()),)}, "none without layers"),
        ({"codes": (PlaneCode(0, (5,)),)}, "1 to 4 bits"),
        ({"codes": (PlaneCode(0, (1,) * 9),)}, "at most 8 layers"),
        ({"rows_per_chunk": -1}, "rows_per_chunk must be at least 1"),
    ],
)
def test_what_cannot_be_encoded(change, message):
    arguments = {
        "levels_OI": torch.zeros(2, 3, dtype=torch.int8),
        "steps_I": torch.ones(3),
        "scales_O": torch.ones(2),
        "classes_I": torch.zeros(3, dtype=torch.uint8),
        "codes": (PlaneCode(0, (1,)),),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        encode(**arguments)
    with pytest.raises(ValueError, match=r"must be \(columns, 255\)"):
        choose_codes(torch.zeros(3, 254))


def test_the_documented_example_is_true():
    text = (REPOSITORY / "docs" / "reference" / "packed-format.md").read_text()
    text = text[text.rindex("### A quantised linear") :]
    blocks = re.findall(r"```(?:text|json)\n(.*?)```", text, flags=re.DOTALL)

    def matrix(block):
        return torch.tensor([[float(n) for n in line.split()] for line in block.splitlines()])

    levels, entry = matrix(blocks[0]).to(torch.int8), json.loads(blocks[1])
    parts = dict(line.split(":", 1) for line in blocks[2].splitlines())
    classes, steps, scales = (
        torch.tensor([float(n) for n in parts[f"weight_{name}"].split()])
        for name in ("classes", "steps", "scales")
    )
    described = QuantizedShape.from_json("example", entry)
    weight = encode(
        levels, steps, scales, classes.to(torch.uint8), described.codes, described.rows_per_chunk
    )
    data = bytes.fromhex("".join(line[:24] for line in blocks[3].splitlines()))
    assert bytes(weight.data.tolist()) == data
    assert QuantizedShape.of(weight) == described
    assert torch.equal(expand(weight, torch.float32), matrix(blocks[4]))
    assert read_planes(weight) == levels.tolist()


SHORT, LONG = "ends at byte|end before their last", "planes .* end at byte|follow their last"


def _damaged():
    good = quantized(random_levels(9, 70, 3), CODES[2:4], rows_per_chunk=4)
    data = good.data
    zeros = torch.zeros(1, 64, dtype=torch.int8)
    zeros[0, 3] = 100
    two = quantized(zeros, [PlaneCode(0, (1, 1))])
    layer, tail = two.data.clone(), two.data.clone()
    layer[8 + 1], tail[16 + 1] = 1, 1
    raw = quantized(zeros, [PlaneCode(2, (1,))])
    far = raw.data.clone()
    far[-8] = 99
    # The escape byte of the 100: with raw bits its top alone is in range.
    lowest, lower = two.data.clone(), raw.data.clone()
    lowest[16], lower[-8] = 128, 256 - 32
    # The kernels would hold these in a byte: -132 as an escape, and as a top that a layer names.
    escaped = quantized(zeros, [PlaneCode(3, (1, 3))])
    escaped.data[-8] = 256 - 16
    zeros[0, 3] = -127
    named = quantized(zeros, [PlaneCode(3, (4, 4, 2))])
    named.data[32:56], named.data[-16], named.data[-8] = 0, 1, 0
    return [
        ("short", good._replace(data=data[:-8]), SHORT),
        ("empty", good._replace(data=data[:0]), SHORT),
        ("long", good._replace(data=torch.cat([data, data[:8]])), LONG),
        ("data dtype", good._replace(data=data.view(torch.int8)), "one row of bytes"),
        ("matrix", good._replace(data=data[None]), "one row of bytes"),
        ("wider", good._replace(shape=(9, 71)), "classes .* must be"),
        ("taller", good._replace(shape=(10, 70)), "scales .* must be"),
        ("no rows", good._replace(shape=(0, 70)), "cannot have 0 x 70"),
        ("class", good._replace(classes=good.classes + 1), "in class 2"),
        ("chunk", good._replace(rows_per_chunk=0), "rows_per_chunk"),
        ("nan", good._replace(steps=good.steps * torch.nan), "not a finite number"),
        ("padding of a layer", two._replace(data=layer), "padding of a layer"),
        ("escaped value", raw._replace(data=far), "escaped value"),
        ("padding of escapes", two._replace(data=tail), "padding of"),
        ("level", two._replace(data=lowest), "level.* below -127"),
        ("level with raw bits", raw._replace(data=lower), "level.* below -127"),
        ("level that does not fit in a byte", escaped, "level.* below -127"),
        ("top above the highest", named, "level.* below -127"),
    ]


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize(
    ("weight", "message"), [pytest.param(w, m, id=name) for name, w, m in _damaged()]
)
def test_damage_is_found(weight, message):
    with pytest.raises(ValueError, match=message):
        check(weight)
