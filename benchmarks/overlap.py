"""What reading ahead and writing behind save: one run with and one without, from a cold cache.

    python benchmarks/overlap.py SCRATCH [--blocks 16] [--hidden 4096] [--method wanda] \\
        [--samples 2] [--seqlen 1024] [--rounds 2] [--json FILE]

The model has LLaMA-7B's blocks with random weights, 405 MB each in bfloat16. SCRATCH needs twice
the size of the model. Before every run all pages of the model leave the page cache. The runs take
turns. In every round the script also measures how long the same bytes take to be read, checked and
hashed, and to be written, with nothing else going on. A run cannot take less than the larger of
this time and its computation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
from larger_than_memory import forget
from llama_shapes import VOCABULARY, write_checkpoint

import prunus
from prunus.engine.memory import Memory
from prunus.hardware.memory import describe_hardware, versions
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.checkpoint.writer import save_safetensors
from prunus.model.source import tensors_digest


def disk_seconds(model: Path, scratch: Path, blocks: int) -> tuple[float, float]:
    """Seconds to read and hash all blocks, and to write as many bytes."""
    checkpoint = Checkpoint(model)
    reading = writing = 0.0
    for index in range(blocks):
        names = [name for name in checkpoint.tensors if f".layers.{index}." in name]
        started = time.perf_counter()
        tensors = dict(checkpoint.read(names))
        for tensor in tensors.values():
            torch.aminmax(tensor)
        tensors_digest(tensors)
        reading += time.perf_counter() - started
        started = time.perf_counter()
        save_safetensors(scratch / "written.safetensors", tensors)
        writing += time.perf_counter() - started
    (scratch / "written.safetensors").unlink()
    return reading, writing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model, result = options.scratch / "model", options.scratch / "result"
    if not (model / "model.safetensors.index.json").exists():
        write_checkpoint(model, options.blocks, options.hidden)
    generator = torch.Generator().manual_seed(0)
    shape = (options.samples, options.seqlen)
    ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    seconds: dict[str, list[float]] = {"one after the other": [], "at the same time": []}
    disk: list[tuple[float, float]] = []
    for _ in range(options.rounds):
        forget(model)
        disk.append(disk_seconds(model, options.scratch, options.blocks))
        print(f"reading {disk[-1][0]:.1f} s, writing {disk[-1][1]:.1f} s", flush=True)
        for (name, measured), overlaps in zip(seconds.items(), (False, True), strict=True):
            forget(model)
            shutil.rmtree(result, ignore_errors=True)
            with patch.object(Memory, "overlaps", overlaps):
                started = time.perf_counter()
                prunus.prune(model, result, options.method, calibration=ids)
                measured.append(time.perf_counter() - started)
            print(f"{name}: {measured[-1]:.1f} s", flush=True)
    shutil.rmtree(result)
    median = {name: statistics.median(measured) for name, measured in seconds.items()}
    before, after = median.values()
    print(f"at the same time: {after / before:.3f} of the time of one after the other")
    if options.json:
        content = {
            "what": "Seconds of a run on LLaMA-7B's blocks, by benchmarks/overlap.py.",
            "hardware": describe_hardware(torch.device("cpu")),
            "versions": versions(),
            "options": {k: str(v) for k, v in vars(options).items() if k != "json"},
            "seconds": seconds,
            "disk_seconds": disk,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
