"""Fixtures of the tests that compare a model with a reference."""

import pytest
import torch

import prunus
from tiny import ids_file, pruned_checkpoint, tiny_checkpoint, token_ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, the same pruned and compressed, and a text; no test writes to them."""
    root = tmp_path_factory.mktemp("models")
    # Weights large enough for predictions that are far from uniform.
    large = {"initializer_range": 0.3}
    tiny_checkpoint(root / "dense", "llama", torch.bfloat16, **large)
    pruned_checkpoint(root / "pruned", **large)
    prunus.compress(root / "dense", root / "small", 8, calibration=token_ids())
    ids_file(root / "ids.safetensors", 5, 24)
    return root
