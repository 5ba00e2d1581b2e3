"""Commands on a checkpoint that is larger than the memory limit, and their disk traffic.

    python benchmarks/larger_than_memory.py MODEL SCRATCH \\
        --memory 2GB --training-memory 3GB --data DIR

MODEL's safetensors must be larger than either limit. Each command runs in a separate process in a
memory control group (Linux, root; cgroup v1 or v2). The group counts cached pages of files as well,
and kills a process that exceeds the limit. No page of MODEL is in the cache when a command starts.
RLIMIT_AS and RLIMIT_DATA are of no use here, because they count a mapped file as if it were in
memory. For each command the script prints the group's peak, resident memory, bytes read from and
written to the disk (/proc/self/io, counted after the imports), and the sizes of the command's input
and output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prunus.words import parse_bytes

GROUP = f"prunus-larger-than-memory-{os.getpid()}"
# The process of a command: first its imports, which read the disk too, then the command, then its
# costs.
CHILD = """
import json, resource, sys
import torch
torch.set_num_threads(int(sys.argv[2]))
import transformers.models.auto.modeling_auto
import prunus.evaluation, prunus.pruning.prune, prunus.recovery
from prunus.cli.program import app
from transformers import AutoConfig, AutoModelForCausalLM
AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(sys.argv[3]))]
def io():
    return {k: int(v) for k, v in (line.split(": ") for line in
    open("/proc/self/io").read().splitlines())}
before = io()
status = 0
try:
    status = app(sys.argv[4:], standalone_mode=False) or 0
except BaseException as fault:
    status = getattr(fault, "exit_code", getattr(fault, "code", 1)) or 1
after = io()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
cost = {k: after[k] - before[k] for k in ("read_bytes", "write_bytes")}
json.dump({"status": status, "resident": peak, **cost}, open(sys.argv[1], "w"))
"""


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """Create a memory control group below this process's own, and remove it at the end."""
    first = Path("/sys/fs/cgroup/memory")
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {name: path.lstrip("/") for _, name, path in (line.split(":", 2) for line in lines)}
    if first.is_dir():
        group = first / own.get("memory", "") / GROUP
        limit_name, swap_name = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
    else:
        group = Path("/sys/fs/cgroup") / own.get("", "") / GROUP
        limit_name, swap_name = "memory.max", "memory.swap.max"
    group.mkdir()
    try:
        (group / limit_name).write_text(str(limit))
        if (group / swap_name).exists():
            (group / swap_name).write_text(str(limit if "memsw" in swap_name else 0))
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def forget(folder: Path) -> None:
    """Remove the pages of a folder's files, or of a file, from the cache."""
    for path in (folder, *folder.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def enter_group(group: Path) -> None:
    """Move this process into a control group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def bytes_in(folder: Path) -> int:
    return sum(x.stat().st_size for x in (folder, *folder.rglob("*")) if x.is_file())


def measure(
    name: str,
    limit: int,
    model: Path,
    arguments: list[str],
    inputs: list[Path],
    output: Path | None,
    threads: int,
) -> dict[str, Any]:
    """Run one command under the limit and print its costs."""
    for folder in inputs:
        forget(folder)
    report = Path(arguments[-1])
    report.unlink(missing_ok=True)
    with memory_group(limit) as group:
        words = [sys.executable, "-c", CHILD, report, threads, model, *arguments[:-1]]
        began = time.monotonic()
        done = subprocess.run(
            [str(word) for word in words], check=False, preexec_fn=partial(enter_group, group)
        )
        seconds = time.monotonic() - began
        peak = next(x for x in ("memory.max_usage_in_bytes", "memory.peak") if (group / x).exists())
        found: dict[str, Any] = {
            "command": name,
            "limit": limit,
            "group_peak": int((group / peak).read_text()),
            "seconds": round(seconds),
        }
    if done.returncode or not report.exists():
        found["status"] = f"ended with {done.returncode}"
    else:
        found |= json.loads(report.read_text())
    found["input"] = sum(bytes_in(folder) for folder in inputs)
    found["output"] = bytes_in(output) if output is not None else 0
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument(
        "--training-memory", default="3GB", help="for block reconstruction, which trains in float32"
    )
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, help="local folder with the corpora")
    parser.add_argument("--only", default="prune,eval,compare,reconstruct")
    parser.add_argument(
        "--others",
        type=Path,
        nargs="*",
        help="checkpoints and GGUF files to compare with MODEL; else the pruned",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scratch, model = options.scratch, options.model
    scratch.mkdir(parents=True, exist_ok=True)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    pruned, better = scratch / "pruned", scratch / "better"
    report = str(scratch / "report.json")
    # A tenth of the limit is left for pages of files that wait to be read or written.
    budgets = {
        x: str(int(parse_bytes(getattr(options, x)) * 0.9)) for x in ("memory", "training_memory")
    }
    few = ["--samples", str(options.windows), "--seqlen", str(options.seqlen)]
    few += ["--data", str(options.data)] if options.data else []
    training = ["--reconstruct", "all", "--reconstruct-epochs", "1"]
    training += ["--memory", budgets["training_memory"]]
    within = ["--memory", budgets["memory"]]
    others = options.others or [pruned]
    # Command -> its words, the folders that it reads, and the one that it writes.
    runs: dict[str, tuple[list[str], list[Path], Path | None]] = {
        "prune": (["prune", str(model), str(pruned), *few, *within], [model], pruned),
        "eval": (["eval", str(model), *few, *within], [model], None),
        # Several models and their reference side by side.
        "compare": (
            ["eval", *map(str, others), "--reference", str(model), *few, *within],
            [model, *others],
            None,
        ),
        "reconstruct": (["prune", str(model), str(better), *few, *training], [model], better),
    }
    found = []
    for name, (arguments, inputs, output) in runs.items():
        if name in options.only.split(","):
            trains = name == "reconstruct"
            limit = parse_bytes(options.training_memory if trains else options.memory)
            if weights <= limit:
                parser.error(
                    f"{model} holds {weights:,} bytes of weights: not more than the limit of "
                    f"{limit:,}"
                )
            found.append(
                measure(name, limit, model, [*arguments, report], inputs, output, options.threads)
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(entry["status"] != 0 for entry in found))


if __name__ == "__main__":
    main()
