"""A pruned checkpoint for the tests of reports."""

from pathlib import Path

import pytest

import prunus
from tiny import ids_file, tiny_checkpoint


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A pruned checkpoint; no test writes to it."""
    folder = tmp_path_factory.mktemp("report")
    dense, ids = tiny_checkpoint(folder / "dense"), ids_file(folder / "ids.safetensors", 4, 16)
    prunus.prune(dense, folder / "out", calibration=str(ids), samples=4, seqlen=16)
    return folder / "out"
