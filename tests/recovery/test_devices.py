"""Recovery on a CUDA device trains as on the processor."""

import pytest
import torch
from safetensors.torch import load_file

from recovery_cases import dense_checkpoint, pruned_checkpoint, recover, training_text

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("recovery")
    dense_checkpoint(root / "dense", dtype=torch.bfloat16)
    pruned_checkpoint(root / "pruned", root / "dense")
    training_text(root)
    return root


@pytest.mark.parametrize("mode", ["masked", "lora"])
def test_every_mode_trains_alike(mode, folders, tmp_path):
    if mode == "lora":
        pytest.importorskip("peft")
    options = {"teacher": folders / "dense"} if mode == "masked" else {}
    totals = {}
    for device in ("cpu", "cuda:0"):
        out = tmp_path / device
        record = recover(
            folders / "pruned",
            out,
            mode,
            folders / "text.txt",
            device=device,
            tokens=160,
            **options,
        )
        totals[device] = record.totals["held_out_perplexity_after"]
    assert totals["cuda:0"] == pytest.approx(totals["cpu"], rel=1e-2)
    # The norm of all gradients is summed in another order on a device.
    for path in (tmp_path / "cpu").glob("*.safetensors"):
        expected, found = load_file(path), load_file(tmp_path / "cuda:0" / path.name)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name] == 0, tensor == 0) or mode == "lora", name
            torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)
