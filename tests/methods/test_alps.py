"""The ADMM operator against exact inverses, and ALPS on wide linears with few tokens."""

import pytest
import torch
from torch import Tensor

from method_cases import gather
from prunus.methods import METHODS, MethodOptions
from prunus.methods.alps import OVER_RELAXATION, from_spectrum, penalties
from prunus.methods.dense_targets import drift_is_worthwhile
from prunus.methods.patterns import Pattern
from prunus.methods.solvers.least_squares import ScaledGram, is_data_limited, ridge, scaled_gram_of
from prunus.methods.statistics import InputStatistics


@pytest.fixture
def wide_from_64(monkeypatch):
    monkeypatch.setattr("prunus.methods.solvers.least_squares._WIDE", 64)


def decaying(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs whose Gram matrix has a few large eigenvalues, and many small ones."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(tokens, width, generator=generator)
    turn_II = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return draw * (1 + 12 * torch.arange(1, width + 1) ** -0.7) @ turn_II


def data_limited_example(width: int = 256) -> tuple[Tensor, InputStatistics, ScaledGram]:
    weight_OI = torch.randn(48, width, generator=torch.Generator().manual_seed(1))
    statistics = gather(decaying(2 * width, width))
    return weight_OI, statistics, scaled_gram_of(statistics, None)


def exact(scaled: ScaledGram, penalty: float) -> Tensor:
    identity_II = torch.eye(len(scaled.gram_II), dtype=torch.float64)
    inverse_II = torch.linalg.inv(scaled.gram_II.double() + penalty * identity_II)
    return OVER_RELAXATION * penalty * inverse_II + (1 - OVER_RELAXATION) * identity_II


def test_only_wide_linears_with_few_tokens_are_data_limited(wide_from_64):
    assert is_data_limited(64, ridge(64, 320))
    assert not is_data_limited(64, ridge(64, 321)), "five tokens for each input"
    assert not is_data_limited(63, ridge(63, 100)), "narrow"
    assert (
        drift_is_worthwhile(64, 320),
        drift_is_worthwhile(64, 321),
        drift_is_worthwhile(63, 100),
    ) == (False, True, True)


def test_the_spectrum_replaces_inverses(wide_from_64):
    weight_OI, statistics, scaled = data_limited_example()
    operator = from_spectrum(statistics, scaled, len(weight_OI))
    for penalty in penalties(scaled, 5):
        expected_OI = weight_OI @ exact(scaled, penalty).float()
        found_OI = weight_OI @ operator(penalty).float()
        assert float((found_OI - expected_OI).norm() / expected_OI.norm()) < 0.25
        diagonal_OI = weight_OI * float(exact(scaled, penalty).diagonal().mean())
        assert (found_OI - expected_OI).norm() < 0.65 * (diagonal_OI - expected_OI).norm()


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(group="layer"), Pattern(2, 4)], ids=repr)
def test_with_few_tokens_alps_is_nearly_as_good_as_with_inverses(pattern, monkeypatch):
    weight_OI, statistics, scaled = data_limited_example()

    def error(method: str) -> float:
        pruned = METHODS[method].prune(weight_OI, statistics, pattern, 0.5)
        change_OI = (pruned.weight_OI - weight_OI) * scaled.scale_I
        return float((change_OI @ scaled.gram_II * change_OI).sum())

    by_inverses = error("alps")
    monkeypatch.setattr("prunus.methods.solvers.least_squares._WIDE", 64)
    found = error("alps")
    assert found != by_inverses
    assert found < 1.05 * by_inverses
    assert found < 0.85 * error("wanda")


def test_rows_in_runs_are_pruned_as_all_at_once(wide_from_64, monkeypatch):
    weight_OI, statistics, _ = data_limited_example()
    for pattern in (Pattern(), Pattern(group=3), Pattern(group="layer"), Pattern(4, 8)):
        whole = METHODS["alps"].prune(weight_OI, statistics, pattern, 0.5)
        monkeypatch.setattr("prunus.hardware.numerics._ELEMENTS_AT_A_TIME", 10 * 256)
        runs = METHODS["alps"].prune(weight_OI, statistics, pattern, 0.5)
        monkeypatch.undo()
        monkeypatch.setattr("prunus.methods.solvers.least_squares._WIDE", 64)
        assert (whole.keep_OI == runs.keep_OI).float().mean() > 0.999
        torch.testing.assert_close(whole.weight_OI, runs.weight_OI, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wide", [64, 4096])
def test_what_is_no_gram_matrix_is_refused(wide, monkeypatch):
    monkeypatch.setattr("prunus.methods.solvers.least_squares._WIDE", wide)
    weight_OI, statistics, _ = data_limited_example(64)
    statistics._derived.clear()
    assert statistics.gram_II is not None
    statistics.gram_II.fill_(float("nan"))
    with pytest.raises(ValueError, match="is it finite"):
        METHODS["alps"].prune(weight_OI, statistics, Pattern(), 0.5, MethodOptions(damping=0.99))
