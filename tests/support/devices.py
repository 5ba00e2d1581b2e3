"""For tests that run on several devices: their names, and the comparison of their results."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretend_cuda import INSTALLED

__all__ = ["DEVICES", "PRETEND", "assert_same_tensors", "assert_same_weights"]

#: For `pytest.mark.parametrize`: the processor, and a CUDA device, real or pretend.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
#: Whether CUDA devices are pretend ones; see `pretend_cuda_plugin.py`.
PRETEND = INSTALLED in os.environ


def assert_same_weights(expected: Path, found: Path) -> None:
    """Compare the safetensors files of two folders.

    A pretend device computes with the operators of the processor, so all bytes are the same. A real
    one rounds otherwise, and 99.9 % of the zeros must be the same.
    """
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in found.glob("*.safetensors"))
    if PRETEND:
        different = [n for n in names if (expected / n).read_bytes() != (found / n).read_bytes()]
        assert not different
        return
    same = total = 0
    for name in names:
        left, right = load_file(expected / name), load_file(found / name)
        assert left.keys() == right.keys()
        same += sum(int(((left[key] == 0) == (right[key] == 0)).sum()) for key in left)
        total += sum(tensor.numel() for tensor in left.values())
    assert same >= 0.999 * total


def assert_same_tensors(expected: torch.Tensor, found: torch.Tensor) -> None:
    """Compare two tensors, of which the second may be on a device."""
    if PRETEND:
        assert torch.equal(expected, found.cpu())
    else:
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
