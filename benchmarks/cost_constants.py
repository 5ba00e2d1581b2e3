"""Measure the constants of `prunus plan --model-shape` on one core.

    python benchmarks/cost_constants.py [--folder DIR] [--json FILE]

src/prunus/hardware/rates.py holds the constants and explains them.
Each constant is timed on the functions that a run calls, at a width of 2048. The best of a few
repetitions counts. The disk is that of --folder, the link is loopback between two processes. It
takes about a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)

from prunus.hardware.numerics import count_zeros  # noqa: E402
from prunus.methods import METHODS, MethodOptions  # noqa: E402
from prunus.methods.patterns import Pattern  # noqa: E402
from prunus.methods.solvers.obs import inverse_factor  # noqa: E402
from prunus.methods.statistics import InputStatistics  # noqa: E402
from prunus.model.checkpoint.writer import save_safetensors  # noqa: E402

WIDTH = 2048
TOKENS = 2048


def best(work: Callable[[], object], rounds: int = 3) -> float:
    """The time of the fastest round, in seconds."""
    found = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - began)
    return found


def compute(width: int) -> dict[str, float]:
    """The rates that need no disk and no other process."""
    wide = width * 11008 // 4096 // 16 * 16
    x, x16 = torch.randn(TOKENS, width), torch.randn(TOKENS, width).bfloat16()
    weight, weight16 = torch.randn(wide, width) * 0.02, (torch.randn(wide, width) * 0.02).bfloat16()
    multiply = 2.0 * TOKENS * wide * width
    found = {"products": multiply / best(lambda: torch.nn.functional.linear(x16, weight16))}
    found["products32"] = multiply / best(lambda: torch.nn.functional.linear(x, weight))
    heads = width // 128
    q = torch.randn(4, heads, TOKENS // 4, 128).bfloat16()
    attention = torch.nn.functional.scaled_dot_product_attention
    found["attention"] = (
        4.0 * TOKENS * (TOKENS // 4) * width / best(lambda: attention(q, q, q, is_causal=True))
    )
    norms = InputStatistics(width, "norms")
    found["elements"] = x16.numel() / best(lambda: norms.add(x16))
    gram = InputStatistics(width, "gram")
    gram.add(x)
    found["factor32"] = width**3 / best(lambda: inverse_factor(gram.gram_II, 0.01), 2)

    def wanda() -> None:
        # As in `pruning/block/linear.py`: to float32, score, mask, result, its zeros, its error.
        wide32 = weight16.float()
        pruned = METHODS["wanda"].prune(wide32, norms, Pattern(), 0.5, MethodOptions())
        new = weight16.masked_fill(~pruned.keep_OI, 0)
        count_zeros(new)
        (wide32 - new.float()).square_() @ norms.sum_squares_I.float()
        wide32.square() @ norms.sum_squares_I.float()

    found["weights"] = weight.numel() / best(wanda)
    sparsegpt = METHODS["sparsegpt"]
    inverse = gram.derived(("inverse_factor", 0.01), lambda: inverse_factor(gram.gram_II, 0.01))
    assert inverse is not None

    def sweep(rows: int) -> float:
        return best(
            lambda: sparsegpt.prune(
                weight[:rows], gram, Pattern(group="layer"), 0.5, MethodOptions()
            ),
            2,
        )

    # A sweep over few rows takes the time of its columns alone.
    columns = sweep(16)
    found["columns"] = width / columns
    products = 1.0 * wide * width * width / found["products32"]
    found["swept"] = weight.numel() / max(sweep(wide) - products - columns, 1e-9)

    def finish() -> None:
        # As in `pruning/block/linear.py`: to float32 and back, the check for finite, the zeros.
        new = weight16.float().to(torch.bfloat16)
        torch.aminmax(new)
        count_zeros(new)

    found["finished"] = weight.numel() / best(finish)
    return found


def disk(folder: Path) -> dict[str, float]:
    """Bytes per second read (perhaps from the page cache), written with fsync, and hashed."""
    data = {"x": torch.randn(64, 2**20).bfloat16()}
    size = data["x"].numel() * 2
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file = Path(scratch) / "x.safetensors"
        write = size / best(lambda: save_safetensors(file, data), 2)
        read = size / best(file.read_bytes, 2)
    buffer = data["x"].view(torch.uint8).numpy().data
    return {
        "read": read,
        "write": write,
        "hashed": size / best(lambda: hashlib.sha256(buffer).digest(), 2),
    }


def link() -> None:
    """Measure the link from two ranks: bytes per second of a sum, seconds per synchronization."""
    from prunus.distributed import process_group

    with process_group(60) as ranks:
        matrix = torch.ones(2048, 2048)
        ranks.all_reduce(matrix)
        moved = best(lambda: ranks.all_reduce(matrix))
        synchronization = best(lambda: [ranks.gather_ints([1]) for _ in range(100)]) / 100
        if ranks.rank == 0:
            print(json.dumps({"link": matrix.numel() * 4 / moved, "latency": synchronization}))


def start(folder: Path) -> dict[str, float]:
    """Seconds and peak bytes of a run on a tiny model, in a process of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=64,
            dtype="bfloat16",
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(f"{scratch}/dense")
        save_safetensors(
            Path(scratch) / "ids.safetensors", {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
        )
        command = [sys.executable, "-m", "prunus", "prune", f"{scratch}/dense", f"{scratch}/out"]
        command += [
            "--calibration",
            f"{scratch}/ids.safetensors",
            "--samples",
            "1",
            "--seqlen",
            "8",
        ]
        command += ["--json", f"{scratch}/run.json"]
        subprocess.run(command, check=True, capture_output=True)
        totals = json.loads(Path(f"{scratch}/run.json").read_text())["totals"]
    return {"start": totals["seconds"], "process": float(totals["peak_memory_bytes"])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "RANK" in os.environ:
        link()
        return
    found = compute(WIDTH) | disk(options.folder)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
    ]
    result = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found |= json.loads(result.stdout.splitlines()[-1])
    found |= start(options.folder)
    for name, figure in found.items():
        print(f"{name:12} {figure:.3g}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
