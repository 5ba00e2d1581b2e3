"""The statistics of the dense model's linears: those of plain hooks in the whole model.

Shape suffixes: T tokens, I inputs.
"""

import pytest
import torch

from prunus.engine.block.collect_statistics import collect_statistics
from prunus.engine.run_options import RunOptions
from prunus.engine.session import SILENT
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from sensitivity_cases import IDS, whole_model
from tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.mark.parametrize("walk", ["lockstep", "replay"])
def test_every_linear_of_the_dense_model_gets_the_sums_of_its_inputs(walk, tmp_path, monkeypatch):
    folder = tiny_checkpoint(tmp_path / "dense", "llama")
    recipe = Recipe(samples=4, seqlen=16, batch=2, dtype="float32")
    plan = Pruning(folder, None, recipe, RunOptions(calibration_data=IDS)).plan()
    monkeypatch.setattr(type(plan), "walks", [walk] * len(plan.skeleton))
    found, weights = {}, {}

    def keep(name, linear, statistics):
        found[name] = statistics
        weights[name] = linear.weight_OI.clone()

    collect_statistics(plan, SILENT, IDS, digests := {}, "gram", keep)
    expected = {name: each for name, each in whole_model(folder).items() if ".layers." in name}
    assert [*found] == [*plan.selected_linears()]
    assert found.keys() == expected.keys()
    assert len(digests) == len(plan.skeleton)
    for name, (weight_OI, _, X_TI) in expected.items():
        torch.testing.assert_close(weights[name], weight_OI, rtol=0, atol=0)
        assert found[name].tokens == IDS.numel()
        torch.testing.assert_close(found[name].gram_II, X_TI.T @ X_TI, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[name].norms_I, X_TI.norm(dim=0), rtol=1e-4, atol=1e-4)
    q, k = (found[f"model.layers.0.self_attn.{x}_proj"] for x in "qk")
    assert q is k
