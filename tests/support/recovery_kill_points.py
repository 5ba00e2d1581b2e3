"""A child of the resume test of recovery: forks runs and kills them where a file gets its name.

    python recovery_kill_points.py MODEL TEXT SCRATCH MODE:EVERY ...

EVERY is 1 for all such places, 2 for every second. MODE is one of recovery, or max for preset max,
where MODEL is dense. The script prints one JSON line: mode -> the results of `kill_everywhere`.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

import prunus  # noqa: E402
from kill_points import kill_everywhere  # noqa: E402
from recovery_cases import recover  # noqa: E402


def run(mode: str, model: Path, text: Path, out: Path) -> None:
    if mode != "max":
        recover(model, out, mode, text, evaluations=2, tokens=128)
        return
    # Only what the two phases have to do with each other: the resume of `best` has its own tests.
    quick = {"method": "wanda", "dense_weight": 0.0, "reconstruct": "none", "allocation": "uniform"}
    windows = {"calibration": str(text), "samples": 2, "seqlen": 16, "dtype": "float32"}
    prunus.prune_and_recover(model, out, tokens=3072, **windows, **quick)


def main() -> None:
    model, text, scratch = map(Path, sys.argv[1:4])
    found = {}
    for argument in sys.argv[4:]:
        mode, every = argument.split(":")
        places = ((number, number % 3 == 0) for number in itertools.count(0, int(every)))
        work = lambda out: run(mode, model, text, out)  # noqa: B023, E731
        found[mode] = kill_everywhere(work, scratch, places)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
