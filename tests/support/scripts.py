"""Runs a script of this folder in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from places import SUPPORT

__all__ = ["run_script"]


def run_script(name: str, *arguments: object) -> Any:
    """Run `tests/support/NAME` on one thread, and return the JSON of its last line of output."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
