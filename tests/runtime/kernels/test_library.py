"""The compiled kernels against float64, with every instruction set that this machine has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_reference import levels_of, random_sparse, with_all_exponents
from processors import processor_threads
from prunus.runtime.bitmap import INT8_LEVELS, check, expand, pack_weight
from prunus.runtime.kernels import library as kernels
from prunus.runtime.weight import PackedWeight

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
_best = kernels.load()
if _best is None:
    pytest.skip(f"no kernels: {kernels.why_not()}", allow_module_level=True)
ISAS = kernels.ISAS[: _best.library.prunus_best_isa() + 1]


def _tolerance(x_TI, dense_OI, result_TO, rounded_activations):
    """Float32 sums, the rounding of the result, and with int8 values that of the activations."""
    x, weight = x_TI.double().abs(), dense_OI.double().abs()
    bound = 1e-6 * (x @ weight.T) + torch.finfo(x_TI.dtype).eps * result_TO.abs() + 1e-6
    if rounded_activations:
        bound += x.amax(dim=1, keepdim=True) * weight.sum(dim=1) / 65000
    return bound


def _compare(isa, dense_OI, values, x_TI, bias):
    engine = kernels.load(isa)
    packed = pack_weight(dense_OI, values)
    offsets = check(packed)
    out = engine.linear(x_TI, packed, offsets, bias)
    exact_OI = expand(packed, torch.float32) if values == torch.int8 else dense_OI
    expected = x_TI.double() @ exact_OI.double().T + (0 if bias is None else bias.double())
    assert out.dtype == x_TI.dtype
    assert out.shape == expected.shape
    error = (out.double() - expected).abs()
    assert (error <= _tolerance(x_TI, exact_OI, expected, values == torch.int8)).all(), float(
        error.max()
    )


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 400),
    tokens=st.integers(1, 16),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.98, 1.0]),
    stored=st.sampled_from([torch.bfloat16, torch.float16]),
    int8=st.booleans(),
    activations=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products_match_float64(
    isa, rows, columns, tokens, density, stored, int8, activations, with_bias, seed
):
    dense = random_sparse(rows, columns, density, stored, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, columns, generator=generator).to(activations)
    bias = torch.randn(rows, generator=generator).to(activations) if with_bias else None
    _compare(isa, dense, torch.int8 if int8 else stored, x, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33, 63, 64, 65, 127, 128, 576, 1000])
def test_expansion_is_exact(isa, columns):
    engine = kernels.load(isa)
    for dtype in (torch.bfloat16, torch.float16):
        dense = random_sparse(9, columns, 0.5, dtype)
        packed = pack_weight(dense, dtype)
        out = torch.full_like(dense, torch.nan)
        engine.expand(packed, check(packed), out)
        assert torch.equal(out.view(torch.int16), dense.view(torch.int16))
        levels = pack_weight(dense, torch.int8)
        engine.expand(levels, check(levels), out)
        assert torch.equal(out, (levels_of(levels) * levels.scales[:, None]).to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(40, 300), (3, 9001), (900, 65)])
def test_coded_values_with_rare_exponents(isa, density, shape):
    """Rare values are mended before they are used, in expansions and in products of any number of
    tokens.
    """
    dense = with_all_exponents(random_sparse(*shape, density, torch.bfloat16))
    packed = pack_weight(dense, torch.bfloat16)
    assert packed.coding is not None and packed.coding.rare.shape[0] > 0
    out, engine = torch.empty_like(dense), kernels.load(isa)
    engine.expand(packed, check(packed), out)
    assert torch.equal(out.view(torch.int16), dense.view(torch.int16))
    for tokens, dtype in ((1, torch.bfloat16), (5, torch.float32), (16, torch.bfloat16)):
        _compare(isa, dense, torch.bfloat16, torch.randn(tokens, shape[1]).to(dtype), None)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_rows_wider_than_the_buffer_and_extremes(isa):
    dense = random_sparse(3, 9001, 0.5, torch.bfloat16)
    packed = pack_weight(dense, torch.int8)
    out = torch.empty_like(dense)
    kernels.load(isa).expand(packed, check(packed), out)
    assert torch.equal(out, (levels_of(packed) * packed.scales[:, None]).bfloat16())
    ones = torch.ones(2, 4096, dtype=torch.bfloat16)
    ones[1] = -1
    assert pack_weight(ones, torch.int8).values.abs().max() == INT8_LEVELS
    _compare(isa, ones, torch.int8, torch.full((1, 4096), 3.0), None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(isa, values, poison):
    dense = random_sparse(4, 300, 1.0, torch.bfloat16)[1:]
    packed = pack_weight(dense, values)
    x = torch.zeros(2, 300, dtype=torch.bfloat16)
    x[1, 7] = poison
    out = kernels.load(isa).linear(x, packed, check(packed), None)
    assert torch.equal(out[0], torch.zeros(3, dtype=torch.bfloat16))
    assert not torch.isfinite(out[1]).any()


def test_threads_do_not_change_the_result():
    dense = random_sparse(700, 600, 0.5, torch.bfloat16)
    packed = pack_weight(dense, torch.bfloat16)
    x, offsets = torch.randn(3, 600).bfloat16(), check(packed)
    results = []
    for threads in (1, 3):
        with processor_threads(threads):
            results.append(_best.linear(x, packed, offsets, None))
    assert torch.equal(*results)


def test_dense_product():
    if not _best.has_bfloat16:
        pytest.skip("the dense kernel needs AVX-512 with BF16")
    for rows, columns, tokens in ((1, 1, 1), (5, 63, 2), (64, 64, 1), (33, 1000, 16), (9, 130, 5)):
        weight = torch.randn(rows, columns).bfloat16()
        x, bias = torch.randn(tokens, columns).bfloat16(), torch.randn(rows).bfloat16()
        out = _best.linear(x, PackedWeight((rows, columns), weight.view(-1)), None, bias)
        expected = x.double() @ weight.double().T + bias.double()
        assert ((out.double() - expected).abs() <= _tolerance(x, weight, expected, False)).all()
    # Nothing beyond a row is used.
    memory = torch.full((40,), torch.nan, dtype=torch.bfloat16)
    memory[:33] = 1
    x = torch.ones(1, 33, dtype=torch.bfloat16)
    assert _best.linear(x, PackedWeight((1, 33), memory[:33]), None, None).item() == 33


def test_wrong_counts_are_refused():
    packed = pack_weight(random_sparse(4, 70, 0.5, torch.bfloat16), torch.bfloat16)
    offsets = check(packed)
    with pytest.raises(RuntimeError, match="out of range"):
        _best.linear(
            torch.ones(1, 70).bfloat16(),
            packed._replace(values=packed.values[:-1].clone()),
            offsets,
            None,
        )


def test_unknown_instruction_set(monkeypatch):
    with pytest.raises(ValueError, match=", ".join(kernels.ISAS)):
        kernels.load("sse9")
    monkeypatch.setenv("PRUNUS_ISA", "off")
    assert kernels.load() is None
    assert kernels.why_not() == "switched off by PRUNUS_ISA=off"


def test_the_threads_are_those_of_torch():
    assert _best.runtime is not None, "torch brings an OpenMP library with GOMP_parallel on Linux"
