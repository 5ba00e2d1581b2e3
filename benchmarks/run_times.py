"""Processor seconds of whole runs, for docs/results/times.json; with --limit also of their parts.

    python benchmarks/run_times.py MODEL SCRATCH --data DIR [--only NAME,NAME] [--patterns 0.5,0.6]
    python benchmarks/run_times.py MODEL SCRATCH --data DIR --limit NAME [--only …] [--windows 4]

Each run is a process of its own on one thread. Its user and system seconds are counted, imports
included, so that other work on the machine changes them little. Figures of other runs in the file
stay. Five runs at two sparsities on SmolLM2-135M take some 35 minutes of one core.

--limit enters the model as NAME into docs/results/parts.json: for each part of a run its seconds,
its floating-point operations as torch counts them, and the speed of one large product, which the
same process measures. Operations are counted in a second run, because counting takes up to half of
the time. Those of C++ kernels are not counted, but those of the Gram matrix are.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from prunus.hardware.machine import describe_hardware, versions

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
#: Series of the plots -> the options that choose it.
RUNS = {
    "magnitude": ["--method", "magnitude"],
    "wanda": ["--preset", "fast"],
    "sparsegpt": ["--method", "sparsegpt"],
    "balanced": ["--preset", "balanced"],
    "best": ["--preset", "best"],
}
#: Runs whose parts are timed -> their commands.
LIMITS = {
    "fast": ["prune", *RUNS["wanda"]],
    "balanced": ["prune", *RUNS["balanced"]],
    "best": ["prune", *RUNS["best"]],
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
    "measurement": ["engine.allocate_sparsity:measure_loss", "compression.rounding:measure_loss"],
    "types": ["compression.rounding:type_losses"],
    "forward": ["engine.block.change_block:BlockChanger._walk", "model.stream:Stream.advance"],
    "Gram": ["methods.statistics:InputStatistics.add", "kernels.library:Library.add_gram"],
    "method": ["methods.table:Method.apply"],
    "output error": ["engine.block.linear:_output_error"],
    "training": ["engine.reconstruction.reconstruct_block:train_block"],
    "embedding, head": ["compression.rounding:rounded_outside"],
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
    parser.add_argument("--data", type=Path, required=True, help="local copies of the datasets")
    parser.add_argument("--only", help="names of runs")
    parser.add_argument("--patterns", default="0.5,0.6", help="sparsities")
    parser.add_argument("--limit", metavar="NAME", help="time the parts; the model as a table")
    parser.add_argument("--windows", default="16", help="windows of 512 tokens with --limit")
    options = parser.parse_args()

    path = RESULTS / ("parts.json" if options.limit else "times.json")
    times = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seconds": {}}
    times |= {"hardware": describe_hardware(torch.device("cpu")), "versions": versions()}
    model, scratch = options.model, options.scratch
    few = "" if options.windows == "16" else f", {options.windows} windows"
    for name in (options.only or ",".join(LIMITS if options.limit else RUNS)).split(","):
        for sparsity in ("",) if options.limit else options.patterns.split(","):
            python, cell = [sys.executable], f"{round(100 * float(sparsity or 0))} %"
            if options.limit:
                python += [__file__, "--parts", str(scratch / "parts.json")]
                command, windows = LIMITS[name], ["--samples", options.windows, "--seqlen", "512"]
                cell = name + few
            else:
                python += ["-m", "prunus"]
                command = ["prune", *RUNS[name], "--sparsity", sparsity]
                windows = ["--samples", "32", "--seqlen", "1024"]
            output = scratch / ("run.gguf" if command[0] == "compress" else "run")
            given = [model, str(output), *command[1:], *windows, "--data", str(options.data)]
            figures = taken = processor_seconds([*python, command[0], *given])
            shutil.rmtree(output, ignore_errors=True)
            if options.limit:
                timed = json.loads((scratch / "parts.json").read_text(encoding="utf-8"))
                python[2] = "--operations"
                processor_seconds([*python, command[0], *given])
                counted = json.loads((scratch / "parts.json").read_text(encoding="utf-8"))
                figures = timed | {"all": taken, "operations": counted["operations"]}
            times["seconds"].setdefault(options.limit or name, {})[cell] = figures
            print(f"{name}, {cell}: {taken:.1f} s", flush=True)
            path.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")


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
