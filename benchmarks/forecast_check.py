"""Compare the forecast of `prunus plan --model-shape` with runs: memory and time.

    python benchmarks/forecast_check.py FOLDER SMOLLM2 [--data DIR] [--json FILE]

SMOLLM2 is a folder with SmolLM2-135M. The other models get random weights in the proportions of
LLaMA-7B, written to FOLDER (2 GB). Each process uses one thread. Seconds count from the start of a
run, without imports. The benchmark takes five minutes, in which nothing else should run on the
computer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from llama_shapes import VOCABULARY, write_checkpoint
from safetensors.torch import save_file

from prunus.hardware.rates import parse_devices
from prunus.pruning.forecast import SHAPES, Shape, forecast

SAMPLES, SEQLEN = 8, 512
# Models with random weights: width, number of blocks, method.
RANDOM = [
    (1024, 3, "wanda"),
    (1024, 3, "sparsegpt"),
    (2048, 3, "wanda"),
    (2048, 3, "sparsegpt"),
    (4096, 1, "wanda"),
]
# Runs on SmolLM2 with one window per batch: method, number of ranks.
REAL = [("wanda", 1), ("wanda", 2), ("sparsegpt", 1), ("sparsegpt", 2)]


def shape_of(hidden: int, blocks: int) -> Shape:
    heads = hidden // 128
    return Shape(hidden, hidden * 11008 // 4096, blocks, heads, heads, 128, VOCABULARY)


def measure(model: Path, out: Path, options: list[str], ranks: int = 1) -> dict[str, Any]:
    """Prune a model and return the totals of the run."""
    shutil.rmtree(out, ignore_errors=True)
    report = out.parent / "report.json"
    command = [sys.executable, "-m", "prunus"]
    if ranks > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, "-m", *torchrun, "-m", "prunus"]
    command += [
        "prune",
        str(model),
        str(out),
        "--samples",
        str(SAMPLES),
        "--seqlen",
        str(SEQLEN),
        *options,
    ]
    command += ["--json", str(report)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    return json.loads(report.read_text())["totals"]


def print_row(name: str, measured: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Print a run and its forecast as a row of a table, and return both."""
    memory, seconds = measured["peak_memory_bytes"], measured["seconds"]
    results = {
        "run": name,
        "memory": memory,
        "memory_forecast": expected["memory"],
        "seconds": seconds,
        "seconds_forecast": expected["seconds"],
    }
    by_memory, by_time = expected["memory"] / memory - 1, expected["seconds"] / seconds - 1
    print(
        f"| {name} | {memory / 1e9:.2f} | {expected['memory'] / 1e9:.2f} ({by_memory:+.0%}) "
        f"| {seconds:.1f} | {expected['seconds']:.1f} ({by_time:+.0%}) |",
        flush=True,
    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("smollm2", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows, out, ids = [], options.folder / "out", options.folder / "ids.safetensors"
    tokens = torch.randint(
        0, VOCABULARY, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0)
    )
    save_file({"input_ids": tokens.int()}, ids)
    core = parse_devices("1-cores")
    for hidden, blocks, method in RANDOM:
        model = options.folder / f"{hidden}-{blocks}"
        if not (model / "model.safetensors.index.json").exists():
            write_checkpoint(model, blocks, hidden)
        found = measure(model, out, ["--method", method, "--calibration", str(ids)])
        expected = forecast(shape_of(hidden, blocks), core, method, SAMPLES, SEQLEN)
        rows.append(print_row(f"width {hidden}, {blocks} blocks, {method}", found, expected))
    where = ["--data", str(options.data)] if options.data else []
    for method, ranks in REAL:
        given = ["--method", method, "--calibration", "c4", "--batch", "1", *where]
        found = measure(options.smollm2, out, given, ranks)
        devices = parse_devices(f"{ranks}x1-cores")
        expected = forecast(SHAPES["smollm2-135m"], devices, method, SAMPLES, SEQLEN, batch=1)
        rows.append(
            print_row(f"SmolLM2, {ranks} rank{'s' * (ranks > 1)}, {method}", found, expected)
        )
    shutil.rmtree(out)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
