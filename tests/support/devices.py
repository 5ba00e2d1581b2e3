"""For tests that run on several devices: the comparison of their results."""

import os
from pathlib import Path

from safetensors.torch import load_file

from pretend_cuda import INSTALLED

#: Whether CUDA devices are pretend ones; see `pretend_cuda.py`.
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
