"""The kernels for 64-bit Arm, compiled by a cross compiler and run in an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest


def test_neon_gives_the_integers_of_plain_arithmetic():
    for needed in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    script = Path(__file__).with_name("neon.sh")
    run = subprocess.run(["sh", script, "exact"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "instruction set 2: done" in run.stdout
