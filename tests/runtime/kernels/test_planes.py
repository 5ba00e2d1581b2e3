"""Kernels for quantised weights against a slow reference, with every instruction set here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plane_products import dense, plane_weight, rounded_inputs
from processors import processor_threads
from prunus.runtime.kernels import library as kernels
from prunus.runtime.planes import check
from prunus.runtime.weight import PlaneCode

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
CHAINS = [
    PlaneCode(0, (1, 1, 1, 1, 2)),
    PlaneCode(0, (2, 1, 1, 2, 2)),
    PlaneCode(0, (3, 2, 2, 3)),
    PlaneCode(1, (1, 1, 1, 2, 3)),
    PlaneCode(1, (3, 2, 2, 3)),
    PlaneCode(2, (2, 2, 2, 3)),
    PlaneCode(0, ()),
]
_best = kernels.load()
if _best is None:
    pytest.skip(f"no kernels: {kernels.why_not()}", allow_module_level=True)
ISAS = kernels.ISAS[: _best.library.prunus_best_isa() + 1]

code = st.one_of(
    st.sampled_from(CHAINS),
    st.builds(
        PlaneCode, st.integers(0, 3), st.lists(st.integers(1, 4), min_size=1, max_size=8).map(tuple)
    ),
)


def random_levels(rows, columns, codes, classes, spread, seed):
    """Integers of about this spread, with some of the largest ones."""
    generator = torch.Generator().manual_seed(seed)
    levels = (torch.randn(rows, columns, generator=generator) * spread).round()
    extreme = torch.rand(rows, columns, generator=generator)
    levels[extreme < 0.004] = -127
    levels[extreme > 0.996] = 127
    most = torch.tensor([127 - (1 << codes[k].raw >> 1) for k in classes])
    return torch.minimum(levels.clamp(-127, 127), most).to(torch.int8)


def random_weight(rows, columns, codes, rows_per_chunk, spread, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    classes = torch.randint(0, len(codes), (columns,), generator=generator).tolist()
    levels = random_levels(rows, columns, codes, classes, spread, seed)
    return levels, plane_weight(levels, classes, codes, rows_per_chunk, seed)


def check_weight(isa, levels, weight, tokens, dtype, with_bias):
    """Check all that a kernel computes, and return the widths of the lines of each class."""
    engine = kernels.load(isa)
    lines, _ = engine.lines(weight)
    exact = dense(levels, weight)
    for out_dtype in FLOATS:
        out = torch.full(weight.shape, torch.nan, dtype=out_dtype)
        engine.expand(weight, lines, out)
        assert torch.equal(out, exact.to(out_dtype))
    rows = torch.tensor([weight.shape[0] - 1, 0, weight.shape[0] // 2])
    some = torch.empty(3, weight.shape[1], dtype=dtype)
    engine.expand_rows(weight, lines, rows, some)
    assert torch.equal(some, exact[rows].to(dtype))
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
    bias = torch.randn(weight.shape[0], generator=generator).to(dtype) if with_bias else None
    found = engine.linear(x, weight, lines, bias)
    if isa == "amx" and dtype is torch.bfloat16 and tokens > 16:  # tile registers multiply them
        scaled = (x * weight.steps).double()
    else:
        # One token has a kernel of its own, which gives the same bits.
        assert torch.equal(engine.linear(x[:1], weight, lines, bias), found[:1])
        scaled = rounded_inputs(x, weight)
    by_scale = levels.double() * weight.scales.double()[:, None]
    expected = scaled @ by_scale.T + (0 if bias is None else bias.double())
    bound = 1e-5 * (scaled.abs() @ by_scale.abs().T) + 1e-6
    bound += torch.finfo(dtype).eps * expected.abs()
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= bound).all()
    return lines[: len(weight.codes)].tolist()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 400),
    codes=st.lists(code, min_size=1, max_size=4).map(tuple),
    rows_per_chunk=st.integers(1, 40),
    spread=st.sampled_from([0.0, 0.3, 0.8, 2.0, 6.0, 40.0]),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_weight(
    isa, rows, columns, codes, rows_per_chunk, spread, tokens, dtype, with_bias, seed
):
    levels, weight = random_weight(rows, columns, codes, rows_per_chunk, spread, seed)
    check_weight(isa, levels, weight, tokens, dtype, with_bias)


@pytest.mark.parametrize("isa", ISAS)
def test_every_pair_of_bits_and_raw_bits(isa):
    widths = set()
    cases = [(bits, raw, part) for bits in range(1, 5) for raw in range(4) for part in (1, 0.12)]
    for bits, raw, part in cases:
        codes, spread = (PlaneCode(raw, (bits,)), PlaneCode(raw, (bits, bits))), 1 << (raw + bits)
        levels, weight = random_weight(5, 700, codes, 2, part * spread, bits * 4 + raw)
        widths |= {*check_weight(isa, levels, weight, 1, torch.float32, False)}
    assert widths >= ({2, 4, 8} if isa == "avx2" else {4, 5, 7, 8}), "AVX2 has its own price"


@pytest.mark.parametrize("isa", ISAS)
def test_narrow_lines_and_no_exceptions_or_many(isa):
    odd_shares = {1: (0.0, 0.002), 2: (0.0, 0.02), 3: (0.0,), 4: (0.1,), 6: (0.0,), 7: (0.1,)}
    for width, odd in ((width, odd) for width, odds in odd_shares.items() for odd in odds):
        torch.manual_seed(width)
        levels = torch.randint(-(1 << width - 1), 1 << width - 1, (21, 500)).to(torch.int8)
        # Several exceptions hold a large difference, and one a small one.
        levels[torch.rand(21, 500) < odd] = -12 if odd == 0.02 else -121
        weight = plane_weight(levels, [0] * 500, (CHAINS[1],), 5)
        assert check_weight(isa, levels, weight, 3, FLOATS[0], True) == [width] or odd == 0.1


@pytest.mark.parametrize("isa", ISAS)
def test_classes_without_columns_layers_without_values_and_many_tokens(isa):
    codes = (PlaneCode(0, (2, 1, 1)), PlaneCode(1, (3, 2)), PlaneCode(0, ()), PlaneCode(0, (1,)))
    levels = torch.zeros(1, 70, dtype=torch.int8)
    for which in range(4):
        weight = plane_weight(levels, [which] * 70, codes, 3)
        check_weight(isa, levels, weight, 2, torch.float32, False)
    levels, weight = random_weight(45, 300, (CHAINS[1], CHAINS[4]), 10, 3.0, 1)
    for many in (16, 33, 530):
        for dtype in (torch.float32, torch.bfloat16):
            check_weight(isa, levels, weight, many, dtype, True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [2, 33])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(isa, poison, tokens):
    levels = torch.ones(3, 300, dtype=torch.int8)
    weight = plane_weight(levels, [0] * 300, (CHAINS[1],), 2)
    engine = kernels.load(isa)
    x = torch.zeros(tokens, 300, dtype=torch.bfloat16)
    x[1, 7] = poison
    out = engine.linear(x, weight, check(weight), None)
    assert torch.equal(out[0], torch.zeros(3, dtype=torch.bfloat16))
    assert not torch.isfinite(out[1]).any()


def test_threads_do_not_change_the_result():
    _, weight = random_weight(700, 200, (CHAINS[0], CHAINS[2]), 20, 1.0, 2)
    lines = check(weight)
    x = torch.randn(3, 200)
    results = []
    for threads in (1, 3):
        with processor_threads(threads):
            out = torch.empty(weight.shape)
            _best.expand(weight, lines, out)
            results.append((_best.linear(x, weight, lines, None), out))
            results.append((_best.linear(x[:1], weight, lines, None), out))
    for one, other in ((0, 2), (1, 3)):
        assert all(torch.equal(*pair) for pair in zip(results[one], results[other], strict=True))


def test_a_row_that_does_not_exist_is_refused():
    _, weight = random_weight(4, 70, (CHAINS[0],), 2, 1.0, 3)
    with pytest.raises(IndexError, match="there are 4 rows"):
        _best.expand_rows(weight, check(weight), torch.tensor([4]), torch.empty(1, 70))
