"""The sparsity of every linear: by the loss of the dense model, recorded, kept by a resumed run."""

import itertools

import pytest

import prunus
import reference
from prunus.engine import loss_sensitivity
from prunus.engine.allocation import allocate
from prunus.engine.linear_job import plan_run
from prunus.engine.options import RunOptions
from prunus.engine.session import SILENT
from prunus.methods.patterns import Pattern
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from sensitivity_cases import IDS, whole_model
from stopping import StopError, stop_after
from tiny import shards, tiny_checkpoint, token_ids


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
    with pytest.raises(StopError):
        prunus.prune(dense, tmp_path / "out", **options, progress=stop_after(1))
    kept = Manifest.load(tmp_path / "out").allocation
    monkeypatch.setattr(
        "prunus.engine.allocation.measure_loss", lambda *a: pytest.fail("measured twice")
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


def test_linears_whose_errors_cost_less_lose_more_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_sensitivity, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr("prunus.engine.allocation._PART", 1)
    dense = tiny_checkpoint(tmp_path / "dense")
    recipe = Recipe(
        calibration="token ids", samples=4, seqlen=16, dtype="float32", allocation="fisher"
    )
    job = plan_run(dense, recipe, RunOptions(calibration_data=IDS))
    found = allocate(job, SILENT, IDS, {})
    assert all(0.25 <= value <= 0.75 for value in found.values())
    # No exchange of sparsity between two linears of equal shape lowers the loss by much.
    least, exchanges = losses_of(dense, found), 0
    assert least < losses_of(dense, dict.fromkeys(found, 0.5))
    for more, less in itertools.permutations(found, 2):
        alike = job.selected_linears()[more].shape == job.selected_linears()[less].shape
        if alike and found[more] <= 0.7 and found[less] >= 0.3:
            exchanges += 1
            moved = found | {more: found[more] + 1 / 32, less: found[less] - 1 / 32}
            assert losses_of(dense, moved) > 0.99 * least
    assert exchanges
