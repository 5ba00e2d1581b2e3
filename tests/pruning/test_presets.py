"""The presets as a whole, and the sparsity that an allocation gives to every linear."""

import itertools

import pytest
import torch

import prunus
import reference
from prunus.engine.block import dense_stream
from prunus.engine.block_memory import Memory
from prunus.engine.reconstruction import reconstruct_block
from prunus.engine.run_options import RunOptions
from prunus.engine.session import SILENT
from prunus.methods.patterns import Pattern
from prunus.pruning.allocate_sparsity import allocate
from prunus.pruning.manifest import Manifest
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from prunus.rounding import loss_sensitivity
from sensitivity_cases import IDS, whole_model
from stopping import interrupt
from tiny import shards, tiny_checkpoint, token_ids


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Give the short windows of these tests several training steps each."""
    monkeypatch.setattr(reconstruct_block, "_TOKENS_PER_STEP", 8)


def check_same_bytes_resumed_and_replayed(dense, tmp_path, monkeypatch, options):
    """A run that was resumed, and one that replays blocks, must equal the run `plain`."""
    interrupt(prunus.prune, dense, tmp_path / "resumed", **options)
    prunus.prune(dense, tmp_path / "resumed", **options)
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: False)
    prunus.prune(dense, tmp_path / "replayed", **options)
    expected = shards(tmp_path / "plain")
    assert shards(tmp_path / "resumed") == expected
    assert shards(tmp_path / "replayed") == expected


@pytest.mark.parametrize(("family", "pattern"), [("mixtral", "unstructured"), ("gpt_neox", "2:4")])
def test_best_gives_the_same_bytes_in_memory_replayed_and_resumed(
    family, pattern, tmp_path, monkeypatch
):
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    options = {"preset": "best", "pattern": pattern, "calibration": token_ids(8, 32), "batch": 1}
    report = prunus.prune(dense, tmp_path / "plain", **options)
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.01)
    # One of eight windows is held out. Where attention and MLP are added in one operation, as in
    # gpt_neox, the part after attention cannot run alone, and the whole block is trained.
    *earlier, last = [block.reconstruction.steps for block in report.blocks]
    assert set(earlier) == {3 * 7 if family == "gpt_neox" else 5 * 7}
    assert last == (3 * 7 if family == "gpt_neox" else 8 * 7), "by logits"
    shares = {
        linear.zeros / (linear.shape[0] * linear.shape[1])
        for b in report.blocks
        for linear in b.linears.values()
    }
    assert (max(shares) > min(shares) + 0.01) == (pattern == "unstructured")
    check_same_bytes_resumed_and_replayed(dense, tmp_path, monkeypatch, options)


@pytest.mark.parametrize(("family", "pattern"), [("llama", "unstructured"), ("gpt_neox", "2:4")])
def test_balanced_reconstructs_the_last_block_alone_on_the_windows_of_the_dense_stream(
    family, pattern, tmp_path, monkeypatch
):
    monkeypatch.setattr(dense_stream, "_TOKENS_PER_FEATURE", 0.5)
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    options = {
        "preset": "balanced",
        "pattern": pattern,
        "calibration": token_ids(16, 32),
        "batch": 1,
    }
    report = prunus.prune(dense, tmp_path / "plain", **options)
    *earlier, last = [block.reconstruction for block in report.blocks]
    assert earlier and not any(earlier)
    # Every fourth of sixteen windows runs through the dense model; one of these is held out.
    assert last.steps == (3 if family == "gpt_neox" else 8) * 3
    assert last.measure == "logits" and last.error_after <= last.error_before
    without = prunus.prune(dense, tmp_path / "without", **options, reconstruct="none")
    assert not any(block.reconstruction for block in without.blocks)
    for mine, others in zip(report.blocks[:-1], without.blocks, strict=False):
        errors = [
            [linear.relative_output_error for linear in b.linears.values()] for b in (mine, others)
        ]
        assert errors[0] == errors[1], "no earlier block changes"
    check_same_bytes_resumed_and_replayed(dense, tmp_path, monkeypatch, options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_runs_with_16_bits_train_on_processors_without_bfloat16(dtype, tmp_path, monkeypatch):
    """A LayerNorm returns the dtype of its input, which float32 weights would refuse."""
    monkeypatch.setattr("prunus.engine.linear_plan.native_bfloat16", lambda: False)
    options = {"calibration": token_ids(), "dtype": dtype, "reconstruct": "all", "batch": 1}
    dense = tiny_checkpoint(tmp_path / "dense", "gpt_neo", torch.float16)
    for block in prunus.prune(dense, tmp_path / "out", **options).blocks:
        assert block.reconstruction.error_after < block.reconstruction.error_before


# --- allocation ---


def test_budget_is_exact_and_every_linear_gets_what_the_manifest_says(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    report = prunus.prune(
        dense,
        tmp_path / "out",
        sparsity=0.5,
        calibration=token_ids(),
        allocation="fisher",
    )
    linears = {
        f"{b.name}.{name}": record for b in report.blocks for name, record in b.linears.items()
    }
    assert set(report.allocation) == set(linears)
    assert len(set(report.allocation.values())) > 1
    for name, record in linears.items():
        rows, columns = record.shape
        assert record.zeros == rows * int(columns * report.allocation[name]), name
    missing = report.totals["weights"] // 2 - report.totals["zeros"]
    assert 0 <= missing < max(record.shape[0] for record in linears.values())


def test_a_resumed_run_keeps_the_same_sparsities(tmp_path, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    options = {"calibration": token_ids(), "allocation": "fisher"}
    prunus.prune(dense, tmp_path / "whole", **options)
    interrupt(prunus.prune, dense, tmp_path / "out", **options)
    kept = Manifest.load(tmp_path / "out").allocation
    monkeypatch.setattr(
        "prunus.pruning.allocate_sparsity.measure_loss",
        lambda *a, **o: pytest.fail("measured twice"),
    )
    report = prunus.prune(dense, tmp_path / "out", **options)
    assert report.allocation == kept
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def losses_of(folder, allocation: dict[str, float]) -> float:
    """Σ s_i w_ij² E[x_j²] of the weights that Wanda removes at these sparsities, in one model."""
    lost = 0.0
    for name, (weight_OI, squares_O, X_TI) in whole_model(folder).items():
        if ".layers." not in name:
            continue
        score_OI = reference.wanda_score(weight_OI, X_TI)
        removed_OI = ~reference.keep_mask(score_OI, Pattern(), allocation[name])
        energy_OI = weight_OI.square() * X_TI.square().mean(dim=0) * removed_OI
        loss_O = squares_O + 0.1 * squares_O.mean()
        lost += float(loss_O @ energy_OI.sum(dim=1))
    return lost


def test_linears_whose_errors_cost_less_lose_more_weights(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_sensitivity, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr("prunus.pruning.allocate_sparsity._PART", 1)
    recipe = Recipe(
        calibration="token ids", samples=4, seqlen=16, dtype="float32", allocation="fisher"
    )
    plan = Pruning(dense, None, recipe, RunOptions(calibration_data=IDS)).plan()
    found = allocate(plan, SILENT, IDS, {})
    assert all(0.25 <= value <= 0.75 for value in found.values())
    # No exchange of sparsity between two linears of equal shape lowers the loss by much.
    least, exchanges = losses_of(dense, found), 0
    assert least < losses_of(dense, dict.fromkeys(found, 0.5))
    for more, less in itertools.permutations(found, 2):
        alike = plan.selected_linears()[more].shape == plan.selected_linears()[less].shape
        if alike and found[more] <= 0.7 and found[less] >= 0.3:
            exchanges += 1
            moved = found | {more: found[more] + 1 / 32, less: found[less] - 1 / 32}
            assert losses_of(dense, moved) > 0.99 * least
    assert exchanges
