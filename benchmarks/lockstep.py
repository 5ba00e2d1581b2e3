"""One pass in lockstep against the original's two passes per block, from start to end, in turns.

    python benchmarks/lockstep.py MODEL [--rounds 3] [--dtype auto] [--method wanda] [--json FILE]

Each measurement is a separate `prunus prune` process on 32 windows of 1024 tokens. "total" is the
time of the command with imports, "blocks" the time of the loop over blocks. The text is C4 from the
local folder in $PRUNUS_DATA, or python-docs if that is not set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(
    model: str, propagate: str, options: argparse.Namespace, folder: Path
) -> tuple[float, float, float, str]:
    """Run one process: total seconds, seconds of the blocks, peak memory in GB, dtype."""
    out, report = folder / "out", folder / "report.json"
    shutil.rmtree(out, ignore_errors=True)
    source = "c4" if os.environ.get("PRUNUS_DATA") else "python-docs"
    command = [sys.executable, "-m", "prunus", "prune", model, str(out), "--method", options.method]
    command += [
        "--propagate",
        propagate,
        "--samples",
        "32",
        "--seqlen",
        "1024",
        "--dtype",
        options.dtype,
    ]
    command += ["--calibration", source, "--json", str(report)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    total = time.perf_counter() - started
    manifest = json.loads(report.read_text())
    totals = manifest["totals"]
    return (
        total,
        totals["block_seconds"],
        totals["peak_memory_bytes"] / 1e9,
        manifest["inputs"]["dtype"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, list[tuple[float, float, float, str]]] = {"linear": [], "block": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for propagate, found in rows.items():
                found.append(measure(options.model, propagate, options, Path(folder)))
    ratios = [b[0] / a[0] for a, b in zip(rows["linear"], rows["block"], strict=True)]
    block_ratios = [b[1] / a[1] for a, b in zip(rows["linear"], rows["block"], strict=True)]
    for propagate, found in rows.items():
        total, blocks, peak = (statistics.median(row[i] for row in found) for i in range(3))
        print(
            f"{propagate:7} total {total:6.1f} s  blocks {blocks:6.1f} s  peak {peak:.2f} GB  "
            f"{found[0][3]}"
        )
    print(
        f"two passes / lockstep: total {statistics.median(ratios):.2f}, "
        f"blocks {statistics.median(block_ratios):.2f}"
    )
    if options.json:
        results = {"rows": rows, "total_ratios": ratios, "block_ratios": block_ratios}
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
