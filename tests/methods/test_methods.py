"""Each method against a slow reference, its guarantees, and the table that declares all methods."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import prunus
import reference
from method_cases import (
    BY_BLOCKS,
    PATTERNS,
    WEIRD,
    ThreeShards,
    example,
    gather,
    prune,
    weird_example,
)
from prunus.methods import (
    METHODS,
    Method,
    MethodOptions,
    Pruned,
    Work,
    check_options,
    compose,
    get_method,
)
from prunus.methods.alps import OVER_RELAXATION, from_spectrum, penalties
from prunus.methods.dense_targets import drift_is_worthwhile
from prunus.methods.patterns import Pattern
from prunus.methods.solvers.least_squares import (
    ScaledGram,
    conjugate_gradients,
    is_data_limited,
    ridge,
    scaled_gram_of,
)
from prunus.methods.solvers.obs import inverse_factor
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import UNSHARDED
from prunus.sweeping.grid import Sweep
from refusals import assert_refused
from tiny import tiny_checkpoint, token_ids, weights

# --- against the references ---


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_magnitude_and_wanda_equal_the_reference(pattern):
    weight_OI, X_TI = example(7, 12)
    pruned = prune("magnitude", weight_OI, X_TI, pattern)
    assert torch.equal(pruned.keep_OI, reference.magnitude_keep(weight_OI.abs(), pattern, 0.5))
    pruned = prune("wanda", weight_OI, X_TI, pattern)
    assert torch.equal(
        pruned.keep_OI, reference.keep_mask(reference.wanda_score(weight_OI, X_TI), pattern, 0.5)
    )


@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.97])
def test_the_variant_removes_the_same_share_of_every_row(sparsity):
    weight_OI, X_TI = example(20, 200)
    weight_OI *= torch.linspace(0.1, 3, 200) ** torch.randn(20, 1)
    pruned = prune("wanda-variant", weight_OI, X_TI, Pattern(), sparsity)
    expected = reference.variant_keep(reference.wanda_score(weight_OI, X_TI), pruned.notes["alpha"])
    # A sum in float32 may fall on the other side of α.
    assert (pruned.keep_OI == expected).float().mean() > 0.999
    assert (~pruned.keep_OI).float().mean().item() == pytest.approx(sparsity, abs=0.0011)
    assert len({int(count) for count in pruned.keep_OI.sum(dim=1)}) > 1


@pytest.mark.parametrize("pattern", [*BY_BLOCKS, Pattern(5, 6), Pattern(9, 20)], ids=repr)
@pytest.mark.parametrize("block", [1, 7, 20, 128])
def test_sparsegpt_equals_the_reference(pattern, block):
    weight_OI, X_TI = example(6, 60)
    X_TI[:, 13] = 0
    pruned = prune("sparsegpt", weight_OI, X_TI, pattern, block=block)
    gram_II = X_TI.double().T @ X_TI.double()
    weight, keep = reference.sparsegpt(weight_OI, gram_II, pattern, 0.5, block=block)
    assert torch.equal(pruned.keep_OI, keep)
    assert torch.equal(pruned.weight_OI[:, 13], torch.zeros(6))
    torch.testing.assert_close(pruned.weight_OI.double(), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_score_of_sparsegpt_alone_equals_the_reference(pattern):
    weight_OI, X_TI = example(7, 12)
    X_TI[:, 3] = 0
    gram_II = X_TI.double().T @ X_TI.double()
    mean = gram_II.diagonal().mean()
    dead_I = gram_II.diagonal() == 0
    inverse_II = torch.linalg.inv(gram_II + torch.diag(0.01 * mean + mean * dead_I))
    score_OI = weight_OI.double() ** 2 / inverse_II.diagonal()
    score_OI[:, dead_I] = 0
    pruned = prune("sparsegpt-score", weight_OI, X_TI, pattern)
    assert torch.equal(pruned.keep_OI, reference.keep_mask(score_OI, pattern, 0.5))


@pytest.mark.parametrize("pattern", BY_BLOCKS, ids=repr)
@pytest.mark.parametrize("mask_from", ["wanda", "magnitude"])
@pytest.mark.parametrize("mask_order", ["before", "blockwise"])
def test_the_ablations_equal_the_reference(pattern, mask_from, mask_order):
    weight_OI, X_TI = example(6, 60)
    pattern = replace(pattern, block_size=20)
    norms_I = (
        X_TI.double().norm(dim=0) if mask_from == "wanda" else torch.ones(60, dtype=torch.float64)
    )
    draw = reference.magnitude_keep if mask_from == "magnitude" else reference.keep_mask
    fixed_OI = draw(weight_OI.abs() * norms_I, pattern, 0.5)

    def choose(weight_OB: Tensor, cost_B: Tensor, start: int) -> Tensor:
        columns = slice(start, start + len(cost_B))
        if mask_order == "before":
            return fixed_OI[:, columns]
        return reference.block_keep(weight_OB.abs() * norms_I[columns], pattern, 0.5)

    pruned = prune("obs", weight_OI, X_TI, pattern, mask_from=mask_from, mask_order=mask_order)
    weight, keep = reference.obs_sweep(
        weight_OI, gather(X_TI).gram_II, 0.01, pattern.m or 20, choose
    )
    assert torch.equal(pruned.keep_OI, keep)
    torch.testing.assert_close(pruned.weight_OI.double(), weight, rtol=1e-3, atol=1e-3)


# --- guarantees ---


@given(
    st.sampled_from(["sparsegpt", "obs"]),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 7),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_n_of_m_holds_for_every_block_width(name, m, groups, rows, data):
    n, block = data.draw(st.integers(0, m)), data.draw(st.integers(1, 50))
    order = data.draw(st.sampled_from(["before", "blockwise"]))
    weight_OI, X_TI = example(rows, groups * m)
    pruned = prune(name, weight_OI, X_TI, Pattern(n, m), block=block, mask_order=order)
    assert (pruned.keep_OI.view(rows, groups, m).sum(dim=2) == n).all()


@pytest.mark.parametrize("update", ["none", "least-squares"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(4, 4)], ids=repr)
def test_nothing_to_remove_changes_nothing(name, pattern, update):
    weight_OI, X_TI = example(5, 12)
    weight_OI[2, 3], weight_OI[3, 3] = 0.0, -0.0
    X_TI[:, 1] = 0
    if name != "wanda-variant" or pattern.is_unstructured:
        options = MethodOptions(weight_update=update)
        method = compose(METHODS[name], options)
        pruned = method.prune(weight_OI, gather(X_TI), pattern, 0.0, options)
        assert pruned.keep_OI.all()
        assert torch.equal(pruned.weight_OI.view(torch.int32), weight_OI.view(torch.int32))


# --- zeros that stay ---


@pytest.mark.parametrize("pattern", [Pattern(group="block-row", block_size=16), Pattern(2, 4)])
@pytest.mark.parametrize("rows", [UNSHARDED, ThreeShards()])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sparsegpt", {}),
        ("obs", {}),
        ("obs", {"mask_from": "magnitude"}),
        ("obs", {"mask_order": "blockwise"}),
        ("alps", {}),
        ("alps", {"weight_update": "least-squares"}),
        ("wanda", {"weight_update": "least-squares"}),
    ],
)
def test_zeros_that_are_kept_stay_zero_in_updates_and_count_first(name, options, rows, pattern):
    weight_OI, X_TI = example(30, 64)
    zero_OI = torch.rand(30, 64, generator=torch.Generator().manual_seed(7)) < 0.3
    weight_OI[zero_OI] = 0
    pruned = []
    for chosen in (MethodOptions(**options), MethodOptions(**options, keep_zeros=True)):
        work = Work(pattern, 0.5, chosen, rows)
        pruned.append(compose(METHODS[name], chosen).apply(weight_OI, gather(X_TI), work))
    filled, kept = pruned
    assert filled.weight_OI[zero_OI].any(), "without the option an update fills zeros"
    assert not kept.weight_OI[zero_OI].any()
    assert kept.weight_OI[kept.keep_OI].count_nonzero() == kept.keep_OI.sum()
    width, most = (4, 2) if pattern.m else (16, 8)
    others, stay = (~zero_OI).view(-1, width), kept.keep_OI.view(-1, width)
    assert torch.equal(stay.sum(dim=1), others.sum(dim=1).clamp(max=most))


def _fills(weight_OI, statistics, work):
    return Pruned(weight_OI + 1, torch.ones_like(weight_OI, dtype=torch.bool))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sparsegpt", "sparsity": 0.5, "group": "block-row", "block_size": 4},
        {"method": "sparsegpt", "pattern": "2:4", "dense_weight": 0.5},
        {"weight_update": "least-squares", "dense_weight": 0.5, "sparsity": 0.2},
        {"method": "alps", "reconstruct": "all", "reconstruct_epochs": 1, "pattern": "2:4"},
        {
            "method": Method(
                name="fills", summary="", function=_fills, needs="none", updates_weights=True
            )
        },
    ],
)
def test_a_pruned_model_that_is_pruned_again_keeps_its_zeros(options, tmp_path):
    dense, ids = tiny_checkpoint(tmp_path / "dense"), token_ids(8, 16)
    prunus.prune(dense, tmp_path / "first", "wanda", 0.3, calibration=ids)
    before = weights(tmp_path / "first")
    filled = {}
    for keep in (False, True):
        out = tmp_path / f"second {keep}"
        prunus.prune(tmp_path / "first", out, calibration=ids, keep_zeros=keep, **options)
        after = weights(out)
        filled[keep] = sum(int(after[name][x == 0].count_nonzero()) for name, x in before.items())
    assert filled[True] == 0 < filled[False]


# --- damping ---


def test_damping_that_is_enough_is_not_raised():
    _, X_TI = example(1, 30)
    factor_II, notes = inverse_factor(gather(X_TI).gram_II, 0.01)
    assert notes == {"damping": 0.01}
    scaled_II = X_TI.double().T @ X_TI.double()
    scaled_II /= scaled_II.diagonal().mean()
    expected = torch.linalg.cholesky(torch.linalg.inv(scaled_II + 0.01 * torch.eye(30)), upper=True)
    torch.testing.assert_close(factor_II.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(factor_II, factor_II.triu())


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_the_diagonal_of_the_factor_is_the_same_to_the_bit_without_the_factor(damping):
    for width in (30, 700):
        gram_II = gather(example(3, width)[1]).gram_II
        factor_II, notes = inverse_factor(gram_II, damping)
        diagonal_I, others = inverse_factor(gram_II, damping, diagonal=True)
        assert torch.equal(diagonal_I, factor_II.diagonal())
        assert notes == others


def test_damping_is_raised_until_the_gram_can_be_inverted():
    _, X_TI = weird_example("duplicates", 1, 30, 0)
    factor_II, notes = inverse_factor(gather(X_TI).gram_II, 0.0)
    assert notes == {"damping": 0.01}
    assert factor_II.isfinite().all()

    indefinite_II = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # eigenvalues 2.05 and -0.05
    factor_II, notes = inverse_factor(indefinite_II, 0.01)
    assert notes == {"damping": 0.1}
    assert_refused(
        ValueError, "cannot be inverted", inverse_factor, torch.full((3, 3), float("nan")), 0.01
    )
    torch.testing.assert_close(
        factor_II.T @ factor_II, torch.linalg.inv(indefinite_II + 0.1 * torch.eye(2))
    )


def test_float64_is_tried_before_more_damping():
    gram_II = torch.eye(3)
    gram_II[0, 1] = gram_II[1, 0] = 1 - 2**-22
    factor_II, notes = inverse_factor(gram_II, 0.0)
    assert notes == {"damping": 0.0, "factored_in": "float64"}
    torch.testing.assert_close(
        factor_II.double(),
        torch.linalg.cholesky(torch.linalg.inv(gram_II.double()), upper=True),
        rtol=1e-6,
        atol=1e-6,
    )


def test_the_scale_of_the_inputs_does_not_matter():
    weight_OI, X_TI = example(6, 40)
    expected = prune("sparsegpt", weight_OI, X_TI, Pattern(group="block"))
    for factor in (2.0**-30, 2.0**20):
        assert torch.equal(
            prune("sparsegpt", weight_OI, X_TI * factor, Pattern(group="block")).weight_OI,
            expected.weight_OI,
        )


# --- RIA, ALPS and least squares ---

# --- RIA ---


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_ria_equals_the_reference(pattern, power):
    weight_OI, X_TI = example(7, 12)
    pruned = prune("ria", weight_OI, X_TI, pattern, ria_power=power)
    expected = reference.keep_mask(reference.ria_score(weight_OI, X_TI, power), pattern, 0.5)
    assert torch.equal(pruned.keep_OI, expected)


# --- least squares ---


@pytest.mark.parametrize("damping", [0.01, 0.3, None])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_fit_is_the_exact_solution(pattern, damping, monkeypatch):
    monkeypatch.setattr("prunus.methods.solvers.least_squares._TOLERANCE", 1e-6)
    monkeypatch.setattr("prunus.methods.solvers.least_squares._MAX_STEPS", 200)
    weight_OI, X_TI = example(9, 24)
    X_TI[:, 7] = 0
    statistics = gather(X_TI)
    start = METHODS["wanda"].prune(weight_OI, statistics, pattern, 0.5)
    options = MethodOptions(weight_update="least-squares", damping=damping)
    fitted = compose(METHODS["wanda"], options).prune(weight_OI, statistics, pattern, 0.5, options)
    used = damping or ridge(24, 200)
    assert fitted.notes["ridge"] == used
    expected = reference.least_squares(weight_OI, start.keep_OI, statistics.gram_II, used)
    torch.testing.assert_close(fitted.weight_OI.double(), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(fitted.keep_OI, start.keep_OI)
    kept = start.keep_OI[:, 7]
    # A dead input keeps its weights.
    torch.testing.assert_close(fitted.weight_OI[kept, 7], weight_OI[kept, 7])


@given(
    st.integers(1, 8),
    st.integers(1, 30),
    st.integers(1, 60),
    st.integers(0, 40),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_no_step_of_conjugate_gradients_raises_the_error(rows, columns, tokens, steps, seed):
    weight_OI, X_TI = example(rows, columns, seed, tokens)
    keep_OI = torch.rand(rows, columns) < 0.5
    target_OI, hessian_II, _ = reference.scaled(weight_OI, gather(X_TI).gram_II, 0.05)
    start_OI = torch.randn(rows, columns)
    solution_OI, taken = conjugate_gradients(
        start_OI, target_OI.float(), keep_OI, hessian_II.float(), steps
    )
    before = reference.squared_error(start_OI * keep_OI - target_OI, hessian_II)
    after = reference.squared_error(solution_OI - target_OI, hessian_II)
    assert taken <= steps
    assert (after <= before * (1 + 1e-4) + 1e-6).all()
    assert not solution_OI[~keep_OI].any()


# --- ALPS ---


@pytest.mark.parametrize("iterations", [1, 4, 5, 32])
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(4, 8)], ids=repr)
def test_alps_equals_the_reference(pattern, iterations):
    weight_OI, X_TI = example(6, 24)
    X_TI[:, 13] = 0
    pruned = prune("alps", weight_OI, X_TI, pattern, damping=0.1, iterations=iterations)
    gram_II = X_TI.double().T @ X_TI.double()
    weight, keep = reference.alps(weight_OI, gram_II, pattern, 0.5, 0.1, iterations)
    # The reference breaks ties of weights that are exactly 0 in its own order.
    alive_I = X_TI.any(dim=0)
    assert torch.equal(pruned.keep_OI[:, alive_I], keep[:, alive_I])
    # A few steps of conjugate gradients remove nearly all of the error that is left.
    _, hessian_II, scale_I = reference.scaled(weight_OI, gram_II, 0.1)
    alive_II = hessian_II[alive_I][:, alive_I]

    def loss(found_OI: torch.Tensor) -> float:
        change_OI = (found_OI.double() - weight_OI)[:, alive_I] * scale_I[alive_I]
        return float(reference.squared_error(change_OI, alive_II).sum())

    assert loss(weight) * (1 - 1e-6) <= loss(pruned.weight_OI) <= loss(weight) * 1.01
    if iterations == 32:
        torch.testing.assert_close(pruned.weight_OI.double(), weight, rtol=0.02, atol=0.05)


@given(
    st.sampled_from([*PATTERNS, Pattern(0, 4), Pattern(3, 4)]),
    st.integers(1, 9),
    st.sampled_from([0.1, 0.4, 0.8]),
    st.sampled_from(list(WEIRD)),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_alps_keeps_exact_counts(pattern, rows, sparsity, kind, seed):
    weight_OI, X_TI = weird_example(kind, rows, 12, seed)
    pruned = prune("alps", weight_OI, X_TI, pattern, sparsity, iterations=5)
    for places in reference.competitors((rows, 12), pattern):
        gone = int(len(places) * sparsity) if pattern.n is None else pattern.m - pattern.n
        assert sum(not pruned.keep_OI[place] for place in places) == gone


@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern(group="layer"), Pattern(2, 4), Pattern(4, 8)], ids=repr
)
def test_wanda_loses_more_than_sparsegpt_and_sparsegpt_more_than_alps(pattern):
    """ALPS beats the best weights for Wanda's mask too, also on tokens that it has not seen."""
    weight_OI, X_TI = example(32, 96, tokens=600)
    errors = {}
    for update in ("none", "least-squares"):
        options = MethodOptions(weight_update=update)
        for name in ("wanda", "sparsegpt", "alps") if update == "none" else ("wanda",):
            method = compose(METHODS[name], options)
            pruned = method.prune(weight_OI, gather(X_TI[:300]), pattern, 0.5, options)
            change_OI = weight_OI - pruned.weight_OI
            errors[name, update] = [float((change_OI @ x.T).norm()) for x in X_TI.split(300)]
    (seen, alps_unseen), (fitted, *_) = errors["alps", "none"], errors["wanda", "least-squares"]
    assert errors["wanda", "none"][0] > errors["sparsegpt", "none"][0] > 1.05 * seen
    assert seen < 0.97 * fitted
    assert all(unseen >= alps_unseen for _, unseen in errors.values())


# --- the ADMM operator, and ALPS on wide linears with few tokens ---


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


# --- the table of methods ---

BLOCKWISE = {"mask_order": "blockwise"}


def test_default_groups_are_those_of_the_paper():
    assert {name: method.default_group for name, method in METHODS.items()} == {
        "magnitude": "layer",
        "wanda": "row",
        "wanda-variant": "row",
        "ria": "layer",
        "sparsegpt": "block",
        "sparsegpt-score": "block",
        "obs": "row",
        "alps": "row",
        "mask": "row",
    }
    for options, group in (({"mask_from": "magnitude"}, "layer"), (BLOCKWISE, "block")):
        assert METHODS["obs"].with_options(MethodOptions(**options)).default_group == group


def test_every_declared_option_exists_and_defaults_fit_every_method():
    for name, method in METHODS.items():
        assert set(method.reads_options) <= set(MethodOptions.model_fields), name
        check_options(method, Pattern(group=method.default_group))


@pytest.mark.parametrize(
    ("name", "pattern", "options", "message"),
    [
        ("wanda-variant", Pattern(2, 4), {}, "no 2:4 form: each row.*Use another method"),
        ("wanda-variant", Pattern(group="layer"), {}, "the group layer.*Use group row"),
        ("sparsegpt", Pattern(group="column"), {}, "the group column.*block or block-row"),
        ("sparsegpt", Pattern(group=4), {}, "the group 4.*block or block-row"),
        ("obs", Pattern(group="column"), BLOCKWISE, "the group column.*block or block-row"),
        ("wanda", Pattern(), {"dense_weight": 0.5}, "wanda keeps its weights as they are"),
        ("wanda", Pattern(), {"damping": 0.1}, r"not read damping: drop it, .*\(sparsegpt, "),
        ("mask", Pattern(), {"damping": 0.1}, "mask inverts no Gram matrix"),
        ("alps", Pattern(), {"ria_power": 1.0}, "belongs to method ria, not to alps: drop"),
        ("wanda", Pattern(), {"iterations": 7}, "belongs to method alps, not to wanda"),
        ("sparsegpt", Pattern(), {"mask_from": "magnitude"}, "belongs to method obs"),
        ("sparsegpt", Pattern(), BLOCKWISE, "belongs to method obs, not to sparsegpt"),
    ],
)
def test_what_does_not_go_together_is_refused(name, pattern, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(METHODS[name], pattern, MethodOptions(**options))


@pytest.mark.parametrize(
    ("name", "pattern", "options"),
    [
        ("sparsegpt", Pattern(2, 4, group="column"), {}),
        ("obs", Pattern(group="column"), {}),
        ("wanda", Pattern(group=7), {"damping": 0.1, "weight_update": "least-squares"}),
        ("sparsegpt-score", Pattern(), {"damping": 0.1}),
        ("alps", Pattern(), {"weight_update": "least-squares"}),
        ("wanda-variant", Pattern(), {"weight_update": "least-squares"}),
        ("wanda", Pattern(group="column"), {"weight_update": "least-squares"}),
        ("ria", Pattern(), {"ria_power": 1.0}),
        ("alps", Pattern(), {"iterations": 7}),
    ],
)
def test_what_goes_together_passes(name, pattern, options):
    check_options(METHODS[name], pattern, MethodOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ria_power": -0.5}, r"ria_power must lie in \[0, 2\]; got -0\.5"),
        ({"ria_power": float("nan")}, r"ria_power must lie in \[0, 2\]; got nan"),
        ({"iterations": 0}, "iterations must be at least 1; got 0"),
        ({"damping": 0.0}, r"damping must lie in \(0, 1\)"),
        ({"damping": 1.5}, r"damping must lie in \(0, 1\).*got 1\.5"),
        ({"damping": float("nan")}, r"damping must lie in \(0, 1\)"),
        ({"dense_weight": 2.0}, r"dense_weight must lie in \[0, 1\]"),
        ({"dense_weight": "auto"}, "dense_weight.*number"),
        ({"weight_update": "ridge"}, "weight_update"),
        ({"mask_order": "after"}, "mask_order"),
        ({"mask_from": "ria"}, "mask_from"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    assert_refused(ValueError, message, MethodOptions, **options)
    assert MethodOptions(dense_weight="0.25").dense_weight == 0.25


OWN = """
import torch
from prunus.methods import Method, keep_mask, masked

def prune(weight_OI, statistics, work):
    score_OI = weight_OI.abs() * statistics.norms_I ** 2
    return masked(weight_OI, keep_mask(score_OI, work.pattern, work.sparsity))

SQUARED = Method(name="squared", summary="squared norms", function=prune, needs="norms")
NOT_ONE = "text"
"""


def test_a_method_of_ones_own_is_read_from_its_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    method = get_method(f"{file}:SQUARED")
    assert get_method(f"{file}:SQUARED") is method
    weight_OI, X_TI = example(5, 12)
    found = method.prune(weight_OI, gather(X_TI), Pattern(), 0.5)
    score_OI = weight_OI.abs() * X_TI.norm(dim=0).square()
    assert torch.equal(found.keep_OI, METHODS["magnitude"].prune(
        score_OI, gather(X_TI), Pattern(), 0.5
    ).keep_OI)  # fmt: skip
    file.write_text(OWN.replace('"squared norms"', '"changed"'))
    assert get_method(f"{file}:SQUARED").summary == "changed"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{own}", "names a file but no method in it"),
        ("{own}:", "names a file but no method in it"),
        ("{own}:MISSING", "has no MISSING: its methods are SQUARED"),
        ("{own}:SQARED", "did you mean SQUARED\\?$"),
        ("{own}:NOT_ONE", "has a str, not a Method, as NOT_ONE"),
        ("given:squared", "'squared' was given in Python"),
    ],
)
def test_a_name_without_a_method_is_refused(name, message, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    assert_refused(ValueError, message, get_method, name.format(own=own))


def test_a_method_is_given_as_an_object():
    method = Method(
        name="mine", summary="", function="prunus.methods.wanda:prune", needs="norms", groups=(3,)
    )
    assert_refused(ValueError, "does not support the group row", check_options, method, Pattern())
    weight_OI, X_TI = example(6, 12)
    pruned = method.prune(weight_OI, gather(X_TI), Pattern(group=3), 0.5)
    assert int(pruned.keep_OI.sum()) == 36


def test_a_run_with_a_method_of_ones_own_is_recorded_and_not_mixed_with_another(tmp_path):
    dense, file = tiny_checkpoint(tmp_path / "dense"), tmp_path / "own.py"
    file.write_text(OWN)
    name, options = f"{file}:SQUARED", {"calibration": token_ids()}
    record = prunus.prune(dense, tmp_path / "out", method=name, **options)
    assert record.recipe.method == name
    assert record.inputs.method_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    given = prunus.prune(dense, tmp_path / "given", method=get_method(name), **options)
    assert given.recipe.method == "given:squared" and given.inputs.method_sha256
    one, two = (weights(tmp_path / folder) for folder in ("out", "given"))
    assert all(torch.equal(each, two[key]) for key, each in one.items())
    file.write_text(OWN.replace("** 2", "** 3"))
    with pytest.raises(FileExistsError, match="another method_sha256"):
        prunus.prune(dense, tmp_path / "out", method=name, **options)
    with pytest.raises(ValueError, match="ria_power belongs to method ria, not to squared"):
        prunus.prune(dense, tmp_path / "no", method=name, ria_power=1.0, **options)
    assert not (tmp_path / "no").exists()


OWN_OPTIONS = """
from typing import Annotated
from prunus.methods import Method, MethodOptions, keep_mask, masked
from prunus.options import Option, between

class OwnOptions(MethodOptions):
    power: Annotated[float, Option("Raise the norms.", within=between("[0, 2]"))] = 0.5

def prune(weight_OI, statistics, work):
    power = work.options.power if work.linear.kind == "mlp" else 1.0
    keep_OI = keep_mask(weight_OI.abs() * statistics.norms_I**power, work.pattern, work.sparsity)
    return masked(weight_OI, keep_OI, {"power": power, **work.linear._asdict()})

OWN = Method(name="mine", summary="", function=prune, needs="norms", options=OwnOptions)
"""


def test_a_method_knows_its_linear_and_has_options_of_its_own(tmp_path):
    dense, file = tiny_checkpoint(tmp_path / "dense"), tmp_path / "own.py"
    file.write_text(OWN_OPTIONS)
    name, ids = f"{file}:OWN", token_ids()
    record = prunus.prune(dense, tmp_path / "out", method=name, power=1.5, calibration=ids)
    assert (record.what, record.recipe.method_options) == ("mine", {"power": 1.5})
    linears = record.blocks[1].linears
    assert linears["mlp.up_proj"].notes == {
        "power": 1.5,
        "name": "model.layers.1.mlp.up_proj",
        "block": 1,
        "inner": "mlp.up_proj",
        "kind": "mlp",
    }
    assert linears["self_attn.q_proj"].notes["kind"] == "attention"
    assert linears["self_attn.q_proj"].notes["power"] == 1.0
    # The same by the command line and by a file of options.
    recipe = tmp_path / "own.toml"
    recipe.write_text(f"method = {json.dumps(name)}\npower = 1.5\n")
    for way in ({"recipe": recipe}, {"method": name, "method_options": ["power=1.5"]}):
        same = prunus.prune(dense, tmp_path / "same", calibration=ids, overwrite=True, **way)
        assert same.recipe.method_options == {"power": 1.5}
    sweep = Sweep(models=("m",), recipe={}, grid=({"method": name, "power": [0.5, 1.0]},))
    assert [x.name for x in sweep.cells()] == ["m-OWN-0.5-power=0.5", "m-OWN-0.5-power=1.0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"powr": 1.0}, "method mine: unknown option 'powr'.*did you mean power"),
        ({"power": 3.0}, r"method mine: power must lie in \[0, 2\]; got 3"),
        ({"method_options": ["power"]}, "give NAME=VALUE, such as power=0.5; got 'power'"),
    ],
)
def test_an_option_that_a_method_of_ones_own_does_not_have_is_refused(options, message, tmp_path):
    dense, file = tiny_checkpoint(tmp_path / "dense"), tmp_path / "own.py"
    file.write_text(OWN_OPTIONS)
    with pytest.raises(ValueError, match=message):
        prunus.prune(dense, tmp_path / "out", method=f"{file}:OWN", **options)
    with pytest.raises(ValueError, match="options must be a class derived from MethodOptions"):
        Method(name="old", summary="", function="a:b", needs="none", options=("iterations",))
    assert not (tmp_path / "out").exists()
