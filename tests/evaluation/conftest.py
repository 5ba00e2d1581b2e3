"""Fixtures of the tests that compare a model with a reference."""

import pytest
import torch
from safetensors.torch import save_file

from packed_reference import pruned_checkpoint
from prunus import pack
from tiny import tiny_checkpoint, token_ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, the same pruned and packed, and two texts; no test writes to them."""
    root = tmp_path_factory.mktemp("models")
    # Weights large enough for predictions that are far from uniform.
    large = {"initializer_range": 0.3}
    tiny_checkpoint(root / "dense", "llama", torch.bfloat16, **large)
    pruned_checkpoint(root / "pruned", **large)
    pack(root / "pruned", root / "packed")
    save_file({"input_ids": token_ids(5, 24)}, root / "ids.safetensors")
    save_file({"input_ids": token_ids(3, 24)}, root / "other.safetensors")
    return root
