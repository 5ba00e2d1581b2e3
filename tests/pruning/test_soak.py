"""Many small runs in one process leave no memory, no file and no thread behind."""

from pathlib import Path

import pytest

from scripts import run_script


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
@pytest.mark.parametrize("runs", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_many_runs_in_one_process(runs, tmp_path):
    found = run_script("soak.py", tmp_path, runs)
    # Modules and caches that stay are loaded once every verb has run.
    begin, end = found[-1 - len(found) // 2], found[-1]
    assert end["files"] == begin["files"], found
    assert end["threads"] == begin["threads"], found
    assert end["resident"] - begin["resident"] < 8e6, found
