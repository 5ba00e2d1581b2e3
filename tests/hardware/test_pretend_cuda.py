"""Tests marked `cuda` run on a pretend device, in a process of their own, without a real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pretend_cuda

TESTS = Path(__file__).parent.parent


def test_what_is_marked_cuda_passes_on_a_pretend_device():
    if reason := pretend_cuda.why_not():
        pytest.skip(reason)
    marked = [p for p in TESTS.rglob("test_*.py") if "mark.cuda\n" in p.read_text("utf-8")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", *map(str, marked)],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {pretend_cuda.INSTALLED: "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
