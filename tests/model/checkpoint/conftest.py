"""Checkpoints, text and token ids for the tests of faults, locks and foreign files."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from recovery_cases import dense_checkpoint, pruned_checkpoint, training_text
from tiny import ids_file


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with checkpoints, text, token ids and a GGUF file; no test writes to it."""
    folder = tmp_path_factory.mktemp("material")
    pruned_checkpoint(folder / "pruned", dense_checkpoint(folder / "dense", dtype=torch.bfloat16))
    ids_file(folder / "ids.safetensors")
    training_text(folder)
    if find_spec("gguf"):
        from tiny_gguf import tiny_llama, write_gguf

        write_gguf(tiny_llama(), folder / "tiny.gguf")
    return folder
