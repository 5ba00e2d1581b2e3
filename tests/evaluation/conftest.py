"""Fixtures of the tests that compare a model with a reference."""

import pytest
import torch
from safetensors.torch import save_file

import prunus
from tiny import pruned_checkpoint, tiny_checkpoint, token_ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, the same pruned and compressed, and two texts; no test writes to them."""
    root = tmp_path_factory.mktemp("models")
    # Weights large enough for predictions that are far from uniform.
    large = {"initializer_range": 0.3}
    tiny_checkpoint(root / "dense", "llama", torch.bfloat16, **large)
    pruned_checkpoint(root / "pruned", **large)
    prunus.compress(root / "dense", root / "small", 8, calibration=token_ids())
    save_file({"input_ids": token_ids(5, 24)}, root / "ids.safetensors")
    save_file({"input_ids": token_ids(3, 24)}, root / "other.safetensors")
    return root
