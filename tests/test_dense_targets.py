"""The dense model beside the pruned one: targets mixed from both, and blocks matched to the dense outputs."""

from __future__ import annotations

import pytest
import torch

import prunus
import reference
from prunus.engine.companion import DenseInputs
from prunus.engine.hidden import HiddenStates
from prunus.methods import METHODS, Options, compose
from prunus.methods.targets import dense_target
from prunus.patterns import Pattern
from prunus.plan import Job
from prunus.statistics import InputStatistics
from test_resume import StopError, stop_after
from tiny import tiny_checkpoint, token_ids, weights

ALPS = {"method": "alps", "targets": "dense"}
BOTH = ALPS | {"match_blocks": True, "match_passes": 1, "match_rate": 1e-3}


def drifted(width: int = 12, tokens: int = 40) -> tuple[InputStatistics, torch.Tensor, torch.Tensor]:
    """Statistics of inputs, these inputs, and what the dense model would give in their place."""
    dense_TI = torch.randn(tokens, width)
    X_TI = dense_TI + 0.3 * torch.randn(tokens, width) @ torch.randn(width, width)
    statistics = InputStatistics(width, "gram", drift=True)
    for x, y in zip(X_TI.split(16), dense_TI.split(16), strict=True):
        statistics.add(x, y)
    return statistics, X_TI, dense_TI


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_target_is_the_solution_of_the_mixed_least_squares(mix, damping):
    statistics, X_TI, dense_TI = drifted()
    weight_OI = torch.randn(5, 12)
    found = dense_target(weight_OI, statistics, mix, damping)
    assert torch.allclose(
        found.double(), reference.dense_target(weight_OI, X_TI, dense_TI, mix, damping), atol=1e-4
    )


def test_without_drift_or_without_the_dense_tokens_the_target_is_the_weight():
    weight_OI, X_TI = torch.randn(5, 12), torch.randn(40, 12)
    same = InputStatistics(12, "gram", drift=True)
    same.add(X_TI, X_TI.clone())
    assert torch.equal(dense_target(weight_OI, same, 0.5, 0.01), weight_OI)
    unknown = InputStatistics(12, "gram", drift=True)
    unknown.add(X_TI, X_TI)
    unknown.add(X_TI)
    assert dense_target(weight_OI, unknown, 0.5, 0.01) is weight_OI


@pytest.mark.parametrize("method", ["alps", "sparsegpt", "obs", "wanda"])
def test_aiming_at_the_dense_model_lowers_the_error_against_its_outputs(method):
    torch.manual_seed(3)
    statistics, X_TI, dense_TI = drifted(width=16, tokens=400)
    weight_OI = torch.randn(24, 16)
    update = "lsq" if method == "wanda" else "none"

    def error(**options) -> float:
        chosen = Options(update=update, damping=0.01, **options)
        pruned = compose(METHODS[method], chosen).prune(weight_OI, statistics, Pattern(), 0.5, chosen)
        assert int((~pruned.keep_OI).sum()) >= 24 * 8
        return float((X_TI @ pruned.weight_OI.T - dense_TI @ weight_OI.T).square().sum())

    assert error(targets="dense", mix=1.0) < error(targets="dense", mix=0.4) < error()


def test_statistics_with_drift_merge():
    whole, X_TI, dense_TI = drifted()
    left, right = (InputStatistics(12, "gram", drift=True) for _ in range(2))
    left.add(X_TI[:16], dense_TI[:16])
    right.add(X_TI[16:], dense_TI[16:])
    left.merge(right)
    assert left.has_drift
    assert torch.allclose(left.drift_II, whole.drift_II, atol=1e-4)
    with pytest.raises(ValueError, match="drift"):
        left.merge(InputStatistics(12, "gram"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize("options", [ALPS, BOTH], ids=["targets", "both"])
def test_families_in_memory_replayed_and_spilled_give_the_same_bytes(family, options, tmp_path, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    arguments = options | {"calibration": token_ids(8, 16), "batch": 2}
    plain = prunus.prune(dense, tmp_path / "plain", **arguments)
    assert plain.totals["sparsity"] == pytest.approx(0.5, abs=0.01)
    for block in plain.blocks:
        assert (block.match is not None) == ("match_blocks" in options)
        assert block.match is None or block.match.error_after <= block.match.error_before
        assert not any("targets" in linear.notes for linear in block.linears.values())
    monkeypatch.setattr(Job, "fits_lockstep", lambda self, index: False)
    monkeypatch.setattr(Job, "spills", property(lambda self: True))
    monkeypatch.setattr(Job, "hidden_stay", property(lambda self: False))
    prunus.prune(dense, tmp_path / "other", **arguments)
    for shard in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "other" / shard.name).read_bytes() == shard.read_bytes(), shard.name


def test_dense_targets_change_what_later_blocks_become(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    ids = token_ids(8, 16)
    for name, options in (("plain", {"method": "alps"}), ("mixed", ALPS), ("none", ALPS | {"mix": 0.0})):
        prunus.prune(dense, tmp_path / name, calibration=ids, **options)
    first, second, third = (weights(tmp_path / name) for name in ("plain", "mixed", "none"))
    q, later = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first[q], second[q]), "nothing has drifted before the first linear"
    assert not torch.equal(first[later], second[later])
    assert all(torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_interrupted_run_ends_in_the_same_bytes(blocks, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, num_hidden_layers=3)
    options = BOTH | {"calibration": token_ids(8, 16), "batch": 2}
    prunus.prune(dense, tmp_path / "whole", **options)
    with pytest.raises(StopError):
        prunus.prune(dense, tmp_path / "out", **options, progress=stop_after(blocks))
    prunus.prune(dense, tmp_path / "out", **options)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_matching_keeps_masks_and_lowers_the_error_of_every_block(method, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    options = {"method": method, "pattern": "2:4", "calibration": token_ids(32, 32), "match_rate": 1e-3}
    report = prunus.prune(dense, tmp_path / "out", match_blocks=True, batch=1, **options)
    assert all(block.match.error_after < block.match.error_before for block in report.blocks)
    before, after = weights(dense), weights(tmp_path / "out")
    norm, ignored = "model.layers.0.input_layernorm.weight", "model.norm.weight"
    assert not torch.equal(before[norm], after[norm])
    assert torch.equal(before[ignored], after[ignored])
    for block in report.blocks:
        for name, linear in block.linears.items():
            weight = after[f"{block.name}.{name}.weight"]
            assert int((weight == 0).sum()) == linear.zeros
            assert int((weight.view(-1, 4) != 0).sum(dim=1).max()) <= 2


def test_a_loaded_model_is_pruned_to_the_same_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    dense = tiny_checkpoint(tmp_path / "dense")
    options = BOTH | {"calibration": token_ids(8, 16), "batch": 2}
    prunus.prune(dense, tmp_path / "out", **options)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    prunus.prune(model, **options)
    expected = weights(tmp_path / "out")
    assert all(torch.equal(x, expected[key]) for key, x in model.state_dict().items())


def test_the_dense_inputs_of_an_expert_are_not_known():
    class Stream:
        def __init__(self):
            self.states = HiddenStates(1, spill_to=None, device=torch.device("cpu"))
            self.states.fill(0, torch.zeros(1, 4, 8))

        def forward(self, index, block):
            return pytest.fail

    inputs = DenseInputs(Stream(), 0, torch.nn.Identity(), [], True)
    assert inputs.of("expert", 0, 3) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "dense"}, "wanda keeps its weights"),
        ({"method": "alps", "mix": 0.3}, "mix belongs to --targets dense"),
        ({"method": "alps", "targets": "dense", "mix": 2.0}, r"mix must lie in \[0, 1\]"),
        ({"method": "sparsegpt", "targets": "dense", "propagate": "block"}, "needs propagate linear"),
        ({"match_blocks": True, "propagate": "block"}, "needs propagate linear"),
        ({"match_rate": 0.1}, "belong to --match-blocks"),
        ({"match_blocks": True, "match_passes": 0}, "match_passes must be at least 1"),
        ({"match_blocks": True, "batch": 8}, "are one; give more --samples"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(options, message, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(8, 16), **options)
    assert not (tmp_path / "out").exists()
