"""The forecast of a run's time changes no byte, and says nothing if it knows nothing.

No test depends on the clock: times that are compared are given.
"""

from unittest.mock import Mock

import pytest

import prunus
from prunus.engine import forecast, linear_command
from prunus.engine.linear_record import ReconstructionRecord
from prunus.engine.run_options import RunOptions
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from prunus.reporting.tables import plan_facts
from prunus.rounding.measuring_trial import Steps
from tiny import ids_file, shards, tiny_checkpoint, token_ids

OPTIONS = {
    "fast": {"preset": "fast"},
    "best": {"preset": "best", "batch": 2},
    "magnitude": {"method": "magnitude"},
}


def planned(dense, **recipe):
    given = RunOptions(calibration_data=None if "calibration" in recipe else token_ids())
    command = Pruning(dense, None, Recipe(**{"samples": 6, "seqlen": 16} | recipe), given)
    return command, command.plan()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_long_run_says_its_time_and_writes_the_same_bytes(dense, tmp_path, monkeypatch, options):
    given = {"calibration": token_ids(), "sparsity": 0.5, **options}
    said = {"short": [], "long": []}
    for name, many in (("short", linear_command._MANY_BATCHES), ("long", 0)):
        monkeypatch.setattr(linear_command, "_MANY_BATCHES", many)
        prunus.prune(dense, tmp_path / name, announce=said[name].append, progress=False, **given)
    # Once before anything is measured, and once with the first block, where it stays to be read.
    assert [str(x).count("; the run takes about") for x in said.values()] == [0, 2]
    assert shards(tmp_path / "short") == shards(tmp_path / "long")


def test_a_plan_of_prune_and_of_compress_has_seconds(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=3)
    text = {"calibration": str(ids_file(tmp_path / "ids.safetensors")), "samples": 6, "seqlen": 16}
    rounded = [{"bits": 4}, {"bits": 4, "rounding": "nearest"}, {"bits": 5, "format": "mlx"}]
    for options in ({"preset": "fast"}, *rounded):
        plan = prunus.plan(model, tmp_path / "x", **text, **options)
        assert plan["seconds"] is not None
        assert dict(plan_facts(plan).items)["time"].startswith("about")
    assert list(plan["preset_seconds"]) == ["fast", "balanced", "best"]
    assert plan["preset_seconds"]["balanced"] == plan["seconds"]
    assert all(plan["preset_seconds"].values())
    assert prunus.plan(model, blocks=1, **text)["seconds"] is None


@pytest.mark.parametrize("recipe", [{"allocation": "owl"}, {"propagate": "block"}])
def test_nothing_is_said_of_a_run_that_no_trial_knows(dense, recipe):
    command, plan = planned(dense, **recipe)
    assert command.forecast(plan) is None


def test_a_trial_that_fails_says_nothing_but_a_fault_of_prunus_shows(dense, tmp_path, monkeypatch):
    errors = [ValueError("weights are not finite"), KeyError("blocks")]
    monkeypatch.setattr(forecast, "read_block", Mock(side_effect=errors))
    command, plan = planned(dense, calibration=str(ids_file(tmp_path / "ids.safetensors")))
    assert command.forecast(plan) is None
    with pytest.raises(KeyError, match="blocks"):
        command.forecast(plan)


def test_a_measurement_grows_with_windows_and_blocks(dense):
    _, plan = planned(dense)
    # Begun, two passes forward, the loss and one pass back, the other pass back.
    one = Steps([0.0, 1.5, 2.0, 5.5, 6.0])
    two = Steps([10.0, 11.5, 12.25, 17.0, 17.75])
    assert one.parts() == (1.0, 3.0, 1.0)
    assert two.parts() == (0.75, 4.0, 1.5)
    windows, blocks = min(8, plan.recipe.samples), len(plan.skeleton)
    # A further window costs half a second in each block, and two seconds of loss.
    expected = 1.0 + 3.0 + (windows - 1) * 2.0 + blocks * (1.0 + (windows - 1) * 0.5)
    assert two.measuring(plan, one) == expected


def test_training_grows_with_steps_and_validations(dense):
    _, plan = planned(dense, preset="best", batch=1, samples=32, seqlen=16, reconstruct_epochs=2)
    record = ReconstructionRecord(
        error_before=1.0,
        error_after=0.5,
        steps=2,
        dtype="float32",
        seconds=10.0,
        step_seconds=0.5,
        validation_seconds=0.25,
    )
    # Two epochs over 30 batches are 60 steps; five validations of two batches, not of one.
    assert plan.drift_stride == 1
    assert forecast._training(plan, 0, record, 2) == 10.0 + 58 * 0.5 + 5 * 0.25
