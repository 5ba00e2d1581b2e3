"""Processor seconds of whole runs: methods and presets at 50 and 60 %, for docs/results/times.json.

    python benchmarks/run_times.py MODEL SCRATCH --data DIR [--only NAME,NAME] [--patterns 0.5,0.6]

Each run is a process of its own on one thread. Its user and system seconds are counted, imports
included, so that other work on the machine changes them little. Figures of other runs in the file
stay. Five runs at two sparsities on SmolLM2-135M take some 35 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from prunus.hardware.machine import describe_hardware, versions

TIMES = Path(__file__).resolve().parent.parent / "docs" / "results" / "times.json"
#: Series of the plots -> the options that choose it.
RUNS = {
    "magnitude": ["--method", "magnitude"],
    "wanda": ["--preset", "fast"],
    "sparsegpt": ["--method", "sparsegpt"],
    "balanced": ["--preset", "balanced"],
    "best": ["--preset", "best"],
}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="local copies of the datasets")
    parser.add_argument("--only", default=",".join(RUNS), help="names of runs")
    parser.add_argument("--patterns", default="0.5,0.6", help="sparsities")
    options = parser.parse_args()

    times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {"seconds": {}}
    times |= {"hardware": describe_hardware(torch.device("cpu")), "versions": versions()}
    for sparsity in options.patterns.split(","):
        for name in options.only.split(","):
            taken = processor_seconds(options.model, options.scratch, options.data, name, sparsity)
            pattern = f"{round(100 * float(sparsity))} %"
            times["seconds"].setdefault(name, {})[pattern] = round(taken, 1)
            print(f"{name}, {pattern}: {taken:.1f} s", flush=True)
            TIMES.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")


def processor_seconds(model: str, scratch: Path, data: Path, name: str, sparsity: str) -> float:
    """User and system seconds of one run from its start to its end."""
    output = scratch / f"{name}-{sparsity}"
    command = [sys.executable, "-m", "prunus", "prune", model, str(output), *RUNS[name]]
    command += ["--sparsity", sparsity, "--samples", "32", "--seqlen", "1024", "--data", str(data)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(output)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
