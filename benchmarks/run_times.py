"""Processor seconds of the parts of whole runs, on which the forecasts of `plan` rest.

    python benchmarks/run_times.py MODEL SCRATCH NAME --data DIR --json FILE
        [--only NAME,NAME] [--windows 4]

Each run is a process of its own on one thread. Its user and system seconds are counted, imports
included, so that other work on the machine changes them little. The model is entered as NAME;
figures of other runs in the file stay.

For each part of a run the file has its seconds, its floating-point operations as torch counts them,
and the speed of one large product, which the same process measures. Operations are counted in a
second run, because counting takes up to half of the time. Those of C++ kernels are not counted, but
those of the Gram matrix are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from figures import load, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

#: Runs whose parts are timed -> their commands.
RUNS = {
    "fast": ["prune", "--preset", "fast"],
    "balanced": ["prune", "--preset", "balanced"],
    "best": ["prune", "--preset", "best"],
    "feedback": ["compress", "--bits", "4"],
    "nearest": ["compress", "--bits", "4", "--rounding", "nearest"],
}
#: Part of a run -> the functions that do it. A part has what no part inside it has.
PARTS = {
    "windows": ["engine.calibration_windows:calibration_windows"],
    "reading": [
        *(f"model.source:CheckpointSource.{x}" for x in ("block", "outside_digests")),
        *("model.source:CheckpointSource.read_outside", "engine.loop:tensors_digest"),
    ],
    "writing": ["engine.folder:ResultFolder.write_shard", "engine.output:ShardFolder.complete"],
    "measurement": [
        "pruning.allocate_sparsity:measure_loss",
        "compression.type_rounding:measure_loss",
    ],
    "types": ["compression.type_rounding:type_losses"],
    "forward": ["engine.block.change_block:BlockChanger._walk", "model.stream:Stream.advance"],
    "Gram": ["methods.statistics:InputStatistics.add", "kernels.library:Library.add_gram"],
    "method": ["methods.table:Method.apply"],
    "output error": ["engine.block.linear:_output_error"],
    "training": ["engine.reconstruction.reconstruct_block:train_block"],
    "embedding, head": ["compression.type_rounding:rounded_outside"],
}
aten = torch.ops.aten
#: Operations of torch beside those that torch counts -> from their result or first argument.
COUNTED: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k: 4 * q.numel() * k.shape[-2],
    aten.linalg_cholesky_ex: lambda a, *_: a.shape[-1] ** 3 / 3,
    aten.cholesky_inverse: lambda a, *_: a.shape[-1] ** 3 * 2 / 3,
    aten._linalg_eigh: lambda a, *_: 9 * a.shape[-1] ** 3,
    aten.linalg_solve_triangular: lambda a, b, *_: b.numel() * a.shape[-1],
}


def main() -> None:
    if sys.argv[1] in ("--parts", "--operations"):
        Parts().run(Path(sys.argv[2]), sys.argv[3:], sys.argv[1] == "--operations")
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("name", help="what the table calls the model")
    parser.add_argument("--data", type=Path, required=True, help="local copies of the datasets")
    parser.add_argument("--only", help="names of runs")
    parser.add_argument("--windows", default="16", help="windows of 512 tokens")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()

    times = load(options.json)
    parts = options.scratch / "parts.json"
    few = "" if options.windows == "16" else f", {options.windows} windows"
    for name in (options.only or ",".join(RUNS)).split(","):
        verb, *rest = RUNS[name]
        output = options.scratch / ("run.gguf" if verb == "compress" else "run")
        windows = ["--samples", options.windows, "--seqlen", "512", "--data", str(options.data)]
        command = [str(parts), verb, options.model, str(output), *rest, *windows]
        taken = processor_seconds([sys.executable, __file__, "--parts", *command])
        shutil.rmtree(output, ignore_errors=True)
        timed = json.loads(parts.read_text(encoding="utf-8"))
        processor_seconds([sys.executable, __file__, "--operations", *command])
        counted = json.loads(parts.read_text(encoding="utf-8"))["operations"]
        figures = timed | {"all": taken, "operations": counted}
        times.setdefault("seconds", {}).setdefault(options.name, {})[name + few] = figures
        print(f"{name}{few}: {taken:.1f} s", flush=True)
        save(options.json, times, "python benchmarks/run_times.py MODEL SCRATCH NAME --data DIR")


def processor_seconds(command: list[str]) -> float:
    """User and system seconds of one run from its start to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 1)


class Parts(TorchDispatchMode):
    """Processor seconds and operations of the parts of one run, over all its threads."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.operations = Counter[str](), Counter[str]()
        self.here = threading.local()

    def run(self, figures: Path, command: list[str], counts: bool) -> None:
        """Run a command in this process, and write the figures; `counts` counts operations too."""
        from prunus.cli.program import app

        for part, functions in PARTS.items():
            for module, _, name in (function.partition(":") for function in functions):
                if module.startswith("compression") and command[0] == "prune":
                    continue
                owner: Any = import_module(f"prunus.{module}")
                *outer, last = name.split(".")
                for each in outer:
                    owner = getattr(owner, each)
                setattr(owner, last, self.timed(part, getattr(owner, last)))
        self.seconds["start"] = time.process_time()
        with self if counts else contextlib.nullcontext():
            self.timed("rest", app)([*command, "--overwrite"], standalone_mode=False)
        speeds = {str(x)[6:]: self.speed(x) for x in (torch.float32, torch.bfloat16)}
        parts = {part: round(seconds, 2) for part, seconds in self.seconds.items()}
        record = {"speeds": speeds, "parts": parts, "operations": self.operations}
        figures.write_text(json.dumps(record), encoding="utf-8")

    def speed(self, dtype: torch.dtype) -> float:
        """Operations in a second of one large product."""
        a, times = torch.ones(2048, 2048, dtype=dtype), []
        for _ in range(3):
            started = time.thread_time()
            a @ a
            times.append(time.thread_time() - started)
        return 2 * 2048**3 / min(times)

    def timed(self, part: str, function: Any) -> Any:
        """The function with its time and its operations counted, without those of parts inside."""

        def inner(*given: Any, **named: Any) -> Any:
            stack = self.here.__dict__.setdefault("stack", [])
            self.book(stack)
            stack.append(part)
            try:
                if getattr(function, "__name__", "") == "add_gram":
                    self.operations[part] += given[2].shape[0] * given[2].shape[1] ** 2
                return function(*given, **named)
            finally:
                self.book(stack)
                stack.pop()

        return inner

    def book(self, stack: list[str]) -> None:
        """Count the time since the last call for the innermost part."""
        now = time.thread_time()
        if stack:
            self.seconds[stack[-1]] += now - self.here.since
        self.here.since = now

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None):
        result, packet = operation(*given, **(named or {})), operation._overloadpacket
        if packet in COUNTED:
            self.operations[self.here.stack[-1]] += COUNTED[packet](*given[:2])
        elif packet in flop_registry:
            count = flop_registry[packet](*given, **(named or {}), out_val=result)
            self.operations[self.here.stack[-1]] += count
        return result


if __name__ == "__main__":
    main()
