"""What a run takes on a GPU, block by block, and what the result gives there. One command.

    python benchmarks/gpu.py SCRATCH [--device cuda] [--json docs/results/gpu.json]

SCRATCH needs 8 GB. Models have random weights in the shapes of LLaMA-7B, LLaMA-13B and LLaMA-2-70B,
two blocks each, and 128 windows of 2048 random tokens. The tables at the end are Markdown.

- Seconds of a block, by part. The host waits for the device around every part, and nothing is read
  ahead. So the parts add up, and the last column, which is measured without them, is smaller.
- Wanda in lockstep and in two passes, and device memory beside what the plan says.
- Products of 2:4 linears on sparse tensor cores, which torch calls, and dense ones.
- Decoding with a packed model and with the unpacked one.

`--hidden 256 --windows 4 --seqlen 64 --device cpu` tries the script on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from llama_shapes import VOCABULARY, write_checkpoint
from torch.sparse import to_sparse_semi_structured
from transformers import AutoModelForCausalLM

import prunus
from prunus import pack
from prunus.engine import loop
from prunus.engine.block import prune_block
from prunus.engine.linear_job import describe_plan, plan_run
from prunus.engine.memory import Memory
from prunus.engine.options import RunOptions
from prunus.engine.output import CheckpointFolder
from prunus.hardware.memory import describe_hardware, peak_memory, versions
from prunus.methods.statistics import InputStatistics
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.pruning.recipe import Recipe
from prunus.pruning.run import PlainTensors

BLOCKS = 2
# Name -> width, width inside the MLP, heads of keys and values.
SHAPES = {
    "LLaMA-7B": (4096, 11008, 32),
    "LLaMA-13B": (5120, 13824, 40),
    "LLaMA-2-70B": (8192, 28672, 8),
}
RECIPES: dict[str, dict[str, Any]] = {
    "Wanda": {"method": "wanda"},
    "Wanda, two passes": {"method": "wanda", "propagate": "block"},
    "SparseGPT": {"method": "sparsegpt"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best", "allocation": "uniform"},
}
# The larger models run with these only: a block of 70B trains for too long.
LARGE = ("Wanda", "SparseGPT")
PARTS = ("disk", "transfer", "statistics", "solve", "reconstruct")


class Stopwatch:
    """Seconds by part. A part inside another one counts for itself only.

    Args:
        device: waited for at both ends of a part.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: Counter[str] = Counter()
        self._device, self._inside, self._since = device, ["rest"], time.perf_counter()

    def _switch(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts for `part`."""

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            self._switch()
            self._inside.append(part)
            try:
                return function(*args, **given)
            finally:
                self._switch()
                self._inside.pop()

        return call


@contextlib.contextmanager
def split(device: torch.device) -> Iterator[Stopwatch]:
    """Measure the parts of a run inside the `with`."""
    watch = Stopwatch(device)
    places = [
        ("disk", CheckpointSource, "block"),
        ("disk", loop, "read_stored"),
        ("disk", CheckpointFolder, "write_block"),
        ("transfer", Skeleton, "fill"),
        ("statistics", InputStatistics, "add"),
        ("solve", prune_block, "prune_linear"),
        ("reconstruct", prune_block.BlockPruner, "_reconstruct"),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Memory, "overlaps", False))
        for part, owner, name in places:
            stack.enter_context(patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        yield watch


def prune(
    model: Path, result: Path, ids: torch.Tensor, device: torch.device, **recipe: Any
) -> dict[str, Any]:
    """Prune twice, with and without the split; seconds are per block."""
    options = {"calibration": ids, "device": str(device), "overwrite": True, **recipe}
    prunus.prune(model, result, **options)  # everything is loaded and compiled now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    prunus.prune(model, result, **options)
    whole = time.perf_counter() - started
    peak = peak_memory(device)
    with split(device) as watch:
        prunus.prune(model, result, **options)
    parts = {part: watch.seconds[part] / BLOCKS for part in PARTS}
    return {
        "parts": parts | {"forward and rest": watch.seconds["rest"] / BLOCKS},
        "seconds": whole / BLOCKS,
        "peak_bytes": peak,
        "planned_bytes": planned(model, device, ids, recipe),
    }


def planned(model: Path, device: torch.device, ids: torch.Tensor, recipe: dict[str, Any]) -> int:
    samples, seqlen = ids.shape
    options = RunOptions(device=str(device), calibration_data=ids)
    wanted = Recipe(calibration="tensor", samples=samples, seqlen=seqlen, **recipe)
    return int(describe_plan(plan_run(model, wanted, options, PlainTensors()))["peak_memory_bytes"])


@torch.no_grad()
def sparse_products(folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Speed-up of the linears of a block on 2:4 sparse tensor cores, for one token and for many."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    found = []
    for name, linear in model.model.layers[0].named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        sparse = to_sparse_semi_structured(linear.weight.detach())
        for tokens in (1, 2048):
            x = torch.randn(tokens, linear.in_features, dtype=torch.bfloat16, device=device)
            dense, fast = (seconds_of_product(x, weight) for weight in (linear.weight, sparse))
            found.append({"linear": name, "tokens": tokens, "speedup": dense / fast})
    return found


def seconds_of_product(x: torch.Tensor, weight: torch.Tensor, rounds: int = 20) -> float:
    """The median time of a product on the device."""
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.nn.functional.linear(x, weight)
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


@torch.no_grad()
def decode(folder: Path, device: torch.device, tokens: int = 64) -> float:
    """Tokens per second of greedy decoding, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    ids = torch.zeros(1, 16, dtype=torch.int64, device=device)
    given = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(ids, max_new_tokens=4, **given)
    started = time.perf_counter()
    made = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **given)
    made.cpu()
    return tokens / (time.perf_counter() - started)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show(results: dict[str, Any]) -> str:
    columns = [*PARTS, "forward and rest"]
    rows = [
        [
            name,
            *(f"{row['parts'][part]:.2f}" for part in columns),
            f"{sum(row['parts'].values()):.2f}",
            f"{row['seconds']:.2f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
            f"{row['planned_bytes'] / 1e9:.1f}",
        ]
        for name, row in results["runs"].items()
    ]
    header = ["seconds per block", *columns, "sum", "without the split", "peak, GB", "planned, GB"]
    text = table(header, rows)
    text += "\n" + table(
        ["tokens per second", "one token at a time"],
        [[name, f"{speed:.1f}"] for name, speed in results["decode"].items()],
    )
    if results["sparse"]:
        text += "\n" + table(
            ["2:4 linear", "tokens", "speed-up"],
            [
                [row["linear"], str(row["tokens"]), f"{row['speedup']:.2f}"]
                for row in results["sparse"]
            ],
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--hidden", type=int, help="one small model instead of the three")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu with a small --hidden tries the script")

    shapes = SHAPES
    if options.hidden:
        shapes = {"small": (options.hidden, 2 * options.hidden, options.hidden // 128)}
    first = next(iter(shapes))
    generator = torch.Generator().manual_seed(0)
    shape = (options.windows, options.seqlen)
    ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    results: dict[str, Any] = {
        "what": "What runs take on a GPU, by benchmarks/gpu.py.",
        "hardware": describe_hardware(device),
        "versions": versions(),
        "windows": shape,
        "runs": {},
    }
    result = options.scratch / "result"
    for name, (hidden, intermediate, key_heads) in shapes.items():
        model = options.scratch / name
        write_checkpoint(model, BLOCKS, hidden, intermediate, key_heads)
        for label, recipe in RECIPES.items():
            if name == first or label in LARGE:
                found = prune(model, result, ids, device, **recipe)
                results["runs"][f"{name}, {label}"] = found
                print(f"{name}, {label}: {found['seconds']:.2f} s per block", flush=True)
        if name != first:
            shutil.rmtree(model)

    prunus.prune(
        options.scratch / first,
        result,
        pattern="2:4",
        calibration=ids[:8],
        device=str(device),
        overwrite=True,
    )
    packed = options.scratch / "packed"
    pack(result, packed, overwrite=True)
    results["decode"] = {
        "pruned, dense storage": decode(result, device),
        "packed": decode(packed, device),
    }
    results["sparse"] = sparse_products(result, device) if device.type == "cuda" else []
    for folder in (packed, result, options.scratch / first):
        shutil.rmtree(folder)
    print("\n" + show(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
