"""Input statistics against float64 sums over everything at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.kernels import library as kernels
from prunus.methods.statistics import InputStatistics, StatisticsSpec, statistics_bytes
from refusals import assert_refused


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 20), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_sums_over_batches_are_sums_over_all_tokens(batches, width, seed):
    X_TI = torch.randn(sum(batches), width, generator=torch.Generator().manual_seed(seed))
    statistics, norms = InputStatistics(width, "gram"), InputStatistics(width, "norms")
    for X in X_TI.split(batches):
        statistics.add(X)
        norms.add(X)
    assert statistics.tokens == len(X_TI) and norms.gram_II is None
    assert torch.equal(norms.sum_squares_I, statistics.sum_squares_I)
    gram_II = X_TI.double().T @ X_TI.double()
    torch.testing.assert_close(statistics.sum_squares_I, gram_II.diagonal(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(
        statistics.norms_I, gram_II.diagonal().sqrt().float(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(statistics.gram_II.double(), gram_II, rtol=1e-5, atol=1e-4)


def test_long_batches_are_summed_in_parts(monkeypatch):
    monkeypatch.setattr("prunus.methods.statistics._CPU_ELEMENTS", 10)
    X_TI = torch.randn(101, 4)
    statistics = InputStatistics(4, "norms")
    statistics.add(X_TI)
    torch.testing.assert_close(
        statistics.sum_squares_I, X_TI.double().square().sum(dim=0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_does_not_overflow(dtype):
    X_TI = torch.full((100, 3), 60000.0, dtype=dtype)
    statistics = InputStatistics(3, "gram")
    statistics.add(X_TI)
    expected = 100 * X_TI[0, 0].double() ** 2
    assert statistics.sum_squares_I[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert statistics.gram_II[0, 1].item() == pytest.approx(expected.item(), rel=1e-6)
    statistics.check_finite("q_proj")


def test_inputs_of_another_width_are_refused():
    add = InputStatistics(5, "norms").add
    assert_refused(
        ValueError, r"expected inputs \(tokens, 5\), got \(3, 4\)", add, torch.ones(3, 4)
    )
    assert_refused(ValueError, r"expected inputs \(tokens, 5\), got \(5,\)", add, torch.ones(5))
    assert_refused(ValueError, "not 'hessian'", InputStatistics, 5, "hessian")


@pytest.mark.parametrize("needs", ["none", "norms", "gram"])
def test_the_stated_bytes_are_those_of_the_tensors(needs):
    statistics = InputStatistics(33, needs)
    held = (statistics.sum_squares_I, statistics.gram_II)
    assert statistics_bytes(33, needs) == sum(x.nbytes for x in held if x is not None)


@pytest.mark.parametrize("isa", ["off", *kernels.ISAS])
@pytest.mark.parametrize("width", [1, 17, 96, 600])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-6), (torch.float32, 2**-8)])
def test_a_gram_of_bfloat16_inputs_is_exact_and_of_others_close(
    monkeypatch, isa, width, dtype, tolerance
):
    best = kernels.load_kernels("best")
    if isa != "off" and (best is None or kernels.ISAS.index(isa) > best.isa):
        pytest.skip(
            f"no kernels here, or a processor without {isa}: a machine that has it runs this"
        )
    monkeypatch.setenv("PRUNUS_ISA", isa)
    X_TI = torch.randn(1101, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    statistics = InputStatistics(width, StatisticsSpec(needs="gram", drift="some", rounded=True))
    for part_TI in X_TI.split([1, 0, 31, 999, 70]):
        statistics.add(part_TI, part_TI if len(part_TI) == 70 else None)
    X_TI, paired_TI = X_TI.double(), X_TI[-70:].double()
    for gram_II, Y_TI in ((statistics.gram_II, X_TI), (statistics.drift_gram_II, paired_TI)):
        error_II = (gram_II.double() - Y_TI.T @ Y_TI).abs()
        assert bool((error_II <= tolerance * (Y_TI.abs().T @ Y_TI.abs())).all())
    X_TI = X_TI.to(dtype)
    X_TI[600, width // 2] = torch.nan
    statistics.add(X_TI)
    bad_II = statistics.gram_II.isnan()
    assert bool(bad_II[width // 2].all()) and int(bad_II.sum()) == 2 * width - 1


def test_first_tokens_get_their_share_window_by_window():
    x, dense = torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= torch.tensor([[0.01], [9.0]])  # the second has more than its share
    statistics = InputStatistics(4, StatisticsSpec(needs="gram", drift="all", first_share=0.1))
    statistics.add(x, dense.reshape(-1, 4))
    factor = (x[0, 1:].square().sum() / x[0, 0].square().sum() / 9).sqrt()
    x[0, 0], dense[0, 0] = factor * x[0, 0], factor * dense[0, 0]
    X_TI, Y_TI = x.reshape(-1, 4), dense.reshape(-1, 4)
    assert torch.allclose(statistics.gram_II, X_TI.T @ X_TI, rtol=1e-5)
    assert torch.allclose(statistics.drift_II, (Y_TI - X_TI).T @ X_TI, rtol=1e-4, atol=1e-4)
