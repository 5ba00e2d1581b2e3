"""Dense targets and block reconstruction: the dense model runs beside the pruned one."""

import pytest
import torch

import prunus
import reference
from prunus.engine.block_memory import Memory
from prunus.methods import METHODS, MethodOptions, compose
from prunus.methods.dense_targets import dense_target
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics, StatisticsSpec
from tiny import tiny_checkpoint, token_ids, weights

DRIFT = StatisticsSpec(needs="gram", drift="all")
SOME_DRIFT = StatisticsSpec(needs="gram", drift="some")
ALPS = {"method": "alps", "dense_weight": 0.25}


def drifted(
    width: int = 12, tokens: int = 40
) -> tuple[InputStatistics, torch.Tensor, torch.Tensor]:
    """Statistics of inputs, these inputs, and the dense model's inputs for the same tokens."""
    dense_TI = torch.randn(tokens, width)
    X_TI = dense_TI + 0.3 * torch.randn(tokens, width) @ torch.randn(width, width)
    statistics = InputStatistics(width, DRIFT)
    for x, y in zip(X_TI.split(16), dense_TI.split(16), strict=True):
        statistics.add(x, y)
    return statistics, X_TI, dense_TI


@pytest.mark.parametrize("dense_weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_target_is_the_solution_of_the_mixed_least_squares(dense_weight, damping):
    statistics, X_TI, dense_TI = drifted()
    weight_OI = torch.randn(5, 12)
    found = dense_target(weight_OI, statistics, dense_weight, damping)
    assert torch.allclose(
        found.double(),
        reference.dense_target(weight_OI, X_TI, dense_TI, dense_weight, damping),
        atol=1e-4,
    )


def test_without_drift_or_without_the_dense_tokens_the_target_is_the_weight():
    weight_OI, X_TI = torch.randn(5, 12), torch.randn(40, 12)
    same = InputStatistics(12, DRIFT)
    same.add(X_TI, X_TI.clone())
    assert torch.equal(dense_target(weight_OI, same, 0.5, 0.01), weight_OI)
    for spec, times in ((DRIFT, 1), (SOME_DRIFT, 4)):
        unknown = InputStatistics(12, spec)
        unknown.add(X_TI, X_TI + 1)
        for _ in range(times):
            unknown.add(X_TI)
        assert dense_target(weight_OI, unknown, 0.5, 0.01) is weight_OI


def test_the_drift_of_some_batches_stands_for_all():
    torch.manual_seed(8)
    weight_OI, X_TI, dense_TI = torch.randn(5, 12), torch.randn(40, 12), torch.randn(40, 12)
    whole, part = InputStatistics(12, DRIFT), InputStatistics(12, SOME_DRIFT)
    whole.add(X_TI, dense_TI)
    part.add(X_TI, dense_TI)
    for _ in range(3):
        part.add(torch.randn(40, 12))
    assert (whole.drift_share, part.drift_share) == (1, 0.25)
    found, expected = (dense_target(weight_OI, each, 0.5, 0.01) for each in (part, whole))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, weight_OI)


@pytest.mark.parametrize("method", ["alps", "sparsegpt", "obs", "wanda"])
def test_a_dense_target_lowers_the_error_against_the_dense_outputs(method):
    torch.manual_seed(3)
    statistics, X_TI, dense_TI = drifted(width=16, tokens=400)
    weight_OI = torch.randn(24, 16)
    update = "least-squares" if method == "wanda" else "none"

    def error(**options) -> float:
        chosen = MethodOptions(weight_update=update, damping=0.01, **options)
        pruned = compose(METHODS[method], chosen).prune(
            weight_OI, statistics, Pattern(), 0.5, chosen
        )
        assert int((~pruned.keep_OI).sum()) >= 24 * 8
        return float((X_TI @ pruned.weight_OI.T - dense_TI @ weight_OI.T).square().sum())

    assert error(dense_weight=1.0) < error(dense_weight=0.4) < error()


def test_dense_targets_change_what_later_blocks_become(dense, tmp_path):
    ids = token_ids(8, 16)
    for name, options in (
        ("plain", {"method": "alps"}),
        ("mixed", ALPS),
        ("none", ALPS | {"dense_weight": 0.0}),
    ):
        prunus.prune(dense, tmp_path / name, calibration=ids, **options)
    first, second, third = (weights(tmp_path / name) for name in ("plain", "mixed", "none"))
    q, later = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first[q], second[q]), "nothing has drifted before the first linear"
    assert not torch.equal(first[later], second[later])
    assert all(torch.equal(first[key], third[key]) for key in first)


def test_wide_linears_with_few_tokens_have_no_dense_target(tmp_path, monkeypatch):
    """128 tokens reach the 64 inputs of `down_proj`, in lockstep and replayed."""
    monkeypatch.setattr("prunus.methods.solvers.least_squares._WIDE", 64)
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16)
    arguments = ALPS | {"calibration": token_ids(8, 16), "batch": 2}
    report = prunus.prune(dense, tmp_path / "plain", **arguments)
    notes = {
        name: linear.notes.get("dense_targets") for name, linear in report.blocks[1].linears.items()
    }
    few = "pruned: too few tokens for this many inputs"
    assert notes == dict.fromkeys(notes) | {"mlp.down_proj": few}
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: False)
    prunus.prune(dense, tmp_path / "other", **arguments)
    for shard in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "other" / shard.name).read_bytes() == shard.read_bytes(), shard.name


def test_reconstruction_keeps_masks_and_lowers_the_error_of_every_block(dense, tmp_path):
    options = {"pattern": "2:4", "calibration": token_ids(32, 32)}
    report = prunus.prune(dense, tmp_path / "out", reconstruct="all", batch=1, **options)
    assert all(
        block.reconstruction.error_after < block.reconstruction.error_before
        for block in report.blocks
    )
    before, after = weights(dense), weights(tmp_path / "out")
    norm, ignored = "model.layers.0.input_layernorm.weight", "model.norm.weight"
    assert torch.equal(before[norm], after[norm]), "norms do not change"
    assert torch.equal(before[ignored], after[ignored])
    for block in report.blocks:
        for name, linear in block.linears.items():
            weight = after[f"{block.name}.{name}.weight"]
            assert int((weight == 0).sum()) == linear.zeros
            assert int((weight.view(-1, 4) != 0).sum(dim=1).max()) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "sparsegpt", "dense_weight": 0.25, "propagate": "block"},
            "needs propagate linear",
        ),
        ({"reconstruct": "all", "propagate": "block"}, "needs propagate linear"),
        ({"reconstruct_epochs": 2}, "belongs to `reconstruct` last or all"),
        ({"reconstruct": "all", "reconstruct_epochs": 0}, "reconstruct_epochs must be at least 1"),
        ({"reconstruct": "all", "batch": 8}, "make one batch of"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(dense, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(8, 16), **options)
    assert not (tmp_path / "out").exists()
