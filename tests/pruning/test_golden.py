"""A whole run gives the masks of the original code."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunus
from golden import CASES, agreement

#: Linear by linear, these are compared more closely in test_methods_golden.py.
SLOW = ("sparsegpt_2of4", "ablate_mag_iter_2of4", "ablate_wanda_iter_unstructured")
MARKS = dict.fromkeys(SLOW, pytest.mark.slow)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.file, marks=MARKS.get(c.file, ())) for c in CASES]
)
def test_masks_and_norms_are_the_originals(case, golden, tmp_path):
    prunus.prune(
        golden,
        tmp_path / "out",
        calibration=str(golden / "calibration.safetensors"),
        samples=8,
        seqlen=256,
        dtype="float32",
        propagate="block",
        **case.options,
    )
    weights: dict[str, torch.Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        weights |= load_file(shard)
    result = agreement(golden, case, weights)
    assert len(result) == 14
    for name, (bits, norm) in result.items():
        assert bits >= case.bits, (name, bits)
        assert norm <= case.norm, (name, norm)


def test_the_pruned_stack_computes_what_the_originals_does(golden):
    model = AutoModelForCausalLM.from_pretrained(golden, dtype=torch.float32)
    ids = load_file(golden / "calibration.safetensors")["input_ids"].long()
    prunus.prune(model, calibration=ids, propagate="block", dtype="float32")
    with torch.no_grad():
        last = model.model(ids).last_hidden_state
    with np.load(golden / "official_wanda_unstructured_0.5.npz") as stored:
        norm, sample = float(stored["last_hidden_state_norm"]), stored["last_hidden_state_sample"]
    assert float(last.double().norm()) == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(
        last[0, :4, :16], torch.from_numpy(sample).float(), rtol=1e-3, atol=1e-3
    )
