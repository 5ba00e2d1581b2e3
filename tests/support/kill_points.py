"""A child of the resume tests: forks runs that die of SIGKILL wherever a file gets its final name.

python kill_points.py DENSE SCRATCH [OPTIONS [before]]

OPTIONS is a JSON object with options of `prune`. With `before`, runs die before a rename only.

It prints one JSON line: for each kill point, whether the next run resumed, and whether its files
are those of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)

import prunus  # noqa: E402

RENAME = os.replace


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a fork; returns its process id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def child(work: Callable[[], object]) -> int:
    """Run `work` in a fork and wait for it; returns the wait status."""
    return os.waitpid(fork(work), 0)[1]


def run(dense: str, out: Path, kill_at: int | None, after: bool) -> None:
    """Prune, and die before or after rename number `kill_at`; None: run to the end."""
    original, count = RENAME, 0

    def replace(source, target):
        nonlocal count
        if count == kill_at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)
        if count == kill_at and after:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    os.replace = replace
    ids = torch.arange(96).reshape(6, 16) % 120
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    verb = prunus.compress if "bits" in options else prunus.prune
    verb(dense, out, calibration=ids, batch=2, dtype="float32", **options)


def digests(out: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.glob("*.safetensors"))
    }


def main() -> None:
    dense, scratch = sys.argv[1], Path(sys.argv[2])
    # The first run is in the parent, so that the forks need not import the model's code again. A
    # process with one thread forks safely.
    run(dense, scratch / "whole", None, False)
    expected, results = digests(scratch / "whole"), []
    # The moment after a rename is like the moment before the next one: every third is enough.
    moments = [(False, 1)] if sys.argv[4:] == ["before"] else [(False, 1), (True, 3)]
    for after, step in moments:
        kill_at = 0
        while True:
            out = scratch / "killed"
            shutil.rmtree(out, ignore_errors=True)
            status = child(lambda: run(dense, out, kill_at, after))  # noqa: B023
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            loads = (out / "model.safetensors.index.json").exists()
            finished = len(list(out.glob("block-*.safetensors")))
            second = child(lambda: run(dense, out, None, False))  # noqa: B023
            left = [p.name for p in out.glob("*.partial")]
            results.append(
                {
                    "kill_at": kill_at,
                    "after": after,
                    "index_before_resume": loads,
                    "blocks_before_resume": finished,
                    "status": second,
                    "equal": digests(out) == expected,
                    "left_behind": left,
                }
            )
            kill_at += step
    print(json.dumps(results))


if __name__ == "__main__":
    main()
