"""Every weight is read once and written once.

Reads are counted in `Checkpoint.read` and `Checkpoint.pieces`, writes where files get their final
names. What the system reads from the disk through its page cache is measured by
benchmarks/larger_than_memory.py.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import prunus
from prunus.model.checkpoint.tensor_files import Checkpoint
from recovery_cases import dense_checkpoint
from tiny import token_ids


@pytest.fixture
def dense(tmp_path) -> Path:
    return dense_checkpoint(tmp_path / "dense", dtype=torch.bfloat16)


@pytest.fixture
def traffic(monkeypatch):
    """Counts of reads by (folder name, tensor), and counts of writes by name of a weights file."""
    read: Counter[tuple[str, str]] = Counter()
    written: Counter[str] = Counter()
    original_replace = os.replace

    def counting(original):
        def counted(self, names, *arguments, **options):
            if original.__name__ == "pieces" and arguments:
                # The beginning of a few matrices tells whether they were rounded before.
                return original(self, names, *arguments, **options)
            names = names if isinstance(names, str) else list(names)
            each = [names] if isinstance(names, str) else names
            read.update((self.folder.name, name) for name in each)
            return original(self, names, *arguments, **options)

        return counted

    def counting_replace(source, target):
        if Path(target).suffix == ".safetensors":
            written[Path(target).name] += 1
        original_replace(source, target)

    for method in ("read", "pieces"):
        monkeypatch.setattr(Checkpoint, method, counting(getattr(Checkpoint, method)))
    monkeypatch.setattr(os, "replace", counting_replace)
    return read, written


def of_blocks(read: Counter[tuple[str, str]], folder: str) -> set[int]:
    found = {
        count for (name, tensor), count in read.items() if name == folder and ".layers." in tensor
    }
    assert sum(name == folder and ".layers." in tensor for name, tensor in read) == 18
    return found


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_prune(method, dense, tmp_path, traffic):
    read, written = traffic
    prunus.prune(dense, tmp_path / "out", method, calibration=token_ids(), dtype="float32")
    assert of_blocks(read, "dense") == {1}
    # Before the first block the embedding is checked, copied and used. Magnitude does not use it.
    assert read["dense", "model.embed_tokens.weight"] == 2 + (method != "magnitude")
    assert read["dense", "lm_head.weight"] == 2
    assert set(written.values()) == {1} and len(written) == 3


def test_compress(dense, tmp_path, traffic):
    read, written = traffic
    prunus.compress(dense, tmp_path / "out", 4, calibration=token_ids(), dtype="float32")
    assert of_blocks(read, "dense") == {1}
    assert set(written.values()) == {1} and "model-00003-of-00003.safetensors" in written
