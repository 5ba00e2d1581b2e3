"""Many small runs in one process leave no memory, no file and no thread behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from places import SUPPORT


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
@pytest.mark.parametrize("runs", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_many_runs_in_one_process(runs, tmp_path):
    script = SUPPORT.joinpath("soak.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(runs)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Modules and caches that stay are loaded once every verb has run.
    begin, end = found[-1 - len(found) // 2], found[-1]
    assert end["files"] == begin["files"], found
    assert end["threads"] == begin["threads"], found
    assert end["resident"] - begin["resident"] < 8e6, found
