"""A child of the resume test of recovery: forks runs and kills them where a file gets its name.

    python recovery_kill_points.py MODEL TEXT SCRATCH MODE:EVERY ...

EVERY is 1 for all such places, 2 for every second. MODE is one of recovery, or max for preset max,
where MODEL is dense. The script prints one JSON line: mode -> per
kill point, how the run that followed ended and whether its weights are the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

import prunus  # noqa: E402
from kill_points import child, digests  # noqa: E402
from recovery_cases import recover  # noqa: E402

RENAME = os.replace


def run(mode: str, model: Path, text: Path, out: Path, kill_at: int | None) -> None:
    """Recover, and die at rename `kill_at`: after it if 3 divides the number, else before."""
    count = 0

    def replace(source, target):
        nonlocal count
        if count == kill_at and kill_at % 3:
            os.kill(os.getpid(), signal.SIGKILL)
        RENAME(source, target)
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    os.replace = replace
    if mode != "max":
        recover(model, out, mode, text, evaluations=2, tokens=128)
        return
    # Only what the two phases have to do with each other: the resume of `best` has its own tests.
    quick = {"method": "wanda", "dense_weight": 0.0, "reconstruct": "none", "allocation": "uniform"}
    windows = {"calibration": str(text), "samples": 2, "seqlen": 16, "dtype": "float32"}
    prunus.prune_and_recover(model, out, tokens=3072, **windows, **quick)


def kill_everywhere(mode: str, every: int, model: Path, text: Path, scratch: Path) -> list[dict]:
    """Kill a run at every place, resume it, and return what happened."""
    # The first run is in the parent, so that the children need not import the model's code again.
    # The process has one thread, so it forks safely.
    run(mode, model, text, scratch / f"{mode}-whole", None)
    expected, results, kill_at = digests(scratch / f"{mode}-whole"), [], 0
    while True:
        out = scratch / "killed"
        shutil.rmtree(out, ignore_errors=True)
        status = child(lambda: run(mode, model, text, out, kill_at))  # noqa: B023
        if status == 0:
            return results
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        found = sorted(path.name for path in out.rglob("*")) if out.exists() else []
        second = child(lambda: run(mode, model, text, out, None))  # noqa: B023
        left = [x.name for x in out.iterdir() if x.name.startswith(("best-", ".prunus"))]
        left += [path.name for path in out.glob("*.partial")]
        results.append(
            {
                "found": found,
                "status": second,
                "equal": digests(out) == expected,
                "left_behind": left,
            }
        )
        kill_at += every


def main() -> None:
    model, text, scratch = map(Path, sys.argv[1:4])
    found = {}
    for argument in sys.argv[4:]:
        mode, every = argument.split(":")
        found[mode] = kill_everywhere(mode, int(every), model, text, scratch)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
