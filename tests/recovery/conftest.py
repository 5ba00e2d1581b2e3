"""A tiny dense model, the same one pruned, and a text, for all tests of recovery."""

import pytest

from recovery_cases import dense_checkpoint, pruned_checkpoint, training_text


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    return dense_checkpoint(tmp_path_factory.mktemp("recovery") / "dense")


@pytest.fixture(scope="session")
def pruned(dense):
    return pruned_checkpoint(dense.parent / "pruned", dense, sparsity=0.5)


@pytest.fixture(scope="session")
def text(dense):
    return training_text(dense.parent)
